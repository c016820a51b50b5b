"""tood-bench: options, exit codes, one clear line for bad input; on checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inference.fakes import RedEngine, moving_images, write_image, write_video

from tood_deploy.benchmark.latency import peak
from tood_deploy.benchmark.latency import video as video_module
from tood_deploy.cli.bench import ap_from, main, short_names, size_from
from tood_deploy.errors import ToodError
from tood_deploy.inference import detector as detector_module
from tood_deploy.model.checkpoint import save_checkpoint
from tood_deploy.model.detector import build_model
from tood_deploy.presets import PRESETS

SMALL = ("--imgsz", "60", "90", "--threads", "2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A network and the same with a box branch that is a little off."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = build_model(replace(PRESETS["tiny"], class_names=("cat", "dog")))
    save_checkpoint(model, folder / "sound.safetensors")
    with torch.no_grad():
        model.get_parameter("bbox_head.tood_reg.bias").add_(0.05)
    save_checkpoint(model, folder / "off.safetensors")
    return folder / "sound.safetensors", folder / "off.safetensors"


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs tood-bench in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.setattr(peak, "PRODUCT_SIDE", 64)
    monkeypatch.setattr(peak, "CONV_HW", (8, 8))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    for word in ("error: ", *words):
        assert word in err
    assert list(Path.cwd().iterdir()) == []


class TestParity:
    @pytest.mark.slow
    def test_equal_networks_pass(self, run: Callable, checkpoints: tuple[Path, Path]) -> None:
        code, out, _ = run(
            "parity", checkpoints[0], checkpoints[0], "--limit", 1, "--sizes", "--conf", 0, *SMALL
        )
        assert code == 0
        assert out.splitlines()[-1] == "parity-report/parity.html"
        assert "detections exchanged in an image" in out
        assert "equal to the PyTorch reference" in out
        assert sorted(path.name for path in Path("parity-report").iterdir()) == [
            "parity.html",
            "parity.json",
            "parity.md",
        ]

    def test_a_failed_gate_names_the_stage(
        self, run: Callable, checkpoints: tuple[Path, Path]
    ) -> None:
        code, _, err = run(
            "parity", *checkpoints, "--limit", 1, "--sizes", "--output", "r", "--quiet", *SMALL
        )
        assert code == 1
        assert err.startswith("failed: ")
        assert "off.safetensors at the stage head: head: head_boxes_p" in err
        values = json.loads(Path("r/parity.json").read_text())
        assert values["models"][str(checkpoints[1])]["failing_stage"] == "head"
        assert values["facts"]["command"].startswith("tood-bench parity ")

    @pytest.mark.slow
    def test_a_given_limit_takes_the_place_of_the_default(
        self, run: Callable, checkpoints: tuple[Path, Path]
    ) -> None:
        limits = ("--max-box-strides", 10, "--max-box-px", 500, "--min-matched", 0)
        assert (
            run("parity", *checkpoints, "--limit", 1, "--sizes", "--quiet", *limits, *SMALL)[0] == 0
        )

    def test_bad_input(self, run: Callable, checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
        sound = checkpoints[0]
        write_image(tmp_path / "images" / "a.png")
        annotations = tmp_path / "a.json"
        content = {
            "images": [{"id": 1, "file_name": "a.png"}],
            "categories": [{"id": 1, "name": "bird"}],
        }
        content["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]
        annotations.write_text(json.dumps(content))
        images = ("--images", tmp_path / "images")
        assert_one_line(
            run("parity", "model.onnx", sound),
            "model.onnx: not a checkpoint",
            "give the checkpoint",
        )
        assert_one_line(run("parity", sound, "none.onnx"), "none.onnx: no such file")
        assert_one_line(
            run("parity", sound, sound, "--annotations", annotations),
            "annotations without their images",
            "--images",
        )
        assert_one_line(
            run("parity", sound, sound, "--mapping", annotations), "without annotations"
        )
        assert_one_line(run("parity", sound, sound, "--images", "none"), "none: no such folder")
        assert_one_line(
            run("parity", sound, sound, "--annotations", annotations, *images), "bird", "cat"
        )
        assert_one_line(run("parity", sound, sound, "--sizes", "64"), "'64'", "320x640")
        assert_one_line(run("parity", sound, sound, "--sizes", "64x70"), "64x70", "multiples of 32")
        assert_one_line(run("parity", sound, sound, "--max-score", -1), "--max-score is -1")
        assert_one_line(run("parity", sound, sound, "--conf", 2), "conf is 2.0", "0 to 1")
        assert_one_line(run("parity", sound, sound, "--limit", 0), "--limit is 0")
        annotations.write_text("[]")
        assert_one_line(
            run("parity", sound, sound, "--annotations", annotations, *images),
            "not COCO annotations",
        )


class TestLatency:
    @pytest.mark.slow
    def test_a_baseline_and_a_model(self, run: Callable, checkpoints: tuple[Path, Path]) -> None:
        sound, off = checkpoints
        short = ("--rounds", 2, "--turn-seconds", 0.01, "--warmup-seconds", 0.01)
        code, out, err = run(
            "latency", off, "--baseline", sound, "--batch", 1, *short, "--ap", f"{off}=40", *SMALL
        )
        assert code == 0
        assert "off.safetensors" in out
        assert "eager PyTorch" in out
        assert "round 2 of 2" in err
        assert "was not stable" in err
        assert "2 rounds are too few" in err
        values = json.loads(Path("latency-report/latency.json").read_text())
        first, second = values["measurements"]
        assert (first["model"], second["model"]) == ("eager PyTorch", "off.safetensors")
        assert first["times_faster"] is None
        assert (
            second["times_faster"]["low"]
            <= second["times_faster"]["value"]
            <= second["times_faster"]["high"]
        )
        assert len(second["rounds"]) == 2
        assert set(second["ms"]["end to end"]) == {"total", "pre", "infer", "post"}
        assert second["peak_host_mib"] > 100
        assert second["load_s"] > 0
        assert values["ap"] == {"off.safetensors": 40}
        assert second["images"].startswith("8 crops, 341x512, of a photograph")

    def test_bad_input(self, run: Callable, checkpoints: tuple[Path, Path]) -> None:
        sound = checkpoints[0]
        assert_one_line(run("latency", sound, "--batch", 0), "--batch is 0")
        assert_one_line(run("latency", sound, "--rounds", 0), "--rounds is 0")
        assert_one_line(run("latency", sound, "--ap", "other=3"), "'other=3'")
        assert_one_line(run("latency", sound, "--imgsz", 0, 9), "imgsz is 0 9")

    def test_a_model_that_is_not_there(self, run: Callable) -> None:
        code, _, err = run("latency", "none.onnx", "--quiet")
        assert code == 2
        assert err.startswith("error: none.onnx: no such file")


class TestVideo:
    def test_a_clip(self, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(video_module, "ENGINE_S", 0.01)
        monkeypatch.setattr(
            detector_module,
            "open_engine",
            lambda model, **options: asked.append((model, options)) or RedEngine(),
        )
        clip = write_video(tmp_path / "clip.mp4", moving_images(6))
        code, out, _ = run(
            "video", "m.onnx", clip, "--limit", 4, "--imgsz", 48, 64, "--threads", 2, "--no-encode"
        )
        assert code == 0
        assert "infer" in out
        assert out.splitlines()[-1] == "video-report/video.html"
        assert asked == [("m.onnx", {"device": "cpu", "threads": 2, "hint": "throughput"})]

    def test_no_such_clip(self, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(detector_module, "open_engine", lambda model, **options: RedEngine())
        assert_one_line(run("video", "m.onnx", "none.mp4"), "none.mp4: no such file")


def test_small_parsers() -> None:
    assert size_from("320x640") == (320, 640)
    assert short_names(["a/m.onnx", "b/n.onnx"]) == ["m.onnx", "n.onnx"]
    assert short_names(["a/m.onnx", "b/m.onnx"]) == ["a/m.onnx", "b/m.onnx"]
    assert ap_from("a/m.onnx=42.5", ["a/m.onnx"], ["m.onnx"]) == ("m.onnx", 42.5)
    with pytest.raises(ToodError, match="a number from 0 to 100"):
        ap_from("a/m.onnx=101", ["a/m.onnx"], ["m.onnx"])


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_a_clip_in_slices(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(Path("clip.mp4"), moving_images(6, 96, 128))
    engine = RedEngine(0.001)
    monkeypatch.setattr(detector_module, "open_engine", lambda model, **options: engine)
    monkeypatch.setattr(video_module, "ENGINE_S", 0.01)
    size = ("--slice", "48", "64", "--imgsz", "48", "64", "--quiet")
    code, _, err = run("video", "model.pth", "clip.mp4", *size, "--no-encode", "--batch", "2")
    assert code == 0, err
    values = json.loads(Path("video-report/video.json").read_text(encoding="utf-8"))
    assert values["run"]["frames"] == 6
    assert "slices of 48 x 64" in values["facts"]["slices"]
    assert max(engine.batches) == 2


@pytest.mark.slow
def test_latency_of_images_in_slices(
    run: Callable[..., tuple[int, str, str]], checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    write_image(tmp_path / "images" / "a.png")
    times = ("--rounds", "1", "--turn-seconds", "0.01", "--warmup-seconds", "0.01", "--quiet")
    given = ("--images", tmp_path / "images", "--slice", "32", "--overlap", "0.1", *times, *SMALL)
    code, _, err = run("latency", checkpoints[0], *given)
    assert code == 0, err
    values = json.loads(Path("latency-report/latency.json").read_text(encoding="utf-8"))
    assert values["measurements"]
    shutil.rmtree("latency-report")
    assert_one_line(run("latency", checkpoints[0], "--overlap", "0.1"), "--overlap", "--slice")
    assert_one_line(run("video", checkpoints[0], "c.mp4", "--slice", "0"), "0", "positive")


class TestScenario:
    """Options and exit codes; what is measured is in tests/benchmark/scenario."""

    @pytest.fixture(autouse=True)
    def load_gen(self) -> None:
        pytest.importorskip("mlperf_loadgen", reason="needs the extra scenario")

    def test_bad_input(self, run: Callable, checkpoints: tuple[Path, Path]) -> None:
        sound = checkpoints[0]
        for options, words in (
            (("--batch", 0), ("--batch is 0",)),
            (("--workers", -1), ("--workers is -1",)),
            (("--delay-ms", "nan"), ("--delay-ms is nan",)),
            (("--min-queries", 0), ("--min-queries is 0", "positive")),
            (("--latency-ms", -5), ("--latency-ms is -5",)),
            (("--rate", 0), ("--rate is 0",)),
            (("--annotations", "a.json"), ("a.json", "--reference")),
            (("--reference-ap", 40), ("--annotations",)),
            (("--accuracy", 99.9), ("--accuracy has no effect", "--annotations")),
            (("--mapping", "m.json"), ("--mapping has no effect", "--annotations")),
            (("--images", "none"), ("none: no such folder",)),
        ):
            assert_one_line(run("scenario", "server", sound, *options), *words)

    @pytest.mark.slow
    def test_a_rate_with_its_accuracy(
        self, run: Callable, checkpoints: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """The whole of it, also that a model which is off does not have the accuracy."""
        sound, off = checkpoints
        write_image(tmp_path / "images" / "a.png")
        content = {
            "images": [{"id": 7, "file_name": "a.png", "width": 64, "height": 48}],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 1, "bbox": [8, 8, 16, 16], "area": 256}
            ],
        }
        annotations = tmp_path / "a.json"
        annotations.write_text(json.dumps(content))
        short = ("--min-seconds", 0.1, "--min-queries", 3, "--warmup-seconds", 0, "--rate", 20)
        options = ("--images", tmp_path / "images", "--from", "bytes", "--latency-ms", 60000)
        truth = ("--annotations", annotations, "--reference", sound)
        code, _, err = run("scenario", "server", off, *options, *truth, *short, *SMALL)
        # Three queries are too few for early stopping.
        assert code == 1
        assert "more queries" in err
        values = json.loads(Path("scenario-report/scenario.json").read_text())
        assert values["accuracy"]["percent"] == 99
        assert values["outcome"]["settings"]["scenario"] == "Server"
        assert Path("scenario-report/loadgen/mlperf_log_summary.txt").is_file()

    @pytest.mark.slow
    def test_a_model_that_cannot_be_opened(self, run: Callable) -> None:
        code, out, err = run("scenario", "single", "none.onnx")
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("error: none.onnx: no such file")
