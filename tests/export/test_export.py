"""An export by the command: every target, what it prints, what is refused, and what is left."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from data.small_coco import annotation, coco, write_json
from inference.fakes import red_image, write_image
from manifest_values import plain
from onnx_edits import edit_weight

from tood_deploy.cli.export import main
from tood_deploy.engines import open_engine
from tood_deploy.engines.tensorrt import library as tensorrt_flavour
from tood_deploy.errors import CheckFailed, DeviceError, OutputError, ToodError
from tood_deploy.export import export as export_module
from tood_deploy.export.export import export_onnx
from tood_deploy.export.tensorrt.options import Profiles
from tood_deploy.export.triton.config import config_text, triton_config
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.files import file_sha256, no_empty_folder
from tood_deploy.manifest import Manifest, manifest_path, read_manifest
from tood_deploy.manifest_sections import EngineTarget, OptimizationProfile, Serving
from tood_deploy.model import load_checkpoint
from tood_deploy.onnx_file import read_onnx, write_onnx
from tood_deploy.parity.onnx_reference import OnnxRunner
from tood_deploy.presets import PRESETS

pytestmark = pytest.mark.usefixtures("stand_in_limits")


@pytest.fixture
def source(tiny_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`tiny.onnx` and its manifest in the present folder, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    for suffix in (".onnx", ".json"):
        shutil.copy(tiny_artefact.with_suffix(suffix), tmp_path / f"tiny{suffix}")
    return Path("tiny.onnx")


def made_beside(source: Path) -> set[str]:
    return {path.name for path in source.absolute().parent.iterdir()} - {"tiny.onnx", "tiny.json"}


def test_openvino(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), "--to", "openvino"]) == 0
    assert made_beside(source) == {"tiny-openvino.xml", "tiny-openvino.bin", "tiny-openvino.json"}
    assert "next: tood-infer tiny-openvino.xml IMAGES --output DIR\n" in capsys.readouterr().out
    manifest = read_manifest(Path("tiny-openvino.xml"))
    assert manifest is not None
    assert manifest.precision == "fp32"


def test_fp16(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), "--precision", "fp16"]) == 0
    assert made_beside(source) == {"tiny-fp16.onnx", "tiny-fp16.json"}
    said = capsys.readouterr().out
    assert "emulates fp16 by casts to float32" in said
    assert "tood-infer tiny-fp16.onnx IMAGES --output DIR --device cuda\n" in said
    assert "next: tood-infer" not in said
    manifest = read_manifest(Path("tiny-fp16.onnx"))
    assert manifest is not None
    assert manifest.precision == "fp16"
    assert plain(manifest)["options"]["runtimes"] == ["onnxruntime-cuda", "tensorrt"]
    assert plain(manifest)["parity"]["reference"].startswith("tiny.onnx")
    assert manifest.self_test


@pytest.mark.slow
def test_bf16(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what it is for, is refused by name where it does not run, and can be taken further:
    its reference is emulated."""
    assert main([str(source), "--precision", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "ONNX Runtime has no bf16 convolutions on CPUs" in said
    assert "tood-infer tiny-bf16.onnx IMAGES --output DIR --runtime openvino\n" in said
    assert "next: tood-infer" not in said
    manifest = read_manifest(Path("tiny-bf16.onnx"))
    assert manifest is not None
    assert (plain(manifest)["options"]["runtimes"], plain(manifest)["options"]["opset"]) == (
        ["openvino", "tensorrt"],
        22,
    )
    with pytest.raises(DeviceError, match=r"tiny-bf16\.onnx: is in bf16"):
        open_engine("tiny-bf16.onnx")
    run = OnnxRunner(export_module._runnable(read_onnx(Path("tiny-bf16.onnx"))).model)
    images, valid_hw = np.full((1, 64, 64, 3), 90, np.uint8), np.array([[64, 64]], np.int32)
    assert run(images, valid_hw, 0.0, 0.6)[0][0] > 0


def test_every_step_is_said(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe, as here; with --quiet nothing."""
    assert main([str(source), "--to", "triton", "--output", "repo", "--name", "tood"]) == 0
    said = capsys.readouterr().err
    assert "tiny.onnx: checked all that its export needs" in said
    assert "repo: adding the model to the repository" in said
    assert (
        main([str(source), "--to", "triton", "--output", "repo", "--name", "tood", "--quiet"]) == 0
    )
    assert capsys.readouterr() == ("", "")


def test_triton(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), "--to", "triton", "--output", "repo", "--name", "tood"]) == 0
    assert made_beside(source) == {"repo"}
    assert Path("repo/tood/1/model.onnx").is_file()
    assert "next: tood-infer" not in capsys.readouterr().out


@pytest.mark.slow
def test_an_engine_says_how_to_run_it(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([str(source), "--to", "engine", "--shapes", "64x96", "--batch", "1", "--list-layers"])
        == 0
    )
    assert made_beside(source) == {"tiny-engine.engine", "tiny-engine.json"}
    said = capsys.readouterr().out
    assert "IMAGES --output DIR --device cuda\n" in said
    assert said.count("│ correlation ") > 50, "--list-layers lists the kernels of convolutions"
    assert " kernels on 1 stream" in said
    manifest = read_manifest(Path("tiny-engine.engine"))
    assert manifest is not None
    assert (plain(manifest)["options"]["nms"], plain(manifest)["options"]["nms_rounds"]) == (
        "unrolled",
        16,
    )


@pytest.mark.slow
def test_the_fastest_precision_of_openvino(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(source), "--to", "openvino", "--precision", "auto"]) == 0
    assert made_beside(source) == {"tiny-openvino-auto.xml"}.union(
        {"tiny-openvino-auto.bin", "tiny-openvino-auto.json"}
    )
    shown = capsys.readouterr()
    assert "int8 is left out: it needs --calib-data" in shown.err
    assert shown.out.count("chosen") == 1
    with open_engine("tiny-openvino-auto.xml") as engine:
        assert engine.precision in ("fp32", "bf16")


@pytest.mark.slow
def test_an_engine_of_what_a_server_has(source: Path) -> None:
    """The way to a plan for a server without TensorRT for Triton: docs/serving.md."""
    served = "--to triton --output repo --name tood --warm-up none --quiet".split()
    assert main([str(source), *served]) == 0
    engine = "--to engine --shapes 64x96 --batch 1 --output served.engine --quiet".split()
    assert main(["repo/tood/1/model.onnx", *engine]) == 0
    manifest = read_manifest(Path("served.engine"))
    assert manifest is not None
    assert plain(manifest)["options"]["nms"] == "unrolled"
    assert manifest.build.serving is not None
    assert manifest.self_test is None


def test_an_engine_is_served_as_it_is(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stand-in for a plan of TensorRT, which cannot be had without a GPU."""
    engine = Path("plan.engine")
    engine.write_bytes(b"a plan")
    manifest = read_manifest(source)
    assert manifest is not None
    profile = OptimizationProfile((64, 96), 1, 1, 4)
    target = EngineTarget("tensorrt", "10.13", "linux-x86_64", ("8.9",), (profile,))
    build = replace(manifest.build, serving=Serving())
    stated = replace(manifest, target=target, build=build).with_artefact(engine)
    manifest_path(engine).write_text(stated.to_json())
    place = ["--to", "triton", "--output", "repo"]
    assert main(["plan.engine", *place, "--name", "tood", "--quiet"]) == 0
    assert Path("repo/tood/1/model.plan").read_bytes() == b"a plan"
    assert main(["plan.engine", *place, "--nms", "loop", "--backend", "tensorrt"]) == 2
    assert "--nms needs a checkpoint or an .onnx" in capsys.readouterr().err
    assert main(["plan.engine", "--to", "onnx"]) == 2
    assert "plan.engine is an engine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tiny.onnx is an .onnx already"),
        (
            ["--to", "openvino", "--output", "tiny.xml"],
            "its manifest tiny.json would replace that of tiny.onnx",
        ),
        (["--to", "openvino", "--output", "tiny.ir"], "expected a name ending in .xml"),
        (
            ["--to", "openvino", "--precision", "fp16"],
            "OpenVINO on CPUs computes in fp32, bf16 and int8",
        ),
        (["--precision", "int8"], "--precision int8 needs --calib-data"),
        (["--precision", "int8", "--calib-data", "."], ".: no images in it"),
        (["--precision", "int8", "--calib-data", ".", "--calib-images", "1"], ".: no images in it"),
        (
            ["--precision", "int8", "--calib-data", ".", "--fallback-precision", "fp16"],
            "--fallback-precision needs --to openvino or engine",
        ),
        (["--precision", "fp16", "--batch", "2"], "--batch needs --to engine or --to triton"),
        (
            ["--precision", "fp16", "--nms", "loop"],
            "--nms needs --to engine, or --to triton with --backend tensorrt",
        ),
        (
            ["--to", "triton", "--nms-rounds", "20"],
            "--nms-rounds needs --to engine, or --to triton with --backend tensorrt",
        ),
        (
            ["--to", "triton", "--workspace", "64"],
            "--workspace needs --to engine, or --to triton with --backend tensorrt",
        ),
        (["--to", "triton", "--flavour", "tensorrt"], "--flavour needs --to engine"),
        (["--to", "engine", "--nms", "loop", "--nms-rounds", "20"], "leave --nms-rounds out"),
        (["--precision", "fp16", "--max-det", "5"], "--max-det needs a checkpoint"),
        (["--to", "triton", "--gpus", "one"], "--gpus: 'one' is given; expected whole numbers"),
        (["--to", "engine", "--shapes", "64"], "expected HxW"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(source), *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not made_beside(source)


@pytest.mark.parametrize(
    ("installed", "arguments", "message"),
    [
        ((), ["engine"], "neither TensorRT nor TensorRT-RTX is installed; install"),
        (
            ("tensorrt", "tensorrt_rtx"),
            ["engine"],
            "both tensorrt and tensorrt_rtx are installed; say which of the two to use "
            "with --flavour",
        ),
        (
            ("tensorrt_rtx",),
            ["engine", "--flavour", "tensorrt"],
            "TensorRT is not installed, TensorRT-RTX is; install",
        ),
        (
            ("tensorrt_rtx",),
            ["triton", "--backend", "tensorrt"],
            "TensorRT is not installed, TensorRT-RTX is; install",
        ),
        (
            ("tensorrt_rtx",),
            ["engine", "--timing-cache", "kept"],
            "--timing-cache means nothing to TensorRT-RTX",
        ),
    ],
)
def test_what_builds_is_looked_for_before_the_long_work(
    installed: tuple[str, ...],
    arguments: list[str],
    message: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(tensorrt_flavour, "_is_installed", installed.__contains__)
    monkeypatch.setattr(export_module, "run_export", None)
    assert main([str(source), "--to", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not made_beside(source)


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path: Path) -> None:
    new = tmp_path / "new"
    with suppress(ToodError), no_empty_folder(new):
        new.mkdir()
        raise ToodError("no")
    assert not list(tmp_path.iterdir())
    with no_empty_folder(new):
        new.mkdir()
        (new / "a.onnx").touch()
    assert [path.name for path in new.iterdir()] == ["a.onnx"]


@pytest.fixture
def shipped(
    tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[onnx.ModelProto], None]:
    """A function: the graph that is made of any checkpoint; as shipped where it is not called."""

    def ship(model: onnx.ModelProto) -> None:
        monkeypatch.setattr(export_module, "graph_of", lambda *args, **kwargs: model)

    ship(onnx.load(tiny_artefact))
    return ship


class TestNothingIsLeft:
    """A failed, interrupted or terminated export leaves what was there, and nothing else."""

    @pytest.mark.slow
    def test_a_graph_that_is_not_equal(
        self,
        tiny_artefact: Path,
        tiny_checkpoint: Path,
        tmp_path: Path,
        shipped: Callable[[onnx.ModelProto], None],
    ) -> None:
        broken = onnx.load(tiny_artefact)
        name = next(
            value.name for value in broken.graph.initializer if "tood_cls.bias" in value.name
        )
        edit_weight(broken, name, lambda values: np.multiply(values, 2, out=values))
        shipped(broken)
        output = tmp_path / "model.onnx"
        assert main([str(tiny_checkpoint), "--output", str(output), "--quiet"]) == 1
        assert not list(tmp_path.iterdir())
        output.write_bytes(b"old")
        with pytest.raises(CheckFailed, match="not equal"):
            export_onnx(load_checkpoint(tiny_checkpoint), output)
        assert output.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [output]

    def test_a_full_disk(
        self, tiny_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        artefact = read_onnx(tiny_artefact)
        monkeypatch.setattr(Manifest, "with_artefact", full_disk)  # the graph is written by then
        with pytest.raises(OutputError, match="No space left"):
            write_onnx(artefact, tmp_path / "model.onnx")
        assert not list(tmp_path.iterdir())

    def test_ctrl_c(
        self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(export_module, "graph_of", interrupt)
        output = tmp_path / "new" / "model.onnx"
        assert main([str(tiny_checkpoint), "--output", str(output), "--quiet"]) == 130
        assert not list(tmp_path.iterdir())


class TestCheckpoint:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nothing.pth"], "nothing.pth: no such file"),
            (["{checkpoint}", "--output", "model.engine"], "expected a name ending in .onnx"),
            (["{checkpoint}", "--output", "/proc/nowhere/model.onnx"], "cannot be written"),
            (["{checkpoint}", "--max-det", "0"], "max_det is 0; expected 1 to 3840"),
            (
                ["{checkpoint}", "--imgsz", "0", "640"],
                "imgsz is 0 640; expected two positive numbers",
            ),
            (["{checkpoint}", "--classes", "a,b"], "has 80 classes, 2 names"),
            (["{checkpoint}", "--classes", "a,a"], "expected one different name"),
            (["{checkpoint}", "--preset", "r50-1x"], "does not fit the preset r50-1x"),
            (["{checkpoint}", "--preset", "r51"], "no preset is called 'r51'"),
            (["{checkpoint}", "--verify-images", "{folder}"], "no images in it"),
        ],
    )
    def test_wrong_use_is_one_line_and_exit_2(
        self,
        arguments: list[str],
        message: str,
        tiny_checkpoint: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code = main(
            [text.format(checkpoint=tiny_checkpoint, folder=tmp_path) for text in arguments]
            + ["--quiet"]
        )
        captured = capsys.readouterr()
        assert code == 2
        assert captured.err.startswith("error: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not list(tmp_path.iterdir())

    @pytest.mark.usefixtures("shipped")
    def test_every_step_is_reported_in_order(
        self, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "a.onnx"
        size = ["--imgsz", "300", "200"]
        assert main([str(tiny_checkpoint), "--output", str(output), *size]) == 0
        captured = capsys.readouterr()
        assert "detections matched" in captured.out
        assert "80 classes (person, bicycle, car, ...)" in captured.err
        steps = ("checked all", "loading", "making the graph", "comparing", "self-test", "writing")
        places = [captured.err.find(step) for step in steps]
        assert -1 not in places
        assert places == sorted(places)
        manifest = read_manifest(output)
        assert manifest is not None
        assert manifest.preset.imgsz == (200, 300)
        assert manifest.artefact_sha256 == file_sha256(output)


INT8 = ("--precision", "int8", "--calib-data", "images")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`tood.pth`, a deformable network of 80 classes once it is loaded; to export it would be long
    work."""
    monkeypatch.chdir(tmp_path)
    Path("tood.pth").write_bytes(b"weights")
    for number in range(1, 3):
        write_image(Path("images") / f"{number}.png", red_image())
    state = {
        "backbone.conv1.weight": None,
        "backbone.bn1.bias": None,
        "neck.fpn_convs.0.conv.weight": None,
    }
    model = SimpleNamespace(preset=PRESETS["r101-dcn-2x"], state_dict=lambda: state)
    monkeypatch.setattr(export_module, "load_checkpoint", lambda *_, **__: model)
    monkeypatch.setattr(export_module, "onnx_from_checkpoint", None)


@pytest.mark.usefixtures("loaded")
class TestLoaded:
    """What a checkpoint alone can tell is asked for once it is loaded, before it is exported."""

    @pytest.fixture
    def refused(self, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
        def refuse(*arguments: str) -> str:
            assert main(["tood.pth", *arguments, "--quiet"]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            return error

        return refuse

    def test_deformable_convolutions_in_another_form(self, refused: Callable[..., str]) -> None:
        assert "which OpenVINO lacks; leave --deform out" in refused(
            "--to", "openvino", "--deform", "op"
        )

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--to", "openvino"),
            ("--to", "onnx", "--deform", "op"),
            ("--to", "openvino", "--deform", "gather"),
        ],
    )
    def test_forms_that_fit_go_on(self, arguments: tuple[str, ...]) -> None:
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            main(["tood.pth", *arguments, "--quiet"])

    @pytest.mark.parametrize("precision", [INT8, ("--precision", "fp16")])
    def test_patterns_that_fit_no_layer(
        self, precision: tuple[str, ...], refused: Callable[..., str]
    ) -> None:
        line = refused(*precision, "--keep-fp32", "backbone.*,head.*")
        assert "--keep-fp32 head.* fits no layer" in line

    def test_half_precision_also_keeps_operators_and_stages(self) -> None:
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            main(["tood.pth", "--precision", "fp16", "--keep-fp32", "Add,p3", "--quiet"])

    def test_classes_that_are_not_annotated(self, refused: Callable[..., str]) -> None:
        write_json(
            Path("truth.json"), coco([annotation(1, 1, (4, 8, 16, 16))], names=("okapi",), images=2)
        )
        assert "truth.json" in refused(
            *INT8, "--max-ap-drop", "1", "--annotations", "truth.json", "--images", "images"
        )

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"class_names": ("okapi",)}, "has other classes"),
            ({"max_det": 300}, "has another output"),
        ],
    )
    def test_a_served_model_of_the_same_name(
        self, fields: dict[str, Any], message: str, refused: Callable[..., str]
    ) -> None:
        preset = replace(
            PRESETS["r101-dcn-2x"],
            class_names=fields.get("class_names", PRESETS["r101-dcn-2x"].class_names),
        )
        other = Manifest(preset, max_det=fields.get("max_det", 100))
        Path("repo/tood").mkdir(parents=True)
        config = triton_config(
            other, "onnxruntime", TritonOptions(name="tood"), Profiles(((64, 96),))
        )
        Path("repo/tood/config.pbtxt").write_text(config_text(config))
        assert message in refused("--to", "triton", "--output", "repo")
