"""The TensorRT engine at work.

Where no GPU can be, on a CUDA driver and a TensorRT made of Python, and the names say so.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

trt = pytest.importorskip("tensorrt_rtx")
real_driver = pytest.importorskip("cuda.bindings.driver")


from engines.fake_tensorrt import CANDIDATE_TYPES
from engines.tensorrt_bench import PROFILES, Bench, assert_answers, make_images

from tood_deploy.benchmark.latency.worker import TimesItself
from tood_deploy.engines.base import BatchDetections
from tood_deploy.engines.tensorrt import engine as tensorrt_engine
from tood_deploy.engines.tensorrt import slot as tensorrt_slot
from tood_deploy.engines.tensorrt.cuda import CudaError, Event, Gpu, Stream
from tood_deploy.engines.tensorrt.engine import batch_sizes, choose_profile
from tood_deploy.errors import ArtefactError, DeviceError, InputError, ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest_sections import OptimizationProfile

Status = real_driver.CUresult


@pytest.mark.parametrize("cuda_graph", ["auto", False])
def test_answers_at_every_shape_with_a_fake_gpu(bench: Bench, cuda_graph: Any) -> None:
    with bench.open(cuda_graph=cuda_graph) as engine:
        assert engine.input_shapes_hw == ((64, 96), (96, 32))
        assert [engine.batches_at(size_hw) for size_hw in engine.input_shapes_hw] == [
            (1, 4),
            (1, 2),
        ]
        assert engine.name.endswith(" 10.13.3.9, Fake GPU")
        assert (engine.max_batch, engine.in_flight, engine.device, engine.notes) == (
            4,
            2,
            "cuda",
            [],
        )
        for _ in range(3):
            for size_hw, (least, _, most) in PROFILES:
                for batch in range(least, most + 1):
                    images, valid_hw = make_images(batch, batch, size_hw)
                    assert_answers(engine.infer(images, valid_hw, 0.25, 0.5), images, valid_hw)


def test_thresholds_reach_the_network_with_a_fake_gpu(bench: Bench) -> None:
    images, valid_hw = make_images(2)
    with bench.open() as engine:
        for conf, iou in ((0.1, 0.2), (0.3, 0.9), (0.0, 1.0)):
            assert_answers(engine.infer(images, valid_hw, conf, iou), images, valid_hw, conf, iou)


def test_images_with_gaps_in_memory_with_a_fake_gpu(bench: Bench) -> None:
    images, valid_hw = make_images(2)
    gappy = np.concatenate([images, images], 2)[:, :, :96, ::-1]
    with bench.open() as engine:
        assert_answers(
            engine.infer(gappy, valid_hw, 0.25, 0.5), np.ascontiguousarray(gappy), valid_hw
        )


class TestTooFewRoundsOfSuppression:
    """An engine without a loop gives -1 as count of a image whose detections are not known."""

    @pytest.fixture
    def unsettled(self, bench: Bench) -> Bench:
        """Its third image never settles."""

        def spoil(found: dict[str, np.ndarray]) -> None:
            found["num_dets"][2:3] = -1

        bench.plan.spoil = spoil
        bench.write(options={"nms": "unrolled", "nms_rounds": 16})
        return bench

    def test_the_candidates_are_suppressed_on_the_cpu_with_a_fake_gpu(self, bench: Bench) -> None:
        """Two of four candidates overlap, the last one is none."""
        bench.plan.types |= CANDIDATE_TYPES

        def spoil(found: dict[str, np.ndarray]) -> None:
            found["num_dets"][2:3] = -1
            for name in ("boxes", "scores", "labels"):
                found[name][2:3] = 0
            corners = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 0, 9, 9]])
            found["candidate_boxes"][2:3, :4] = corners
            found["candidate_scores"][2:3, :3] = 0.9, 0.8, 0.7
            found["candidate_labels"][2:3] = 3

        bench.plan.spoil = spoil
        images, valid_hw = make_images(4)
        with bench.open() as engine:
            detections = engine.collect(engine.submit(images, valid_hw, 0.25, 0.5))
            strict = engine.infer(images, valid_hw, 0.25, 0.9)
            assert engine.repaired == 2
        assert detections.num_dets[2] == 2
        assert detections.scores[2].tolist() == [np.float32(0.9), np.float32(0.7), 0, 0, 0]
        assert detections.boxes_net[2, :3].tolist() == [[0, 0, 10, 10], [50, 50, 60, 60], [0] * 4]
        assert detections.labels[2].tolist() == [3, 3, 0, 0, 0]
        assert strict.num_dets[2] == 3
        others = [0, 1, 3]
        kept = BatchDetections(*(part[others] for part in vars(detections).values()))
        assert_answers(kept, images[others], valid_hw[others])

    MESSAGE = r"16 rounds .* image 3 of a batch of 4 .* --nms-rounds, or .* --nms loop"

    def test_is_an_error_with_a_fake_gpu(self, unsettled: Bench) -> None:
        images, valid_hw = make_images(4)
        with unsettled.open() as engine:
            with pytest.raises(ArtefactError, match=self.MESSAGE):
                engine.infer(images, valid_hw, 0.25, 0.5)
            assert_answers(
                engine.infer(images[:2], valid_hw[:2], 0.25, 0.5), images[:2], valid_hw[:2]
            )

    def test_is_an_error_when_collected_and_frees_the_slot_with_a_fake_gpu(
        self, unsettled: Bench
    ) -> None:
        with unsettled.open() as engine:
            for _ in range(3):
                tickets = [
                    engine.submit(*make_images(4), 0.25, 0.5),
                    engine.submit(*make_images(1), 0.25, 0.5),
                ]
                with pytest.raises(ArtefactError, match=self.MESSAGE):
                    engine.collect(tickets[0])
                assert_answers(engine.collect(tickets[1]), *make_images(1))


class TestCudaGraphs:
    def test_recorded_once_a_shape_after_a_run_with_a_fake_gpu(self, bench: Bench) -> None:
        images, valid_hw = make_images(2)
        with bench.open() as engine:
            for _ in range(4):
                engine.infer(images, valid_hw, 0.25, 0.5)
        runs = [entry.split()[:-1] for entry in bench.driver.history if "run" in entry]
        assert runs == [["run"], ["replayed", "run"], ["replayed", "run"], ["replayed", "run"]]
        assert bench.driver.calls["cuGraphInstantiate"] == 1

    def test_never_if_not_wanted_with_a_fake_gpu(self, bench: Bench) -> None:
        images, valid_hw = make_images(1)
        with bench.open(cuda_graph=False) as engine:
            for _ in range(3):
                engine.infer(images, valid_hw, 0.25, 0.5)
        assert bench.driver.calls["cuStreamBeginCapture"] == 0

    def test_what_cannot_be_recorded_is_said_once_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.plan.recordable = False
        with bench.open() as engine:
            for batch in (1, 2, 1, 2):
                images, valid_hw = make_images(batch)
                assert_answers(engine.infer(images, valid_hw, 0.25, 0.5), images, valid_hw)
            assert len(engine.notes) == 1
            assert "without CUDA graphs: none can be recorded" in engine.notes[0]

    def test_what_cannot_be_recorded_is_an_error_where_asked_for_with_a_fake_gpu(
        self, bench: Bench
    ) -> None:
        bench.plan.recordable = False
        images, valid_hw = make_images(1)
        with bench.open(cuda_graph=True) as engine:
            for _ in range(2):
                with pytest.raises(
                    DeviceError,
                    match=r"no CUDA graph can be recorded \(.*\); leave cuda_graph at auto",
                ):
                    engine.infer(images, valid_hw, 0.25, 0.5)

    def test_another_value_is_refused_with_a_fake_gpu(self, bench: Bench) -> None:
        with pytest.raises(ToodError, match="cuda_graph is 'always'; expected auto, True or False"):
            bench.open(cuda_graph="always")


class TestFewBatches:
    """Others are padded to these, so that contexts and recordings are few."""

    @pytest.mark.parametrize(
        ("batches", "sizes"),
        [
            ((1, 1, 1), (1,)),
            ((1, 1, 8), (1, 2, 4, 8)),
            ((1, 5, 6), (1, 2, 3, 5, 6)),
            ((2, 3, 7), (2, 3, 4, 7)),
            ((8, 8, 8), (8,)),
        ],
    )
    def test_sizes(self, batches: tuple[int, int, int], sizes: tuple[int, ...]) -> None:
        assert batch_sizes(OptimizationProfile((64, 96), *batches)) == sizes

    def test_a_batch_between_them_has_no_context_of_its_own_with_a_fake_gpu(
        self, bench: Bench
    ) -> None:
        with bench.open() as engine:
            for batch in (4, 3, 4, 3):
                images, valid_hw = make_images(batch, batch)
                assert_answers(engine.infer(images, valid_hw, 0.25, 0.5), images, valid_hw)
            assert len(bench.plan.contexts) == 1
        assert bench.driver.calls["cuGraphInstantiate"] == 1

    def test_images_that_pad_a_batch_hold_no_pixels_with_a_fake_gpu(self, bench: Bench) -> None:
        """Nor do they keep the sizes of the batch before."""
        seen: list[np.ndarray] = []
        bench.plan.spoil = lambda found: seen.append(found["boxes"][:, 0, :2].copy())
        with bench.open() as engine:
            engine.infer(*make_images(4), 0.25, 0.5)
            images, valid_hw = make_images(3, 5)
            engine.infer(images, valid_hw, 0.25, 0.5)
        assert seen[-1].tolist() == [*valid_hw.tolist(), [0, 0]]

    def test_all_are_ready_once_it_is_open_with_a_fake_gpu(self, bench: Bench) -> None:
        """Five sizes and batches, in each of the two sets of buffers."""
        with bench.open(warm_up=True) as engine:
            assert len(bench.plan.contexts) == 10
            recorded, made = bench.driver.calls["cuGraphInstantiate"], list(bench.plan.compiled)
            assert recorded == 10
            bench.driver.history.clear()
            for size_hw, (least, _, most) in PROFILES:
                for batch in range(least, most + 1):
                    images, valid_hw = make_images(batch, batch, size_hw)
                    assert_answers(engine.infer(images, valid_hw, 0.25, 0.5), images, valid_hw)
            runs = [entry for entry in bench.driver.history if "run" in entry]
            assert all(entry.startswith("replayed") for entry in runs)
            assert len(bench.plan.contexts) == 10
        assert bench.driver.calls["cuGraphInstantiate"] == recorded
        assert bench.plan.compiled == made


class TestTwoInFlight:
    def test_nothing_waits_until_collected_with_a_fake_gpu(self, bench: Bench) -> None:
        """After the first batch of each buffer, which records, submitting only queues work.

        And the GPU takes turns.
        """
        batches = [make_images(2, seed) for seed in range(6)]
        with bench.open() as engine:
            warm = [engine.submit(*batch, 0.25, 0.5) for batch in batches[:2]]
            for ticket, batch in zip(warm, batches[:2], strict=True):
                assert_answers(engine.collect(ticket), *batch)
            bench.driver.history.clear()
            first, second = (engine.submit(*batch, 0.25, 0.5) for batch in batches[2:4])
            assert bench.driver.history == []
            assert_answers(engine.collect(second), *batches[3])
            order = [entry.split()[-2] for entry in bench.driver.history]
            assert order.count("run") == 2
            assert_answers(engine.collect(first), *batches[2])

    def test_computing_takes_turns_copying_does_not_with_a_fake_gpu(self, bench: Bench) -> None:
        batches = [make_images(1, seed) for seed in range(4)]
        with bench.open() as engine:
            for ticket in [engine.submit(*batch, 0.25, 0.5) for batch in batches[:2]]:
                engine.collect(ticket)
            bench.driver.history.clear()
            first, second = (engine.submit(*batch, 0.25, 0.5) for batch in batches[2:])
            engine.collect(second)
            streams = [entry.split()[-1] for entry in bench.driver.history]
            kinds = [entry.split()[-2] for entry in bench.driver.history]
            # Of the second: its images come in; then the first's whole run, since they share
            # memory; then its own.
            assert kinds == ["in", "in", "run", "run", "out"]
            assert streams[0] == streams[3] == streams[4] != streams[1] == streams[2]
            engine.collect(first)

    def test_a_new_shape_takes_its_turn_too_with_a_fake_gpu(self, bench: Bench) -> None:
        with bench.open() as engine:
            engine.infer(*make_images(1), 0.25, 0.5)
            bench.driver.history.clear()
            first, second = (
                engine.submit(*make_images(1), 0.25, 0.5),
                engine.submit(*make_images(2), 0.25, 0.5),
            )
            kinds = [entry.split()[-2] for entry in bench.driver.history]
            assert kinds == ["in", "run", "profile", "in", "run"], (
                "the second's profile was chosen while the first ran"
            )
            assert_answers(engine.collect(first), *make_images(1))
            assert_answers(engine.collect(second), *make_images(2))

    def test_a_long_stream_with_a_fake_gpu(self, bench: Bench) -> None:
        with bench.open() as engine:
            waiting: list[tuple[Any, tuple[np.ndarray, np.ndarray]]] = []
            for seed in range(20):
                batch = make_images(1 + seed % 2, seed, ((64, 96), (96, 32))[seed % 3 == 0])
                waiting.append((engine.submit(*batch, 0.25, 0.5), batch))
                if len(waiting) == 2:
                    ticket, expected = waiting.pop(0)
                    assert_answers(engine.collect(ticket), *expected)

    def test_the_detectors_stream_with_a_fake_gpu(self, bench: Bench, tmp_path: Path) -> None:
        """The pipeline keeps two batches in flight.

        What comes out is what one image at a time gives.
        """
        generator = np.random.default_rng(0)
        images = [
            generator.integers(0, 256, (*size_hw, 3), np.uint8)
            for size_hw in ((48, 90), (90, 40), (64, 96), (50, 50), (33, 64))
        ]
        for number, image in enumerate(images):
            cv2.imwrite(str(tmp_path / f"{number}.png"), image)
        with Detector(bench.open(), conf=0.25, iou=0.5) as detector:
            for batch in (1, 2):
                streamed = [
                    found for _, found in detector.stream(sorted(tmp_path.glob("*.png")), batch)
                ]
                for image, found in zip(images, streamed, strict=True):
                    alone = detector(image)
                    assert len(alone) > 0
                    assert np.array_equal(alone.boxes, found.boxes)
                    assert np.array_equal(alone.class_ids, found.class_ids)

    def test_arrays_may_change_once_submitted_with_a_fake_gpu(self, bench: Bench) -> None:
        images, valid_hw = make_images(2)
        kept = images.copy()
        with bench.open() as engine:
            for _ in range(3):
                images[:] = kept
                ticket = engine.submit(images, valid_hw, 0.25, 0.5)
                images[:] = 0
                assert_answers(engine.collect(ticket), kept, valid_hw)

    def test_a_third_batch_is_refused_with_a_fake_gpu(self, bench: Bench) -> None:
        batch = make_images(1)
        with bench.open() as engine:
            tickets = [engine.submit(*batch, 0.25, 0.5) for _ in range(2)]
            with pytest.raises(
                ToodError, match="2 batches are submitted already; collect the oldest one first"
            ):
                engine.submit(*batch, 0.25, 0.5)
            with pytest.raises(ToodError, match="collect the oldest"):
                engine.infer(*batch, 0.25, 0.5)
            for ticket in tickets:
                assert_answers(engine.collect(ticket), *batch)

    def test_collecting_twice_is_refused_with_a_fake_gpu(self, bench: Bench) -> None:
        batch = make_images(1)
        with bench.open() as engine, bench.open() as other:
            ticket = engine.submit(*batch, 0.25, 0.5)
            with pytest.raises(ToodError, match="another engine's"):
                other.collect(ticket)
            engine.collect(ticket)
            with pytest.raises(ToodError, match="collected already"):
                engine.collect(ticket)

    def test_results_stay_when_the_buffers_are_used_again_with_a_fake_gpu(
        self, bench: Bench
    ) -> None:
        first, second = make_images(2, 1), make_images(2, 2)
        with bench.open() as engine:
            found = engine.infer(*first, 0.25, 0.5)
            engine.infer(*second, 0.25, 0.5)
        assert_answers(found, *first)


class TestPartsOfACall:
    """The fake GPU's clock is the only one, so that every second is known.

    2 ms go in, 8 ms are computed, 1 ms goes back.
    """

    @pytest.fixture
    def bench(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
        clock = SimpleNamespace(perf_counter=lambda: bench.driver.clock_s)
        for module in (tensorrt_engine, tensorrt_slot):
            monkeypatch.setattr(module, "time", clock)
        return bench

    @pytest.mark.parametrize("cuda_graph", ["auto", False])
    def test_are_told_apart_with_a_fake_gpu(self, bench: Bench, cuda_graph: Any) -> None:
        with bench.open(cuda_graph=cuda_graph) as engine:
            for seed in range(3):  # runs and records, then replays, where it may
                images, valid_hw = make_images(2, seed)
                found, seconds = engine.infer_in_parts(images, valid_hw, 0.25, 0.5)
                assert_answers(found, images, valid_hw)
                assert seconds == pytest.approx((0.002, 0.008, 0.001))
            assert isinstance(engine, TimesItself)

    def test_what_the_cpu_does_first_counts_to_the_device_with_a_fake_gpu(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill = tensorrt_slot.Slot.fill

        def slow_fill(*arguments: Any) -> None:
            bench.driver.clock_s += 0.5
            fill(*arguments)

        monkeypatch.setattr(tensorrt_slot.Slot, "fill", slow_fill)
        with bench.open() as engine:
            assert engine.infer_in_parts(*make_images(1), 0.25, 0.5)[1] == pytest.approx(
                (0.502, 0.008, 0.001)
            )

    def test_waiting_for_a_batch_in_flight_counts_to_inference_with_a_fake_gpu(
        self, bench: Bench
    ) -> None:
        with bench.open(cuda_graph=False) as engine:
            for ticket in [engine.submit(*make_images(1), 0.25, 0.5) for _ in range(2)]:
                engine.collect(ticket)
            ticket = engine.submit(*make_images(1), 0.25, 0.5)
            _, seconds = engine.infer_in_parts(*make_images(1), 0.25, 0.5)
            assert seconds == pytest.approx((0.002, 0.002 + 0.008 + 0.008, 0.001))
            engine.collect(ticket)

    def test_other_calls_put_no_marks_for_them_with_a_fake_gpu(self, bench: Bench) -> None:
        def marks(call: Callable[..., Any]) -> int:
            before = bench.driver.calls["cuEventRecord"]
            call(*make_images(1), 0.25, 0.5)
            return bench.driver.calls["cuEventRecord"] - before

        with bench.open() as engine:
            assert (marks(engine.infer), marks(engine.infer_in_parts), marks(engine.infer)) == (
                2,
                5,
                2,
            )

    def test_errors_are_those_of_infer_with_a_fake_gpu(self, bench: Bench) -> None:
        with bench.open() as engine:
            with pytest.raises(InputError, match="a batch of 5, this model takes at most 4"):
                engine.infer_in_parts(*make_images(5), 0.25, 0.5)
            bench.plan.failures["execute"] = "enqueueV3: something odd"
            with pytest.raises(DeviceError, match=r"running failed \(enqueueV3: something odd\)"):
                engine.infer_in_parts(*make_images(1), 0.25, 0.5)
            assert engine.infer_in_parts(*make_images(1), 0.25, 0.5)[1].inference == pytest.approx(
                0.008
            )
        with pytest.raises(ToodError, match="was closed"):
            engine.infer_in_parts(*make_images(1), 0.25, 0.5)

    def test_only_timed_marks_that_were_passed_have_a_time_with_a_fake_gpu(
        self, bench: Bench
    ) -> None:
        with closing(Gpu()) as gpu, gpu.current(), ExitStack() as stack:
            stream, untimed = (
                stack.enter_context(closing(Stream())),
                stack.enter_context(closing(Event())),
            )
            first, second = (stack.enter_context(closing(Event(timed=True))) for _ in range(2))
            for event in (untimed, first, second):
                event.record(stream)
            with pytest.raises(
                CudaError, match="cuEventElapsedTime failed with CUDA_ERROR_NOT_READY"
            ):
                second.seconds_since(first)
            stream.synchronise()
            assert second.seconds_since(first) == 0
            with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_HANDLE"):
                second.seconds_since(untimed)


class TestThreads:
    @pytest.mark.parametrize("engines", [1, 2])
    def test_many_threads_with_a_fake_gpu(self, bench: Bench, engines: int) -> None:
        opened = [bench.open() for _ in range(engines)]
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for turn in range(10):
                    batch = make_images(1 + turn % 2, 100 * number + turn)
                    assert_answers(opened[number % engines].infer(*batch, 0.25, 0.5), *batch)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for engine in opened:
            engine.close()
        assert failures == []

    def test_the_callers_context_is_left_alone_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.driver.stack.append(0xAB)
        with bench.open() as engine:
            engine.infer(*make_images(1), 0.25, 0.5)
            assert bench.driver.stack == [0xAB]
        assert bench.driver.stack.pop() == 0xAB


class TestLifecycle:
    def test_closing_twice_and_use_after_with_a_fake_gpu(self, bench: Bench) -> None:
        engine = bench.open()
        ticket = engine.submit(*make_images(1), 0.25, 0.5)
        engine.close()
        engine.close()
        assert bench.driver.held() == {}
        for use in (
            lambda: engine.infer(*make_images(1), 0.25, 0.5),
            lambda: engine.collect(ticket),
        ):
            with pytest.raises(ToodError, match="was closed; open the model again"):
                use()

    def test_an_engine_nobody_closed_is_freed_with_it_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.open().infer(*make_images(1), 0.25, 0.5)
        gc.collect()
        assert bench.driver.held() == {}

    def test_opening_that_fails_anywhere_frees_everything_with_a_fake_gpu(
        self, bench: Bench
    ) -> None:
        """Every single call to CUDA while opening and at the first batch is made to fail once."""

        def attempt() -> None:
            with bench.open() as engine:
                engine.infer(*make_images(1), 0.25, 0.5)
                engine.infer(*make_images(1), 0.25, 0.5)

        attempt()
        counts = dict(bench.driver.calls)
        giving_back = ("Free", "Destroy", "Pop", "MemGetInfo")
        tried = 0
        for function, count in counts.items():
            if any(word in function for word in giving_back):
                continue
            for call in range(1, count + 1):
                bench.driver.fail(function, Status.CUDA_ERROR_LAUNCH_FAILED, call)
                with contextlib.suppress(DeviceError):  # a graph that cannot be recorded is none
                    attempt()
                assert bench.driver.held() == {}, (function, call)
                bench.driver.failures.clear()
                tried += 1
        assert tried > 30

    def test_ten_thousand_calls_hold_no_more_than_one_with_a_fake_gpu(self, bench: Bench) -> None:
        batch = make_images(1)
        with bench.open() as engine:
            engine.infer(*batch, 0.25, 0.5)
            held = bench.driver.held()
            for _ in range(10_000):
                engine.infer(*batch, 0.25, 0.5)
            assert bench.driver.held() == held
            assert bench.driver.calls["cuMemAlloc"] == 7
            bench.driver.history.clear()

    def test_a_failed_batch_leaves_the_engine_usable_with_a_fake_gpu(self, bench: Bench) -> None:
        batch = make_images(1)
        with bench.open() as engine:
            for _ in range(3):
                bench.plan.failures["execute"] = "enqueueV3: Error Code 1: Myelin (something odd)"
                with pytest.raises(
                    DeviceError,
                    match=r"running failed \(enqueueV3: .* Myelin \(something odd\)\); start the",
                ):
                    engine.infer(*make_images(2), 0.25, 0.5)
            assert_answers(engine.infer(*batch, 0.25, 0.5), *batch)


def test_the_profile_tuned_best_is_chosen() -> None:
    profiles = [
        OptimizationProfile((64, 64), 1, 1, 8),
        OptimizationProfile((64, 64), 1, 8, 8),
        OptimizationProfile((64, 96), 2, 4, 8),
    ]
    assert [choose_profile(profiles, (batch, 64, 64, 3)) for batch in (1, 4, 5, 8)] == [0, 0, 1, 1]
    assert choose_profile(profiles, (2, 64, 96, 3)) == 2
    with pytest.raises(InputError, match="a batch of 1 at 64 x 96, this engine takes 2 to 8"):
        choose_profile(profiles, (1, 64, 96, 3))
    with pytest.raises(InputError, match="takes 1 to 8 or 1 to 8"):
        choose_profile(profiles, (9, 64, 64, 3))
