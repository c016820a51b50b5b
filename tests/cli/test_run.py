"""The options of runtimes, in every command that has them.

They reach the engine, or are refused in one line.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inference.fakes import RedEngine, moving_images, write_image, write_video

from tood_deploy.benchmark.latency import video as video_module
from tood_deploy.cli import bench, eval, infer
from tood_deploy.cli.common import is_artefact
from tood_deploy.engines.open import RUNTIMES
from tood_deploy.inference import detector as detector_module

GIVEN = ("--runtime", "openvino", "--precision", "bf16", "--no-self-test")
TAKEN = {"runtime": "openvino", "precision": "bf16", "self_test": False}
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What was asked of `open_engine`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes(b"a model that is never read")
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        detector_module,
        "open_engine",
        lambda model, **options: calls.append(options) or RedEngine(),
    )
    return calls


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(module: Any, *arguments: str | Path) -> tuple[int, str]:
        code = module.main([*map(str, arguments)])
        return code, capfd.readouterr().err

    return call


def test_reach_the_engine(run: Run, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    code, _ = run(
        infer, "m.onnx", write_image(tmp_path / "a.png"), *GIVEN, "--threads", "1", "--quiet"
    )
    assert (code, asked) == (0, [{"device": "cpu", "threads": 1, "verify": "off", **TAKEN}])


def test_are_left_out_where_not_given(
    run: Run, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    run(infer, "m.onnx", write_image(tmp_path / "a.png"), "--quiet")
    # The command has compared the file with its manifest already.
    assert asked == [{"device": "cpu", "verify": "off"}]


def test_which_weights_reach_the_checkpoint(
    run: Run, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    code, _ = run(
        infer, "m.pth", write_image(tmp_path / "a.png"), "--weights-key", "ema", "--quiet"
    )
    assert (code, asked) == (0, [{"device": "cpu", "weights_key": "ema"}])
    code, said = run(
        infer, "m.onnx", write_image(tmp_path / "a.png"), "--weights-key", "ema", "--quiet"
    )
    assert (code, "--weights-key" in said) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["m.xml", "a.png"], None),
        (["m.xml", "a.png", "b.png"], "throughput"),
        (["m.xml", "v.mp4"], "throughput"),
        (["m.onnx", "a.png"], None),
        (["m.onnx", "v.mp4"], "throughput"),
        (["m.onnx", "v.mp4", "--runtime", "openvino"], "throughput"),
        (["m.onnx", "v.mp4", "--device", "cuda"], None),
        (["m.engine", "v.mp4"], None),
        (["m.onnx", "a.png", "--hint", "throughput"], "throughput"),
        (["m.onnx", "v.mp4", "--hint", "latency"], "latency"),
    ],
)
def test_batches_run_side_by_side_on_a_cpu_where_nobody_waits_for_one(
    arguments: list[str], hint: str | None, run: Run, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    for name in ("m.xml", "m.bin", "m.onnx", "m.engine"):
        Path(name).write_bytes(b"")
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    write_video(tmp_path / "v.mp4", moving_images(3))
    assert run(infer, *arguments, "--quiet")[0] == 0
    assert asked[0].get("hint") == hint


def test_hints_are_refused_where_they_do_nothing(
    run: Run, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    image = write_image(tmp_path / "a.png")
    for source in ((infer, "m.pth", image), (infer, "m.onnx", "rtsp://a/b")):
        code, said = run(*source, "--hint", "throughput", "--quiet")
        assert (code, "leave --hint" in said) == (2, True)
    assert asked == []


def test_of_videos_in_the_benchmark(
    run: Run, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_module, "ENGINE_S", 0.01)
    clip = write_video(tmp_path / "v.mp4", moving_images(4))
    assert (
        run(
            bench, "video", "m.onnx", clip, "--no-encode", "--imgsz", "48", "64", "--quiet", *GIVEN
        )[0]
        == 0
    )
    assert asked == [{"device": "cpu", "hint": "throughput", **TAKEN}]


@pytest.mark.parametrize("option", [["--runtime", "openvino"], ["--no-self-test"]])
def test_are_refused_beside_a_checkpoint(
    option: list[str], run: Run, asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    image = write_image(tmp_path / "a.png")
    commands = (
        (infer, "m.pth", image),
        (bench, "video", "m.pth", "v.mp4"),
        (bench, "latency", "m.pth"),
        (bench, "parity", "m.pth", "n.pth"),
    )
    for module, *arguments in commands:
        code, err = run(module, *arguments, *option)
        assert (code, err.count("\n")) == (2, 1)
        assert "leave --runtime out, leave --no-self-test out, or export it first" in err
    assert not asked


def test_are_refused_beside_results(run: Run, tmp_path: Path) -> None:
    code, err = run(eval, "r.json", "--annotations", "t.json", *GIVEN)
    assert code == 2
    assert "leave --runtime, --precision, --no-self-test out, or give the model" in err


def test_apply_to_artefacts_and_not_to_the_baseline() -> None:
    arguments = bench.build_parser().parse_args(
        ["latency", "a.onnx", "b.xml", "--baseline", "c.pth", "--preset", "tiny", *GIVEN]
    )
    options = bench.options_by_model(arguments, ["c.pth", "a.onnx", "b.xml"])
    assert options == {"c.pth": {"preset": "tiny"}, "a.onnx": TAKEN, "b.xml": TAKEN}


def test_every_runtime_can_be_chosen() -> None:
    arguments = infer.build_parser().parse_args(["m.onnx", "a.png", "--runtime", [*RUNTIMES][-1]])
    assert arguments.runtime in RUNTIMES


def test_artefacts_by_their_names() -> None:
    assert [is_artefact(name) for name in ("a.onnx", "a.ONNX", "a.xml", "a.engine")] == [True] * 4
    assert [is_artefact(name) for name in ("a.pth", "a.safetensors", "r50-1x", "onnx")] == [
        False
    ] * 4
