"""OpenVINO: the answers of every engine, in the precision that was asked for; clear refusals."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from engines.forked import in_a_fork
from export.small_graph import save_small
from manifest_values import changed
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import BatchDetections, Engine, open_engine
from tood_deploy.engines.openvino_engine import CompiledShape, CompiledShapes, OpenVinoEngine
from tood_deploy.engines.openvino_runtime import shared_core
from tood_deploy.errors import ArtefactError, DeviceError, InputError, OutputError, ToodError
from tood_deploy.manifest import Manifest, manifest_path, read_manifest
from tood_deploy.matching import NetDetections, match_boxes, split_batch
from tood_deploy.onnx_file import read_onnx

HAS_BF16 = "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 instructions")
SIZES_HW = [(64, 64), (64, 320), (256, 96)]
Inputs = tuple[NDArray[np.uint8], NDArray[np.int32]]


def inputs(batch: int = 1, size_hw: tuple[int, int] = (96, 128), seed: int = 0) -> Inputs:
    images = np.stack([synthetic_image(*size_hw, seed + i) for i in range(batch)])
    return images, np.array([[size_hw[0] - i, size_hw[1] - 3 * i] for i in range(batch)], np.int32)


def rows(found: BatchDetections, image: int = 0) -> NetDetections:
    return split_batch((found.num_dets, found.boxes_net, found.scores, found.labels))[image]


@pytest.fixture(scope="module")
def ir(tiny_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefact as OpenVINO's own format."""
    path = tmp_path_factory.mktemp("ir") / "tiny.xml"
    openvino.save_model(shared_core().read_model(tiny_artefact), path, compress_to_fp16=False)
    manifest = read_manifest(tiny_artefact)
    assert manifest is not None
    manifest_path(path).write_text(manifest.with_artefact(path).to_json())
    return path


@pytest.fixture(scope="module")
def small_ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of one convolution, which is compiled in a moment; `dark` has inputs for it."""
    source = save_small(tmp_path_factory.mktemp("small") / "source.onnx")
    path = source.with_name("small.xml")
    openvino.save_model(shared_core().read_model(source), path, compress_to_fp16=False)
    for artefact in (source, path):
        manifest = read_onnx(source).manifest.with_artefact(artefact)
        manifest_path(artefact).write_text(manifest.to_json())
    return path


def dark(size_hw: tuple[int, int] = (64, 64)) -> Inputs:
    """An image for `small_ir`, which names a class by the image's mean and its size."""
    return np.zeros((1, *size_hw, 3), np.uint8), np.array([size_hw], np.int32)


@pytest.fixture(scope="module")
def onnx_runtime(tiny_artefact: Path) -> Engine:
    return open_engine(tiny_artefact, threads=1)


@pytest.fixture(scope="module")
def engine(ir: Path) -> OpenVinoEngine:
    return OpenVinoEngine(ir, threads=1)


@pytest.fixture(scope="module")
def wide(ir: Path) -> OpenVinoEngine:
    """For several batches at a time."""
    return OpenVinoEngine(ir, hint="throughput", threads=2)


def described(artefact: Path, target: Path, **fields: object) -> Path:
    """A copy of an artefact with a manifest that says something else."""
    shutil.copy(artefact, target)
    manifest = read_manifest(artefact)
    assert manifest is not None
    manifest_path(target).write_text(changed(manifest, **fields).to_json())
    return target


class TestAnswers:
    @pytest.mark.parametrize("size_hw", SIZES_HW)
    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_are_onnx_runtimes_at_every_size_and_batch(
        self, size_hw: tuple[int, int], batch: int, engine: OpenVinoEngine, onnx_runtime: Engine
    ) -> None:
        expected, found = (
            each.infer(*inputs(batch, size_hw), 0.03, 0.6) for each in (onnx_runtime, engine)
        )
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

    def test_types_are_those_of_every_engine(self, engine: OpenVinoEngine) -> None:
        found = engine.infer(*inputs(2), 0.05, 0.6)
        assert [(array.shape, array.dtype.name) for array in vars(found).values()] == [
            ((2,), "int32"),
            ((2, 100, 4), "float32"),
            ((2, 100), "float32"),
            ((2, 100), "int32"),
        ]

    def test_onnx_and_ir_are_the_same(self, engine: OpenVinoEngine, tiny_artefact: Path) -> None:
        with open_engine(tiny_artefact, runtime="openvino", threads=1) as other:
            assert isinstance(other, OpenVinoEngine)
            assert np.array_equal(
                other.infer(*inputs(), 0.05, 0.6).scores, engine.infer(*inputs(), 0.05, 0.6).scores
            )

    def test_stay_valid_after_the_next_inference(self, engine: OpenVinoEngine) -> None:
        first = engine.infer(*inputs(seed=1), 0.05, 0.6)
        kept = [array.copy() for array in vars(first).values()]
        engine.infer(*inputs(seed=2), 0.05, 0.6)
        for before, after in zip(kept, vars(first).values(), strict=True):
            assert np.array_equal(before, after)

    def test_images_may_lie_anyhow_in_memory(self, engine: OpenVinoEngine) -> None:
        images, valid_hw = inputs()
        mirrored = np.ascontiguousarray(images[:, :, ::-1])[:, :, ::-1]
        assert not mirrored.flags.c_contiguous
        assert np.array_equal(
            engine.infer(mirrored, valid_hw, 0.05, 0.6).scores,
            engine.infer(images, valid_hw, 0.05, 0.6).scores,
        )


class TestPrecision:
    def test_is_float32_unless_asked(self, engine: OpenVinoEngine) -> None:
        assert engine.precision == "fp32"

    @needs_bf16
    def test_bf16_is_near_and_not_the_same(self, engine: OpenVinoEngine, ir: Path) -> None:
        """Both come from one cached file: the precision must not come with it."""
        with OpenVinoEngine(ir, threads=1, precision="bf16") as coarse:
            assert coarse.precision == "bf16"
            fine, found = (rows(each.infer(*inputs(), 0.05, 0.6)) for each in (engine, coarse))
        pairs = match_boxes(fine, found).pairs
        assert len(pairs) > 0.8 * len(fine)
        assert 1e-5 < np.abs(fine.scores[pairs[:, 0]] - found.scores[pairs[:, 1]]).max() < 0.1

    @needs_bf16
    @pytest.mark.parametrize(
        ("own", "rest", "asked", "runs"),
        [
            ("bf16", None, None, "bf16"),
            ("bf16", None, "fp32", "bf16, fp32"),
            ("int8", None, None, "int8"),
            ("int8", "bf16", None, "int8, bf16"),
            ("int8", "bf16", "fp32", "int8"),
            ("fp16", None, None, "fp16"),
            ("fp32", None, "bf16", "bf16"),
        ],
    )
    def test_is_the_manifests_unless_asked(
        self,
        own: str,
        rest: str | None,
        asked: str | None,
        runs: str,
        small_ir: Path,
        tmp_path: Path,
    ) -> None:
        path = described(
            small_ir.with_name("source.onnx"),
            tmp_path / "a.onnx",
            precision=own,
            options={"rest": rest} if rest else {},
        )
        with open_engine(
            path, runtime="openvino", threads=1, self_test=False, precision=asked
        ) as engine:
            assert engine.precision == runs

    def test_that_the_cpu_lacks_is_an_error(
        self, small_ir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stand-in for a CPU without bf16: OpenVINO itself would run in float32 in silence."""
        asked = openvino.Core.get_property

        def without_bf16(self: openvino.Core, device: str, name: str) -> object:
            return ["FP32"] if name == "OPTIMIZATION_CAPABILITIES" else asked(self, device, name)

        monkeypatch.setattr(openvino.Core, "get_property", without_bf16)
        with pytest.raises(
            DeviceError,
            match=r"bf16 is not there: this CPU \(.+\) has no bf16 instructions; use fp32",
        ):
            OpenVinoEngine(small_ir, precision="bf16")


class TestBatchesSideBySide:
    def test_hints_say_how_many(self, engine: OpenVinoEngine, wide: OpenVinoEngine) -> None:
        assert engine.in_flight == 1
        assert wide.in_flight == 2

    def test_are_collected_in_any_order(self, wide: OpenVinoEngine, engine: OpenVinoEngine) -> None:
        tickets = [wide.submit(*inputs(seed=seed), 0.05, 0.6) for seed in range(5)]
        for seed in (3, 0, 4, 1, 2):
            assert np.array_equal(
                wide.collect(tickets[seed]).scores,
                engine.infer(*inputs(seed=seed), 0.05, 0.6).scores,
            )

    def test_of_several_threads_do_not_mix(
        self, wide: OpenVinoEngine, engine: OpenVinoEngine
    ) -> None:
        expected = [engine.infer(*inputs(seed=seed), 0.05, 0.6).scores for seed in range(3)]
        same: list[bool] = []

        def work(seed: int) -> None:
            same.extend(
                np.array_equal(wide.infer(*inputs(seed=seed), 0.05, 0.6).scores, expected[seed])
                for _ in range(5)
            )

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert same == [True] * 15

    def test_wrong_inputs_are_refused_before_they_start(self, wide: OpenVinoEngine) -> None:
        with pytest.raises(InputError, match="expected multiples of 32"):
            wide.submit(
                np.zeros((1, 60, 64, 3), np.uint8), np.array([[60, 64]], np.int32), 0.05, 0.6
            )


class TestFormsOfTheirOwn:
    @pytest.fixture
    def compiled(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
        """The shapes that a form was compiled for."""
        shapes: list[tuple[int, ...]] = []
        compile_for = CompiledShapes._compile_for

        def noted(self: CompiledShapes, shape: tuple[int, ...]) -> object:
            shapes.append(shape)
            return compile_for(self, shape)

        monkeypatch.setattr(CompiledShapes, "_compile_for", noted)
        return shapes

    def test_come_after_some_calls_of_a_shape_and_change_nothing(
        self, ir: Path, engine: OpenVinoEngine, compiled: list[tuple[int, ...]]
    ) -> None:
        with OpenVinoEngine(ir, threads=1, calls_before_static=2) as own:
            found = [own.infer(*inputs(), 0.05, 0.6) for _ in range(2)]
            assert not compiled
            found.append(own.infer(*inputs(), 0.05, 0.6))
            own.settle(1, (96, 128))
            found.append(own.infer(*inputs(), 0.05, 0.6))
            own.infer(*inputs(size_hw=(64, 64)), 0.05, 0.6)
        assert compiled == [(1, 96, 128, 3)]
        expected = rows(engine.infer(*inputs(), 0.05, 0.6))
        for each in found:
            assert (
                match_boxes(
                    expected,
                    rows(each),
                    min_iou=0,
                    max_score_difference=1e-5,
                    max_box_difference_px=0.05,
                ).counts.exchanged
                <= 1
            )

    def test_are_made_beside_the_work_and_used_once_they_are_there(
        self, small_ir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        may_compile, compile_for, used = threading.Event(), CompiledShapes._compile_for, []
        submit = CompiledShape.submit
        monkeypatch.setattr(
            CompiledShapes,
            "_compile_for",
            lambda self, shape: may_compile.wait(60) and compile_for(self, shape),
        )
        monkeypatch.setattr(
            CompiledShape, "submit", lambda self, values: used.append(self) or submit(self, values)
        )
        with OpenVinoEngine(small_ir, threads=1, calls_before_static=1) as own:
            for _ in range(3):
                own.infer(*dark(), 0.05, 0.6)
            assert len(set(used)) == 1
            may_compile.set()
            own.settle(1, (64, 64))
            own.infer(*dark(), 0.05, 0.6)
        assert used[-1].compiled.inputs[0].partial_shape.is_static
        assert not used[0].compiled.inputs[0].partial_shape.is_static

    def test_are_few_and_the_oldest_goes(
        self, small_ir: Path, compiled: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tood_deploy.engines.openvino_engine.MAX_STATIC_SHAPES", 1)
        with OpenVinoEngine(small_ir, threads=1, calls_before_static=0) as own:
            for width in (32, 64, 64, 32):
                own.infer(*dark((32, width)), 0.05, 0.6)
        assert [shape[2] for shape in compiled] == [32, 64, 32]

    def test_that_give_other_answers_are_refused(
        self, ir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Scores are halved on the way, as a stand-in for a model that is compiled wrongly."""
        collect = CompiledShape.collect

        def halved(self: CompiledShape, ticket: Any) -> Any:
            found = collect(self, ticket)
            static = self.compiled.inputs[0].partial_shape.is_static
            return [found[0], found[1], found[2] / 2, found[3]] if static else found

        monkeypatch.setattr(CompiledShape, "collect", halved)
        with OpenVinoEngine(ir, threads=1, calls_before_static=0) as engine:
            message = (
                r"for the shape \(1, 96, 128, 3\) OpenVINO gives another answer .*update openvino"
            )
            with pytest.raises(ArtefactError, match=message):
                engine.infer(*inputs(), 0.05, 0.6)

    def test_are_not_for_large_networks(
        self, small_ir: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[tuple[int, ...]]
    ) -> None:
        monkeypatch.setattr("tood_deploy.engines.openvino_engine.MAX_STATIC_BYTES", 100)
        monkeypatch.setattr("tood_deploy.engines.openvino_engine.CALLS_BEFORE_STATIC", 0)
        with OpenVinoEngine(small_ir, threads=1) as own:
            own.infer(*dark((32, 32)), 0.05, 0.6)
        assert not compiled


SIGNALLED = """
import gc, signal, sys
from pathlib import Path
from tood_deploy.engines.openvino_engine import OpenVinoEngine

first, second = (OpenVinoEngine(Path(sys.argv[1]), threads=1, cache=False) for _ in range(2))
for name in ("first", "second"):
    globals().pop(name).close()
    gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_engines_that_ended_in_the_order_they_began(small_ir: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(small_ir)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "interrupted\n"), run.stderr


KEPT_STREAM = """
import sys
import numpy as np
from inference.fakes import moving_images, write_video
from tood_deploy import Detector

video = write_video(sys.argv[2], moving_images(24) * 20)
stream = Detector(sys.argv[1], threads=2, imgsz=(64, 64), cache=False).stream(video)
next(stream)
sys.modules["kept"] = stream  # outlives all that Python takes down
print("ends")
"""


def test_a_stream_that_is_still_open_at_the_end_of_the_process(ir: Path, tmp_path: Path) -> None:
    """Its threads end first: within a library they would abort the process."""
    run = subprocess.run(
        [sys.executable, "-c", KEPT_STREAM, str(ir), str(tmp_path / "v.mp4")],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", "..", *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "ends\n", "")


def test_a_forked_process_is_told_to_open_its_own(small_ir: Path) -> None:
    with OpenVinoEngine(small_ir, threads=1, cache=False) as engine:
        assert "before this process was forked" in in_a_fork(engine)


class TestCache:
    def test_is_used_where_asked(self, small_ir: Path, tmp_path: Path) -> None:
        made = []
        for _ in range(2):
            with OpenVinoEngine(small_ir, threads=1, cache=tmp_path) as engine:
                made.append(engine.loaded_from)
        assert made == ["artefact", "cache"]
        with OpenVinoEngine(small_ir, threads=1, cache=False) as engine:
            assert engine.loaded_from == "artefact"

    def test_lies_in_our_home_unless_asked(
        self, small_ir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TOOD_HOME", str(tmp_path))
        OpenVinoEngine(small_ir, threads=1).close()
        assert len(list((tmp_path / "openvino" / "fp32").iterdir())) == 1

    @needs_bf16
    def test_of_one_precision_is_not_used_for_another(self, ir: Path, tmp_path: Path) -> None:
        """OpenVINO 2026.4 opens in bf16 what it compiled in float32, and then finds nothing."""
        found = []
        for precision in ("fp32", "bf16"):
            with OpenVinoEngine(
                ir, threads=1, precision=precision, cache=tmp_path, calls_before_static=0
            ) as engine:
                assert engine.loaded_from == "artefact"
                found.append(rows(engine.infer(*inputs(), 0.05, 0.6)))
        assert len(match_boxes(*found).pairs) > 0.8 * len(found[0]) > 10

    def test_that_is_damaged_is_made_again(self, small_ir: Path, tmp_path: Path) -> None:
        OpenVinoEngine(small_ir, threads=1, cache=tmp_path).close()
        (kept,) = (tmp_path / "fp32").iterdir()
        kept.chmod(0o600)
        kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])
        with OpenVinoEngine(small_ir, threads=1, cache=tmp_path) as engine:
            assert engine.loaded_from == "artefact"
            assert engine.infer(*dark(), 0.05, 0.6).num_dets[0] > 10

    def test_of_a_file_that_was_replaced_is_not_used(
        self, ir: Path, tiny_artefact: Path, tmp_path: Path
    ) -> None:
        path = Path(shutil.copy(tiny_artefact, tmp_path / "a.onnx"))
        with OpenVinoEngine(path, threads=1, cache=tmp_path) as first:
            before = first.infer(*inputs(), 0.05, 0.6)
        model = onnx.load(path)
        for value in model.graph.initializer:
            if "tood_cls.bias" in value.name:
                value.CopyFrom(
                    onnx.numpy_helper.from_array(
                        onnx.numpy_helper.to_array(value) + np.float32(0.5), value.name
                    )
                )
        onnx.save(model, path)
        with OpenVinoEngine(path, threads=1, cache=tmp_path) as second:
            assert second.infer(*inputs(), 0.05, 0.6).scores.max() > before.scores.max() + 0.01

    def test_that_cannot_be_kept_is_an_error(self, small_ir: Path) -> None:
        with pytest.raises(
            OutputError, match=r"/proc/nowhere/fp32: cannot keep compiled models.*TOOD_HOME"
        ):
            OpenVinoEngine(small_ir, cache="/proc/nowhere")


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threads": 0}, "threads is 0; expected a positive number"),
            (
                {"precision": "fp16"},
                "precision is 'fp16'; OpenVINO on the CPU runs in fp32 or bf16",
            ),
            ({"hint": "fast"}, "hint is 'fast'; expected latency or throughput"),
            ({"device": "cuda"}, "OpenVINO runs on the CPU here"),
            (
                {"colour": 1},
                "openvino takes no colour; it takes threads, precision, hint, cache, "
                "calls_before_static",
            ),
            (
                {"runtime": "onnxruntime"},
                r"onnxruntime does not open a file ending in \.xml; expected the runtime openvino",
            ),
        ],
    )
    def test_of_options(self, options: dict[str, Any], message: str, small_ir: Path) -> None:
        with pytest.raises(ToodError, match=message):
            open_engine(small_ir, **options)

    def test_of_runtimes_for_checkpoints(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(
            ToodError, match="a checkpoint is run by PyTorch, not by openvino; export it first"
        ):
            open_engine(tiny_checkpoint, runtime="openvino")
        with pytest.raises(ToodError, match="PyTorch takes no hint"):
            open_engine(tiny_checkpoint, hint="throughput")

    def test_of_options_of_openvino_in_onnx_runtime(self, tiny_artefact: Path) -> None:
        with pytest.raises(ToodError, match="onnxruntime takes no precision; it takes threads"):
            open_engine(tiny_artefact, precision="bf16")

    def test_without_openvino(self, small_ir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(DeviceError, match=r"openvino is not installed; .*\[openvino\]"):
            open_engine(small_ir)

    def test_with_an_openvino_that_does_not_load(
        self, small_ir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "openvino.py").write_text(
            "raise ImportError('libopenvino.so: cannot open shared object file')"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "openvino", raising=False)
        with pytest.raises(
            DeviceError, match=r"does not load \(libopenvino.so: .*reinstall the package openvino"
        ):
            open_engine(small_ir)

    def test_of_a_closed_engine(self, small_ir: Path) -> None:
        engine = OpenVinoEngine(small_ir, threads=1)
        engine.close()
        engine.close()
        with pytest.raises(ToodError, match="was closed"):
            engine.infer(*dark(), 0.05, 0.6)


class TestForeignFiles:
    def test_weights_that_stayed_behind(self, ir: Path, tmp_path: Path) -> None:
        path = Path(shutil.copy(ir, tmp_path / "a.xml"))
        with pytest.raises(
            ArtefactError,
            match=r"a\.bin: is missing; an OpenVINO model is an \.xml and a \.bin of the same name",
        ):
            OpenVinoEngine(path)

    @pytest.mark.parametrize("cut", [".bin", ".xml"])
    def test_cut_ir(self, cut: str, ir: Path, tmp_path: Path) -> None:
        for suffix in (".xml", ".bin", ".json"):
            content = ir.with_suffix(suffix).read_bytes()
            (tmp_path / f"a{suffix}").write_bytes(
                content[: len(content) // 2] if suffix == cut else content
            )
        with pytest.raises(
            ArtefactError,
            match=r"a\.xml: OpenVINO cannot open it, cut or not a model.*export it again",
        ):
            OpenVinoEngine(tmp_path / "a.xml")

    def test_cut_onnx(self, tiny_artefact: Path, tmp_path: Path) -> None:
        (tmp_path / "a.onnx").write_bytes(tiny_artefact.read_bytes()[:100_000])
        with pytest.raises(ArtefactError, match=r"a\.onnx: OpenVINO cannot open it"):
            open_engine(tmp_path / "a.onnx", runtime="openvino")

    @pytest.mark.parametrize("name", ["a.onnx", "a.xml"])
    def test_something_else_is_told_once_and_nothing_else_is_said(
        self, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / name).write_bytes(b"hello")
        (tmp_path / "a.bin").write_bytes(b"")
        with pytest.raises(ArtefactError, match=rf"not an \{Path(name).suffix} file inside"):
            open_engine(tmp_path / name, runtime="openvino")
        assert capfd.readouterr() == ("", "")

    def test_onnx_of_somebody_else(
        self, tmp_path: Path, save_graph: Callable[[onnx.NodeProto, Path], Path]
    ) -> None:
        with pytest.raises(
            ArtefactError,
            match=r"not one of tood_deploy \(inputs \['x'\], outputs \['y'\].*tood-export",
        ):
            open_engine(
                save_graph(helper.make_node("Relu", ["x"], ["y"]), tmp_path / "a.onnx"),
                runtime="openvino",
            )

    def test_onnx_of_somebody_else_beside_a_manifest_of_ours(
        self,
        tiny_artefact: Path,
        tmp_path: Path,
        save_graph: Callable[[onnx.NodeProto, Path], Path],
    ) -> None:
        path = save_graph(helper.make_node("Relu", ["x"], ["y"]), tmp_path / "a.onnx")
        shutil.copy(manifest_path(tiny_artefact), manifest_path(path))
        with pytest.raises(ArtefactError, match="not one of tood_deploy"):
            open_engine(path, runtime="openvino", verify="off")

    def test_deformable_convolutions_as_operators(
        self, tmp_path: Path, save_graph: Callable[[onnx.NodeProto, Path], Path]
    ) -> None:
        node = helper.make_node(
            "DeformConv", ["x", "w", "o"], ["y"], kernel_shape=[3, 3], pads=[1] * 4
        )
        with pytest.raises(
            ArtefactError, match=r"deformable convolutions .* OpenVINO lacks; .* --deform gather"
        ):
            open_engine(save_graph(node, tmp_path / "a.onnx"), runtime="openvino")

    def test_without_manifest_the_file_tells_itself(
        self, ir: Path, tiny_artefact: Path, tmp_path: Path
    ) -> None:
        for path in (ir, ir.with_suffix(".bin"), tiny_artefact):
            shutil.copy(path, tmp_path)
        preset = Manifest.from_json(manifest_path(tiny_artefact).read_text(), "").preset
        for name in (ir.name, tiny_artefact.name):
            with open_engine(tmp_path / name, runtime="openvino", threads=1) as engine:
                assert engine.manifest.preset == preset

    def test_damaged_manifest(self, ir: Path, tmp_path: Path) -> None:
        for path in (ir, ir.with_suffix(".bin")):
            shutil.copy(path, tmp_path)
        (tmp_path / "tiny.json").write_text("{}")
        with pytest.raises(ArtefactError, match="not a manifest"):
            open_engine(tmp_path / "tiny.xml")


@pytest.fixture
def save_graph() -> Callable[[onnx.NodeProto, Path], Path]:
    """A function: writes an ONNX file of this one node, from `x` (and `w`, `o`) to `y`."""

    def save(node: onnx.NodeProto, path: Path) -> Path:
        shapes = {"x": [1, 4, 8, 8], "w": [4, 4, 3, 3], "o": [1, 18, 8, 8]}
        given = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name])
            for name in node.input
        ]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 8, 8])
        model = helper.make_model(
            helper.make_graph([node], "g", given, [output]),
            opset_imports=[helper.make_opsetid("", 21)],
        )
        model.ir_version = 10
        onnx.save(model, path)
        return path

    return save
