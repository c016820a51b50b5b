"""The engines: one face, the same answers, clear refusals."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from engines.forked import in_a_fork
from onnx import TensorProto, helper

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import BatchDetections, Engine, open_engine
from tood_deploy.engines.onnx_engine import PROVIDERS
from tood_deploy.engines.open import VERIFY
from tood_deploy.errors import ArtefactError, ArtefactWarning, DeviceError, InputError, ToodError
from tood_deploy.manifest import manifest_path
from tood_deploy.matching import NetDetections, match_boxes

SIZES_HW = [(64, 64), (64, 320), (256, 96)]


@pytest.fixture(scope="module")
def engines(tiny_checkpoint: Path, tiny_artefact: Path) -> dict[str, Engine]:
    return {"torch": open_engine(tiny_checkpoint), "onnx": open_engine(tiny_artefact, threads=1)}


@pytest.fixture(params=["torch", "onnx"])
def engine(request: pytest.FixtureRequest, engines: dict[str, Engine]) -> Engine:
    return engines[request.param]


def rows(found: BatchDetections, image: int) -> NetDetections:
    count = int(found.num_dets[image])
    return NetDetections(
        found.boxes_net[image, :count], found.scores[image, :count], found.labels[image, :count]
    )


def test_shapes_types_and_order(engine: Engine) -> None:
    images = np.stack([synthetic_image(96, 128, seed) for seed in range(2)])
    found = engine.infer(images, np.array([[90, 128], [96, 100]], np.int32), 0.05, 0.6)
    assert [
        (array.shape, array.dtype.name)
        for array in (found.num_dets, found.boxes_net, found.scores, found.labels)
    ] == [((2,), "int32"), ((2, 100, 4), "float32"), ((2, 100), "float32"), ((2, 100), "int32")]
    for image in range(2):
        scores = rows(found, image).scores
        assert len(scores) > 10
        assert (scores > 0.05).all()
        assert (np.diff(scores) <= 0).all()
        assert not found.boxes_net[image, len(scores) :].any()


def test_thresholds_are_run_time_inputs(engine: Engine) -> None:
    image, size = synthetic_image(96, 128, 1)[None], np.array([[96, 128]], np.int32)
    many, few = (int(engine.infer(image, size, conf, 0.6).num_dets[0]) for conf in (0.02, 0.15))
    assert many > few > 0
    loose, strict = (int(engine.infer(image, size, 0.1, iou).num_dets[0]) for iou in (1.0, 0.2))
    assert loose > strict > 0
    assert engine.infer(image, size, 1.0, 0.6).num_dets[0] == 0


def test_what_lies_outside_the_image_does_not_matter(engine: Engine) -> None:
    image, size = synthetic_image(96, 128, 1)[None], np.array([[70, 101]], np.int32)
    other = image.copy()
    other[:, 70:] = 255
    other[:, :, 101:] = 13
    first, second = engine.infer(image, size, 0.05, 0.6), engine.infer(other, size, 0.05, 0.6)
    assert np.array_equal(first.boxes_net, second.boxes_net)
    assert np.array_equal(first.scores, second.scores)


@pytest.mark.parametrize("size_hw", SIZES_HW)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_runtimes_agree_at_every_size_and_batch(
    size_hw: tuple[int, int], batch: int, engines: dict[str, Engine]
) -> None:
    images = np.stack([synthetic_image(*size_hw, seed) for seed in range(batch)])
    sizes = np.array(
        [[size_hw[0] - seed, size_hw[1] - 3 * seed] for seed in range(batch)], np.int32
    )
    expected, found = (engines[name].infer(images, sizes, 0.03, 0.6) for name in ("torch", "onnx"))
    for image in range(batch):
        match = match_boxes(
            rows(expected, image),
            rows(found, image),
            min_iou=0,
            max_score_difference=1e-5,
            max_box_difference_px=0.05,
        ).counts
        assert match.exchanged <= 1
        assert match.reference > 3


@pytest.mark.parametrize(
    ("images", "sizes", "message"),
    [
        (
            np.zeros((1, 64, 64, 3), np.float32),
            np.array([[64, 64]], np.int32),
            r"float32 \(1, 64, 64, 3\); expected uint8",
        ),
        (
            np.zeros((1, 3, 64, 64), np.uint8),
            np.array([[64, 64]], np.int32),
            r"expected uint8 \(B, H, W, 3\)",
        ),
        (
            np.zeros((1, 60, 64, 3), np.uint8),
            np.array([[60, 64]], np.int32),
            "60 x 64; expected multiples of 32",
        ),
        (
            np.zeros((2, 64, 64, 3), np.uint8),
            np.array([[64, 64]], np.int32),
            r"valid_hw is int32 \(1, 2\); expected int32 \(2, 2\)",
        ),
        (np.zeros((0, 64, 64, 3), np.uint8), np.zeros((0, 2), np.int32), "expected uint8"),
    ],
)
def test_wrong_inputs_are_named(
    images: np.ndarray, sizes: np.ndarray, message: str, engine: Engine
) -> None:
    with pytest.raises(InputError, match=message):
        engine.infer(images, sizes, 0.05, 0.6)


def test_closed_engine_says_so(tiny_artefact: Path) -> None:
    with open_engine(tiny_artefact) as engine:
        pass
    engine.close()
    with pytest.raises(ToodError, match="was closed"):
        engine.infer(np.zeros((1, 64, 64, 3), np.uint8), np.array([[64, 64]], np.int32), 0.05, 0.6)


class TestOpening:
    def test_no_such_file(self) -> None:
        with pytest.raises(ToodError, match=r"nothing\.onnx: no such file.*r50-1x"):
            open_engine("nothing.onnx")

    def test_unknown_kind(self, tmp_path: Path) -> None:
        (tmp_path / "model.tflite").write_bytes(b"x")
        with pytest.raises(ToodError, match=r"ending in \.tflite is not a model.*\.onnx"):
            open_engine(tmp_path / "model.tflite")

    def test_unknown_device(self, tiny_artefact: Path) -> None:
        with pytest.raises(ToodError, match="device is 'tpu'; expected cpu or cuda"):
            open_engine(tiny_artefact, device="tpu")

    @pytest.mark.skipif(
        PROVIDERS["cuda"] in onnxruntime.get_available_providers(), reason="CUDA is there"
    )
    def test_absent_gpu_is_an_error_in_onnx_runtime(self, tiny_artefact: Path) -> None:
        with pytest.raises(DeviceError, match="CUDAExecutionProvider"):
            open_engine(tiny_artefact, device="cuda")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
    def test_absent_gpu_is_an_error_in_pytorch(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(DeviceError, match="cuda is not there"):
            open_engine(tiny_checkpoint, device="cuda")

    def test_provider_that_does_not_start_is_an_error(
        self, tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A build with the CUDA provider on a machine without CUDA.

        ONNX Runtime itself would fall back in silence.
        """
        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values())
        )
        with (
            pytest.warns(UserWarning, match="CUDAExecutionProvider"),
            pytest.raises(DeviceError, match="could not start"),
        ):
            open_engine(tiny_artefact, device="cuda")

    @pytest.mark.parametrize("threads", [0, -2])
    def test_senseless_threads(
        self, threads: int, engine: Engine, tiny_checkpoint: Path, tiny_artefact: Path
    ) -> None:
        path = tiny_artefact if "ONNX" in engine.name else tiny_checkpoint
        with pytest.raises(ToodError, match=f"threads is {threads}"):
            open_engine(path, threads=threads)


class TestForeignFiles:
    def test_onnx_of_somebody_else(self, tmp_path: Path) -> None:
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        node = helper.make_node("Relu", ["x"], ["y"])
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
        model = helper.make_model(
            helper.make_graph([node], "g", [value], [output]),
            opset_imports=[helper.make_opsetid("", 21)],
        )
        model.ir_version = 10
        onnx.save(model, tmp_path / "theirs.onnx")
        with pytest.raises(
            ArtefactError, match=r"not one of tood_deploy.*inputs \['x'\].*tood-export"
        ):
            open_engine(tmp_path / "theirs.onnx")

    def test_cut_file(self, tiny_artefact: Path, tmp_path: Path) -> None:
        (tmp_path / "cut.onnx").write_bytes(tiny_artefact.read_bytes()[:100_000])
        with pytest.raises(ArtefactError, match=r"cut\.onnx: ONNX Runtime cannot open it"):
            open_engine(tmp_path / "cut.onnx")

    def test_manifest_of_another_version(self, tiny_artefact: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copy(tiny_artefact, tmp_path / "model.onnx"))
        manifest_path(copy).write_text(
            manifest_path(tiny_artefact).read_text().replace('"format": 1', '"format": 7')
        )
        with pytest.raises(
            ArtefactError, match="manifest of format 7, this version reads format 1"
        ):
            open_engine(copy)

    @pytest.mark.parametrize(
        "text",
        ["", "[]", "{}", '{"format": 1, "preset": {"name": "x"}}', '{"format": 1, "preset": 5}'],
    )
    def test_damaged_manifest(self, text: str, tiny_artefact: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copy(tiny_artefact, tmp_path / "model.onnx"))
        manifest_path(copy).write_text(text)
        with pytest.raises(ArtefactError, match="not a manifest"):
            open_engine(copy)

    def test_without_manifest_the_file_tells_itself(
        self, tiny_artefact: Path, tmp_path: Path
    ) -> None:
        copy = shutil.copy(tiny_artefact, tmp_path / "model.onnx")
        assert open_engine(copy).manifest.preset == open_engine(tiny_artefact).manifest.preset


def test_one_of_several_networks_in_a_checkpoint_opens(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from tood_deploy.model import load_checkpoint

    state = load_checkpoint(tiny_checkpoint).state_dict()
    torch.save({"model": state, "model_ema": state}, tmp_path / "a.pth")
    with open_engine(tmp_path / "a.pth", preset="tiny", weights_key="ema") as engine:
        assert engine.manifest.preset.num_classes == 80


class TestVerify:
    """An artefact against the SHA-256 in the manifest beside it."""

    @pytest.fixture
    def replaced(self, tiny_artefact: Path, tmp_path: Path) -> Path:
        path = tmp_path / "replaced.onnx"
        shutil.copy(tiny_artefact, path)
        content = json.loads(manifest_path(tiny_artefact).read_text())
        manifest_path(path).write_text(json.dumps(content | {"artefact_sha256": "0" * 64}))
        return path

    def test_another_file_is_warned_of_once(self, replaced: Path) -> None:
        with pytest.warns(ArtefactWarning, match="another SHA-256") as warned:
            open_engine(replaced).close()
        assert len(warned) == 1
        assert warned[0].filename == __file__
        open_engine(replaced).close()  # where a warning is an error

    def test_another_file_is_refused_or_not_looked_at(self, replaced: Path) -> None:
        with pytest.raises(ArtefactError, match="another SHA-256"):
            open_engine(replaced, verify="strict")
        with warnings.catch_warnings(action="error"):
            open_engine(replaced, verify="off").close()

    def test_the_right_file_opens(self, tiny_artefact: Path) -> None:
        for verify in VERIFY:
            open_engine(tiny_artefact, verify=verify).close()

    def test_without_a_manifest_strict_has_nothing_to_go_by(
        self, tiny_artefact: Path, tmp_path: Path
    ) -> None:
        alone = Path(shutil.copy(tiny_artefact, tmp_path / "alone.onnx"))
        open_engine(alone).close()
        with pytest.raises(ArtefactError, match="no SHA-256 to compare"):
            open_engine(alone, verify="strict")

    def test_a_checkpoint_cannot_be_strict(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(ToodError, match="has no manifest"):
            open_engine(tiny_checkpoint, verify="strict")
        with pytest.raises(ToodError, match="verify is 'maybe'"):
            open_engine(tiny_checkpoint, verify="maybe")  # type: ignore[arg-type]


class TestFork:
    """DataLoader and multiprocessing fork on Linux."""

    def test_a_runtime_whose_threads_stay_behind_says_so(self, tiny_checkpoint: Path) -> None:
        engine = open_engine(tiny_checkpoint)
        assert "before this process was forked" in in_a_fork(engine)
        engine.close()

    def test_onnx_runtime_runs_on(self, tiny_artefact: Path) -> None:
        with open_engine(tiny_artefact, threads=2) as engine:
            assert in_a_fork(engine).endswith("objects")

    def test_but_not_with_callers_of_its_own(self, tiny_artefact: Path) -> None:
        with open_engine(tiny_artefact, threads=2, hint="throughput") as engine:
            assert "before this process was forked" in in_a_fork(engine)
