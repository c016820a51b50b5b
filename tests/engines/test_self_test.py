"""The stored image must give the stored answer; the stored answer survives JSON."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from manifest_values import changed, plain

from tood_deploy.engines import BatchDetections, Engine, open_engine
from tood_deploy.engines import self_test as module
from tood_deploy.engines.self_test import (
    MAX_DETECTIONS,
    MIN_DETECTIONS,
    Golden,
    GoldenCase,
    check_self_test,
    self_test_from,
    tolerance_of,
)
from tood_deploy.errors import ArtefactError
from tood_deploy.manifest import Manifest, manifest_path, read_manifest
from tood_deploy.manifest_sections import SelfTest, SelfTestCase
from tood_deploy.matching import NetDetections
from tood_deploy.model import FusedDetector, load_checkpoint
from tood_deploy.parity.tolerances import LOW_PRECISION, SAME_FLOAT32, SAME_INT8, SAME_TF32
from tood_deploy.parity.torch_reference import TorchRunner
from tood_deploy.presets import PRESETS

Change = Callable[[BatchDetections], object]
CANVASES = ((160, 224), (64, 96))


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> TorchRunner:
    return TorchRunner(FusedDetector(load_checkpoint(tiny_checkpoint)))


@pytest.fixture(scope="module")
def artefact(
    tiny_artefact: Path, reference: TorchRunner, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny_artefact` with a self-test for canvases of its own."""
    path = tmp_path_factory.mktemp("golden") / "tiny.onnx"
    shutil.copy(tiny_artefact, path)
    manifest = read_manifest(tiny_artefact)
    assert manifest is not None
    manifest_path(path).write_text(
        replace(manifest, self_test=self_test_from(reference, CANVASES)).to_json()
    )
    return path


@pytest.fixture(autouse=True)
def fresh_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TOOD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Recited(Engine):
    """Gives the stored answers back, changed if so asked, and counts its calls."""

    def __init__(
        self,
        artefact: Path,
        change: Change | None = None,
        slots: int | None = None,
        precision: str = "fp32",
    ) -> None:
        manifest = read_manifest(artefact)
        assert manifest is not None
        stored = manifest.self_test
        assert stored is not None
        self.manifest, self.change, self.max_batch = (
            replace(manifest, precision=precision),
            change,
            slots,
        )
        self.device, self.name = "cpu", "recited 1.0"
        self.golden = Golden.from_manifest(stored, "stored")
        self.calls: list[tuple[int, ...]] = []

    def _run(
        self, images: np.ndarray, valid_hw: np.ndarray, score_threshold: float, iou_threshold: float
    ) -> BatchDetections:
        self.calls.append(images.shape)
        batch = len(images)
        found = BatchDetections(
            np.zeros(batch, np.int32),
            np.zeros((batch, 100, 4), np.float32),
            np.zeros((batch, 100), np.float32),
            np.zeros((batch, 100), np.int32),
        )
        rows = next(case.expected for case in self.golden.cases if case.net_hw == images.shape[1:3])
        found.num_dets[:] = len(rows)
        (
            found.boxes_net[:, : len(rows)],
            found.scores[:, : len(rows)],
            found.labels[:, : len(rows)],
        ) = rows.boxes, rows.scores, rows.labels
        if self.change is not None:
            self.change(found)
        return found


class TestMaking:
    def test_answers_lie_in_a_gap_between_the_scores(self, reference: TorchRunner) -> None:
        golden = Golden.from_manifest(self_test_from(reference), "made")
        (case,) = golden.cases
        assert MIN_DETECTIONS <= len(case.expected) <= MAX_DETECTIONS
        everything = reference(*golden.inputs(case.net_hw), 0.0, golden.iou_threshold)[2][0]
        assert (
            everything[len(case.expected) - 1]
            == case.expected.scores[-1]
            > case.score_threshold
            > everything[len(case.expected)]
        )
        assert golden.reference.startswith("PyTorch")

    def test_each_canvas_has_an_answer_of_its_own(self, reference: TorchRunner) -> None:
        golden = Golden.from_manifest(self_test_from(reference, CANVASES), "made")
        assert [case.net_hw for case in golden.cases] == [*CANVASES]
        assert golden.image.shape == (54, 82, 3)  # fits the smallest, with room for padding
        first, second = (case.expected for case in golden.cases)
        assert len(first) != len(second) or not np.allclose(first.scores, second.scores, atol=1e-3)

    def test_a_network_that_finds_little_has_a_small_answer(self) -> None:
        class Blind:
            name = "blind"

            def __call__(
                self,
                images: np.ndarray,
                valid_hw: np.ndarray,
                score_threshold: float,
                iou_threshold: float,
            ) -> list[np.ndarray]:
                return [
                    np.zeros(1, np.int32),
                    np.zeros((1, 5, 4), np.float32),
                    np.zeros((1, 5), np.float32),
                    np.zeros((1, 5), np.int32),
                ]

        assert self_test_from(Blind()).cases[0].boxes == ()

    def test_stays_small_beside_the_manifest(self, reference: TorchRunner) -> None:
        assert len(self_test_from(reference).image_png) < 16_000


class TestOutcome:
    def test_the_stored_answer_passes_alone_and_in_every_slot(self, artefact: Path) -> None:
        engine = Recited(artefact, slots=5)
        check_self_test(engine, artefact)
        assert engine.calls == [(batch, *hw, 3) for hw in CANVASES for batch in (1, 5)]

    def test_a_real_engine_passes(self, artefact: Path) -> None:
        open_engine(artefact, threads=1).close()

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            (lambda found: found.boxes_net.__iadd__(3), "overlaps go down to"),
            (lambda found: found.scores.__imul__(1.01), r"scores are off by up to 0\.01 "),
            (lambda found: found.labels.__iadd__(1), " 0 came again"),
            (lambda found: found.num_dets.__isub__(6), "came in all"),
        ],
    )
    @pytest.mark.parametrize("slot", [0, 2])
    def test_a_wrong_answer_in_one_slot_names_deviation_and_remedy(
        self, change: Change, word: str, slot: int, artefact: Path
    ) -> None:
        def in_slot(found: BatchDetections) -> None:
            if slot < len(found.num_dets):
                change(BatchDetections(*(array[slot : slot + 1] for array in vars(found).values())))

        message = rf"in recited 1\.0, fp32 on cpu.*{word}.*slot {slot + 1} of.*--no-self-test"
        with pytest.raises(ArtefactError, match=message):
            check_self_test(Recited(artefact, in_slot), artefact)

    def test_lower_precision_may_be_further_off_but_not_wrong(self, artefact: Path) -> None:
        def coarse(found: BatchDetections) -> None:
            found.scores[:] *= 0.97
            found.boxes_net[:] += 0.3

        with pytest.raises(ArtefactError):
            check_self_test(Recited(artefact, coarse), artefact)
        check_self_test(Recited(artefact, coarse, precision="bf16"), artefact)
        with pytest.raises(ArtefactError, match="int8 on cpu"):
            check_self_test(
                Recited(artefact, lambda found: found.boxes_net.__imul__(2), precision="int8"),
                artefact,
            )

    def test_tolerances_by_precision_and_device(self, artefact: Path) -> None:
        engine = Recited(artefact)
        assert tolerance_of(engine) == SAME_FLOAT32
        engine.device = "cuda"
        assert tolerance_of(engine) == SAME_TF32
        engine.manifest = replace(engine.manifest, precision="int8")
        assert tolerance_of(engine) == LOW_PRECISION
        engine.device = "cpu"
        assert tolerance_of(engine, "another runtime 1.0, CPU") == LOW_PRECISION
        assert tolerance_of(engine, f"{engine.name}, CPU") == SAME_INT8

    @pytest.mark.parametrize(
        ("scheme", "refused"), [("u8s8", True), ("s8s8", True), ("u8s7", False)]
    )
    def test_8_bit_weights_are_refused_where_sums_saturate(
        self, scheme: str, refused: bool, artefact: Path
    ) -> None:
        engine = Recited(artefact, precision="int8")
        engine.manifest = changed(engine.manifest, options={"int8": {"scheme": scheme}})
        check_self_test(engine, artefact)
        engine.saturates = lambda: True
        engine.name = "saturating"
        if not refused:
            check_self_test(engine, artefact)
            return
        with pytest.raises(ArtefactError, match="--target-cpu portable"):
            check_self_test(engine, artefact)

    def test_no_answer_for_the_engines_sizes(self, artefact: Path) -> None:
        engine = Recited(artefact)
        engine.input_shapes_hw = ((320, 320),)
        with pytest.raises(
            ArtefactError, match=r"no answer for any of its input sizes \(\(320, 320\),\)"
        ):
            check_self_test(engine, artefact)

    def test_sizes_that_the_engine_does_not_take_are_left_out(self, artefact: Path) -> None:
        engine = Recited(artefact)
        engine.input_shapes_hw = (CANVASES[1],)
        check_self_test(engine, artefact)
        assert {shape[1:3] for shape in engine.calls} == {CANVASES[1]}

    def test_without_one_nothing_runs(self, artefact: Path, fresh_home: Path) -> None:
        engine = Recited(artefact)
        engine.manifest = Manifest(PRESETS["tiny"])
        check_self_test(engine, artefact)
        assert not engine.calls
        assert not fresh_home.exists()


class TestMemory:
    def test_a_pass_is_kept(self, artefact: Path) -> None:
        check_self_test(Recited(artefact), artefact)
        again = Recited(artefact)
        check_self_test(again, artefact)
        assert not again.calls

    @pytest.mark.parametrize(
        "what", ["name", "device", "loaded_from", "precision", "self_test", "artefact", "machine"]
    )
    def test_other_circumstances_run_it_again(
        self, what: str, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        check_self_test(Recited(artefact), artefact)
        again, path = Recited(artefact), artefact
        if what in ("name", "device", "loaded_from"):
            setattr(again, what, "other")
        elif what == "machine":
            monkeypatch.setattr(module.platform, "node", lambda: "another")
        elif what == "artefact":
            path = tmp_path / "tiny.onnx"
            path.write_bytes(artefact.read_bytes() + b" ")
        else:
            fields = (
                {"precision": "bf16"}
                if what == "precision"
                else {"self_test": plain(again.manifest)["self_test"] | {"reference": "another"}}
            )
            again.manifest = changed(again.manifest, **fields)
        check_self_test(again, path)
        assert again.calls

    def test_a_failure_is_not_kept(self, artefact: Path) -> None:
        for _ in range(2):
            with pytest.raises(ArtefactError):
                check_self_test(
                    Recited(artefact, lambda found: found.scores.__imul__(0.5)), artefact
                )

    def test_where_nothing_can_be_kept_it_runs_every_time(
        self, artefact: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TOOD_HOME", "/proc/nowhere")
        for _ in range(2):
            engine = Recited(artefact)
            check_self_test(engine, artefact)
            assert engine.calls


class TestOpening:
    @pytest.fixture
    def broken(self, artefact: Path, tmp_path: Path) -> Path:
        """Another network under the same manifest, as after a wrong build."""
        model = onnx.load(artefact)
        for value in model.graph.initializer:
            if "tood_cls.bias" in value.name:
                value.CopyFrom(
                    onnx.numpy_helper.from_array(
                        onnx.numpy_helper.to_array(value) + np.float32(0.5), value.name
                    )
                )
        path = tmp_path / "broken.onnx"
        onnx.save(model, path)
        shutil.copy(manifest_path(artefact), manifest_path(path))
        return path

    def test_a_broken_artefact_is_refused_and_closed(
        self, broken: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed = []
        monkeypatch.setattr(
            "tood_deploy.engines.onnx_engine.OnnxEngine.close", lambda self: closed.append(self)
        )
        with pytest.raises(
            ArtefactError, match=r"broken\.onnx: fails its self-test in ONNX Runtime"
        ):
            open_engine(broken, threads=1, verify="off")
        assert len(closed) == 1

    def test_unless_asked_not_to_look(self, broken: Path, fresh_home: Path) -> None:
        open_engine(broken, threads=1, self_test=False, verify="off").close()
        assert not fresh_home.exists()


RNG = np.random.default_rng(7)


@pytest.fixture
def golden() -> Golden:
    rows = NetDetections(
        RNG.random((3, 4), np.float32) * 100,
        RNG.random(3, np.float32),
        np.array([0, 5, 79], np.int32),
    )
    nothing = NetDetections(
        np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)
    )
    image = RNG.integers(0, 256, (21, 33, 3)).astype(np.uint8)
    return Golden(
        image,
        0.6,
        "PyTorch",
        (GoldenCase((32, 64), 0.25, rows), GoldenCase((64, 64), 0.0, nothing)),
    )


def test_json_keeps_every_bit(golden: Golden) -> None:
    stored = SelfTest.from_dict(json.loads(json.dumps(golden.for_manifest().to_dict())))
    again = Golden.from_manifest(stored, "a.onnx")
    assert np.array_equal(again.image, golden.image)
    assert (again.iou_threshold, again.reference) == (0.6, "PyTorch")
    for old, new in zip(golden.cases, again.cases, strict=True):
        assert (old.net_hw, old.score_threshold) == (new.net_hw, new.score_threshold)
        for name in ("boxes", "scores", "labels"):
            before, after = getattr(old.expected, name), getattr(new.expected, name)
            assert before.dtype == after.dtype
            assert np.array_equal(before, after)


def test_the_image_lies_in_every_slot(golden: Golden) -> None:
    images, valid_hw = golden.inputs((64, 96), batch=3)
    assert images.shape == (3, 64, 96, 3)
    assert valid_hw.tolist() == [[21, 33]] * 3
    for image in images:
        assert np.array_equal(image[:21, :33], golden.image)
        assert image.sum() == golden.image.sum(dtype=int)


@pytest.mark.parametrize(
    "damage",
    [
        {"image_png": "?"},
        {"image_png": "aGFsbG8="},
        {"cases": (SelfTestCase((32, 64), 0.0, ((1.0, 2.0),), (1.0,), (1,)),)},
    ],
)
def test_damage_is_one_clear_line(damage: dict[str, Any], golden: Golden) -> None:
    with pytest.raises(
        ArtefactError,
        match=r"a\.onnx: the self-test in its manifest is damaged.*export the model again",
    ):
        Golden.from_manifest(replace(golden.for_manifest(), **damage), "a.onnx")
