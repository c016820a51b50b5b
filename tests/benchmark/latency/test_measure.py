"""Latency: what is measured and how it is put together. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference.fakes import RedEngine, red_image, write_image
from manifest_values import stated

from tood_deploy.benchmark.latency.measure import (
    LatencyPlan,
    Measurement,
    Worker,
    describe,
    speedup,
    summarise,
)
from tood_deploy.benchmark.latency.peak import Arithmetic, Peak
from tood_deploy.benchmark.latency.report import (
    LatencyRun,
    fps,
    overview_table,
    speedups,
    tables,
    write_latency_reports,
)
from tood_deploy.benchmark.latency.run import recorded_ap
from tood_deploy.benchmark.latency.worker import (
    END_TO_END,
    ENGINE,
    Bench,
    Case,
    Laps,
    Opened,
    Turn,
    WarmUp,
    _torch_call,
    is_stable,
    timed_call,
    warm_up,
)
from tood_deploy.engines.torch_engine import TorchEngine
from tood_deploy.errors import ToodError
from tood_deploy.files import file_sha256
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest import manifest_path
from tood_deploy.model.detector import build_model
from tood_deploy.presets import PRESETS

WARM = WarmUp(10, 1.0, True, (1.0,) * 10)


def measurement(name: str, total_ms: list[list[float]], batch: int = 1) -> Measurement:
    """One with these end-to-end times, round by round; a tenth of each is pre-processing."""
    case = Case(f"{name}.onnx", name, batch)
    warm_ups = {ENGINE: WARM, END_TO_END: WARM}
    opened = Opened("an engine", "fp32", 1.5, 0.5, warm_ups, "images", (64, 96), 3, PRESETS["tiny"])
    turns = []
    for i, times in enumerate(total_ms):
        whole = [{"pre": ms / 10, "infer": ms * 0.9, "total": ms} for ms in times]
        turns.append(Turn({END_TO_END: whole, ENGINE: [{"infer": 1.0, "total": 1.0}]}, 100.0 + i))
    return Measurement(case, opened, turns, images=10)


class TestPlan:
    def test_models_of_one_size_and_batch_are_measured_together(self) -> None:
        plan = LatencyPlan((Case("a", "a"), Case("b", "b")), batches=(4, 1, 1), sizes=((64, 96),))
        groups = [
            [(case.name, case.batch, case.imgsz) for case in group] for group in plan.groups()
        ]
        assert groups == [
            [("a", 1, (64, 96)), ("b", 1, (64, 96))],
            [("a", 4, (64, 96)), ("b", 4, (64, 96))],
        ]

    @pytest.mark.parametrize(
        ("values", "option"),
        [({"batches": (1, 0)}, "--batch"), ({"rounds": 0}, "--rounds"), ({"turn_s": -1}, "turn")],
    )
    def test_senseless_numbers(self, values: dict, option: str) -> None:
        with pytest.raises(ToodError, match=option):
            LatencyPlan((Case("a", "a"),), **values)


class TestBench:
    @pytest.fixture
    def bench(self, tmp_path: Path) -> Bench:
        for number in range(3):
            write_image(tmp_path / f"{number}.png", red_image(left=10 * number))
        write_image(tmp_path / "z.png", red_image(height=200, width=40))
        case = Case("red", "red", batch=2, images=tmp_path, imgsz=(64, 96), warmup_s=0.01)
        return Bench(case, Detector(RedEngine(), imgsz=(64, 96)), load_s=0.1)

    def test_images_of_the_commonest_padded_size_are_taken(self, bench: Bench) -> None:
        assert len(bench.frames) == 3
        assert "1 of another padded size left out" in bench.opened.images
        assert bench.opened.net_hw == (64, 96)
        assert bench.opened.detections == 2

    def test_a_turn_has_every_part_of_every_call(self, bench: Bench) -> None:
        turn = bench.turn(0.02)
        assert set(turn.calls) == {ENGINE, END_TO_END}
        assert {frozenset(call) for call in turn.calls[ENGINE]} == {frozenset({"infer", "total"})}
        assert {frozenset(call) for call in turn.calls[END_TO_END]} == {
            frozenset({"pre", "infer", "post", "total"})
        }
        for call in turn.calls[END_TO_END]:
            assert call["total"] == pytest.approx(call["pre"] + call["infer"] + call["post"])
        assert turn.peak_mib > 0

    def test_batches_go_round_the_images(self, bench: Bench) -> None:
        bench._next = 0
        assert [bench._batch() for _ in range(3)] == [[0, 1], [2, 0], [1, 2]]


class SelfTimedEngine(RedEngine):
    """Stands for a TensorRT engine: runs on a GPU, and knows the parts of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.device = "cuda"
        self.calls: list[tuple[float, float]] = []

    def infer_in_parts(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> tuple[Any, Any]:
        self.calls.append((score_threshold, iou_threshold))
        return self.infer(images, valid_hw, score_threshold, iou_threshold), (2.0, 8.0, 1.0)


class TestCallsInSteps:
    """The steps that a GPU needs, run on the CPU: the same numbers as the engine's own call."""

    IMAGES = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    VALID_HW = np.array([[60, 90]], np.int32)

    def test_pytorch(self) -> None:
        with TorchEngine(build_model("tiny")) as engine:
            laps = Laps()
            found = _torch_call(engine)(self.IMAGES, self.VALID_HW, 0.005, 0.6, laps)
            expected = engine.infer(self.IMAGES, self.VALID_HW, 0.005, 0.6)
        assert list(laps.seconds) == ["h2d", "infer", "d2h"]
        np.testing.assert_array_equal(found.scores, expected.scores)

    def test_on_a_cpu_there_is_inference_alone(self) -> None:
        laps = Laps()
        timed_call(RedEngine())(self.IMAGES, self.VALID_HW, 0.3, 0.6, laps)
        assert list(laps.seconds) == ["infer"]

    def test_an_engine_that_times_itself_fills_the_parts(self) -> None:
        laps, engine = Laps(), SelfTimedEngine()
        laps.lap("pre")
        found = [timed_call(engine)(self.IMAGES, self.VALID_HW, 0.3, 0.6, laps) for _ in range(2)]
        assert engine.calls == [(0.3, 0.6)] * 2
        assert [each.num_dets.shape for each in found] == [(1,), (1,)]
        assert list(laps.seconds) == ["pre", "h2d", "infer", "d2h"]
        assert [laps.seconds[part] for part in ("h2d", "infer", "d2h")] == [4.0, 16.0, 2.0]
        laps.lap("post")
        assert laps.seconds["post"] < 1, "what the engine measured counts once"

    def test_laps_count_from_the_last_one(self) -> None:
        laps = Laps()
        laps._last -= 1000
        laps.restart()
        laps.lap("a")
        laps.lap("a")
        assert list(laps.seconds) == ["a"]
        assert laps.seconds["a"] < 100


class TestReports:
    FIRST, SECOND = (
        measurement("first", [[10, 12], [20, 24]]),
        measurement("second", [[5, 6], [10, 12]]),
    )

    def test_speed_up_is_against_the_first_of_the_group(self) -> None:
        others = [
            measurement("first", [[8], [8]], batch=2),
            measurement("second", [[2], [2]], batch=2),
        ]
        found = speedups([self.FIRST, self.SECOND, *others])
        assert set(found) == {1, 3}
        assert found[1].value == pytest.approx(2)
        assert found[3].value == pytest.approx(4)

    def test_throughput_counts_images(self) -> None:
        assert fps(measurement("a", [[500.0]], batch=4)) == pytest.approx(8)

    def test_a_part_that_does_not_exist_is_a_dash_not_a_zero(self) -> None:
        table = tables([self.FIRST])["Parts of an end-to-end call"]
        row = dict(zip(table.headers, table.rows[0], strict=True))
        assert row["h2d"] is row["d2h"] is None
        assert str(row["pre"]).endswith("(10.0%)")

    def test_parts_of_an_engine_call_where_there_are_transfers(self) -> None:
        assert "Parts of an engine call" not in tables([self.FIRST])
        on_gpu = measurement("gpu", [[4.0]])
        on_gpu.rounds[0].calls[ENGINE][0] |= {"h2d": 0.25, "infer": 0.5, "d2h": 0.25}
        table = tables([on_gpu])["Parts of an engine call"]
        assert table.headers[-3:] == ("h2d", "infer", "d2h")
        assert table.rows[0][-3:] == ["0.25 (25.0%)", "0.50 (50.0%)", "0.25 (25.0%)"]

    def test_files(self, tmp_path: Path) -> None:
        both = [self.FIRST, self.SECOND, measurement("second", [[8.0]], batch=2)]
        run = LatencyRun(both, {"command": "c"}, {"cpu": "a"}, {"second": 40.0}, ["busy"])
        paths = write_latency_reports(tmp_path, run)
        assert [path.name for path in paths] == ["latency.json", "latency.md", "latency.html"]
        values = json.loads(paths[0].read_text())
        second = values["measurements"][1]
        assert second["rounds"][0][END_TO_END][0]["total"] == 5
        assert second["ms"][END_TO_END]["total"]["count"] == 4
        assert second["times_faster"]["value"] == pytest.approx(2)
        assert second["peak_device_mib"] is None
        assert "second | fp32 | 1 | 64x96" in paths[1].read_text()
        page = paths[2].read_text()
        assert "AP over latency" in page
        assert "Throughput over batch" in page
        assert "busy" in page

    def test_share_of_peak(self, tmp_path: Path) -> None:
        pair = [self.FIRST, measurement("second", [[8.0]], batch=2)]
        arithmetic = Arithmetic(Peak(50, 40), {(PRESETS["tiny"], (64, 96)): 0.01})
        table = tables(pair, arithmetic)["Share of peak"]
        # An engine's call takes 1 ms: 10 GMAC/s at batch 1, 20 at batch 2, of 50.
        assert [row[-3:] for row in table.rows] == [
            ["0.01", "10.0", "0.20"],
            ["0.01", "20.0", "0.40"],
        ]
        assert overview_table(pair, arithmetic).rows[1][-1] == "0.40"
        assert "Share of peak" not in tables(pair)
        run = LatencyRun(pair, {}, {}, {}, [], arithmetic)
        assert json.loads(write_latency_reports(tmp_path, run)[0].read_text())["peak"] == {
            "product": 50,
            "convolution": 40,
            "threads": None,
        }

    def test_description_is_plain(self) -> None:
        found = describe(self.FIRST)
        assert found["artefact_mib"] is None
        assert found["peak_host_mib"] == 101
        assert found["warm_up"][ENGINE]["calls"] == 10


def test_ap_comes_from_the_verdicts_in_the_manifests(tmp_path: Path) -> None:
    checkpoint, artefact = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    for path in (checkpoint, artefact, tmp_path / "other.pth", tmp_path / "bare.onnx"):
        path.write_text(path.name)
    verdict = {
        "ap": {"artefact": 41.0, "reference": 42.0},
        "reference": {"sha256": file_sha256(checkpoint)},
    }
    manifest_path(artefact).write_text(stated(parity={"benchmark": verdict}).to_json())
    cases = [
        Case(str(tmp_path / name), name)
        for name in ("m.safetensors", "m.onnx", "other.pth", "bare.onnx")
    ]
    assert recorded_ap([*cases, Case("r50-1x", "r50-1x")]) == {
        "m.onnx": 41.0,
        "m.safetensors": 42.0,
    }


def test_a_worker_that_cannot_open_its_model_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("no model")
    with (
        Worker(Case(str(tmp_path / "a.onnx"), "a"), None) as worker,
        pytest.raises(ToodError, match="not an ONNX file"),
    ):
        worker.receive(Opened)


def test_a_worker_that_dies_is_told(tmp_path: Path) -> None:
    with Worker(Case(str(tmp_path / "none.onnx"), "a"), None) as worker:
        worker._process.kill()
        worker._process.join()
        with pytest.raises(ToodError, match="ended with code -9"):
            worker.receive(Opened)


def test_a_summary_by_hand() -> None:
    found = summarise([1, 2, 3, 4, 100])
    assert (found.count, found.median, found.mean, found.spread) == (5, 3, 22, 2)
    assert found.p90 < found.p95 < found.p99 < 100


def test_one_measurement() -> None:
    found = summarise([7])
    assert (found.median, found.p99, found.spread) == (7, 7, 0)


def test_drift_that_hits_both_sides_cancels_out() -> None:
    drift = np.linspace(1, 3, 12)
    first, second = [[10 * d] * 3 for d in drift], [[5 * d] * 3 for d in drift]
    found = speedup(first, second)
    assert found.value == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((2, 2))


def test_noise_widens_the_interval() -> None:
    random = np.random.default_rng(1)
    first = [random.normal(10, 1, 5).tolist() for _ in range(10)]
    second = [random.normal(8, 1, 5).tolist() for _ in range(10)]
    found = speedup(first, second)
    assert found.low < found.value < found.high
    assert found.low > 1
    assert found.high < 1.6


def test_the_interval_is_the_same_every_time() -> None:
    first, second = [[10.0, 11], [12, 9], [10, 10]], [[5.0, 7], [6, 5], [5, 5]]
    assert speedup(first, second) == speedup(first, second)


class Clock:
    """Time that goes on when a call is made."""

    def __init__(self, times_s: list[float]) -> None:
        self.now, self.times_s, self.calls = 0.0, times_s, 0

    def call(self) -> None:
        self.now += self.times_s[min(self.calls, len(self.times_s) - 1)]
        self.calls += 1


def test_a_warm_up_ends_when_times_no_longer_change() -> None:
    clock = Clock([1.0, 0.5, 0.3, 0.2] + [0.1] * 20)
    found = warm_up(clock.call, 100, lambda: clock.now)
    assert found.stable
    assert (
        found.calls == clock.calls == 12
    )  # ten calls whose two halves have the same median, after two slow ones
    assert found.times_ms[0] == pytest.approx(1000)
    assert found.seconds == pytest.approx(clock.now)


def test_a_warm_up_gives_up_and_says_so() -> None:
    clock = Clock([2.0**-i for i in range(40)])
    found = warm_up(clock.call, 1.9, lambda: clock.now)
    assert not found.stable
    assert found.calls < 10


def test_stability_needs_two_windows() -> None:
    assert not is_stable([1.0] * 9)
    assert is_stable([1.0] * 10)
    assert not is_stable([1.0] * 5 + [1.05] * 5)
