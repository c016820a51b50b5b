"""The whole export by the command, from an .onnx: every target, what it says, and what it leaves behind."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from manifest_values import plain

from tood_deploy.cli.export import main
from tood_deploy.engines import open_engine
from tood_deploy.engines.tensorrt import library as tensorrt_flavour
from tood_deploy.errors import DeviceError, ToodError
from tood_deploy.export import export as carry_out
from tood_deploy.manifest import manifest_path, neighbour, read_manifest
from tood_deploy.manifest_sections import EngineTarget, OptimizationProfile, Serving

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
    with open_engine("tiny-openvino.xml") as engine:
        assert engine.precision == "fp32"


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


def test_bf16(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what it is for, is refused by name where it does not run, and can be taken further: its reference is emulated."""
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
    run = carry_out._given_reference(Path("tiny-bf16.onnx")).run
    num_dets = run(np.full((1, 64, 64, 3), 90, np.uint8), np.array([[64, 64]], np.int32), 0.0, 0.6)[
        0
    ]
    assert num_dets[0] > 0


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


def test_an_engine_says_how_to_run_it(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main([str(source), "--to", "engine", "--shapes", "64x96", "--batch", "1", "--list-layers"])
        == 0
    )
    assert made_beside(source) == {"tiny-engine.engine", "tiny-engine.json"}
    said = capsys.readouterr().out
    assert "IMAGES --output DIR --device cuda\n" in said
    assert said.count("CONVOLUTION") > 50, "--list-layers lists them"
    manifest = read_manifest(Path("tiny-engine.engine"))
    assert manifest is not None
    assert (plain(manifest)["options"]["nms"], plain(manifest)["options"]["nms_rounds"]) == (
        "unrolled",
        16,
    )


@pytest.mark.slow
def test_an_engine_of_what_a_server_has(source: Path) -> None:
    """The way to a plan for a server, as far as it goes without TensorRT for Triton: docs/serving.md."""
    assert (
        main(
            [
                str(source),
                "--to",
                "triton",
                "--output",
                "repo",
                "--name",
                "tood",
                "--warm-up",
                "none",
                "--quiet",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "repo/tood/1/model.onnx",
                "--to",
                "engine",
                "--shapes",
                "64x96",
                "--batch",
                "1",
                "--output",
                "served.engine",
                "--quiet",
            ]
        )
        == 0
    )
    manifest = read_manifest(Path("served.engine"))
    assert manifest is not None
    assert (
        plain(manifest)["options"]["nms"],
        "serving" in plain(manifest)["options"],
        manifest.self_test,
    ) == ("unrolled", True, None)


def test_an_engine_is_served_as_it_is(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stand-in for a plan of TensorRT, which cannot be had without a GPU."""
    engine = Path("plan.engine")
    engine.write_bytes(b"a plan")
    target = EngineTarget(
        "tensorrt", "10.13", "linux", ("8.9",), (OptimizationProfile((64, 96), 1, 1, 4),)
    )
    manifest = read_manifest(source)
    assert manifest is not None
    stated = replace(
        manifest, target=target, build=replace(manifest.build, serving=Serving())
    ).with_artefact(engine)
    manifest_path(engine).write_text(stated.to_json())
    assert (
        main(["plan.engine", "--to", "triton", "--output", "repo", "--name", "tood", "--quiet"])
        == 0
    )
    assert Path("repo/tood/1/model.plan").read_bytes() == b"a plan"
    assert (
        main(
            [
                "plan.engine",
                "--to",
                "triton",
                "--output",
                "repo",
                "--nms",
                "loop",
                "--backend",
                "tensorrt",
            ]
        )
        == 2
    )
    assert (
        "--nms needs a checkpoint or an .onnx; an engine is served as it is"
        in capsys.readouterr().err
    )
    assert main(["plan.engine", "--to", "onnx"]) == 2
    assert (
        "plan.engine is an engine, which can be served and not exported; give --to triton"
        in capsys.readouterr().err
    )


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
        (
            ["--precision", "int8", "--calib-data", ".", "--calib-pictures", "1"],
            ".: no images in it",
        ),
        (
            ["--precision", "int8", "--calib-data", ".", "--rest", "fp16"],
            "--rest needs --to openvino or engine",
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
        (["--to", "triton", "--gpus", "one"], "--gpus is 'one'; expected whole numbers"),
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
            "both tensorrt and tensorrt_rtx are installed; say which of the two to use with --flavour",
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
    monkeypatch.setattr(carry_out, "carry_out", None)
    assert main([str(source), "--to", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not made_beside(source)


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ToodError), carry_out._working_folder(tmp_path / "new" / "a.onnx"):
        raise ToodError("no")
    assert not list(tmp_path.iterdir())
    with carry_out._working_folder(tmp_path / "new" / "a.onnx"):
        (tmp_path / "new" / "a.onnx").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.onnx"]


def test_neighbours(tmp_path: Path) -> None:
    (tmp_path / "a.engine").touch()
    (tmp_path / "b.onnx").touch()
    assert neighbour(tmp_path / "a.onnx") == tmp_path / "a.engine"
    assert neighbour(tmp_path / "b.onnx") is None, "an artefact may replace itself"
