import json
from pathlib import Path
from typing import Any

import pytest
from inference.fakes import RedEngine, moving_images, write_image, write_video

from tood_deploy.benchmark.latency import video as video_module
from tood_deploy.benchmark.latency.video import VideoPlan, VideoRun, bench_video, run_video
from tood_deploy.errors import ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.reporter import Reporter


@pytest.fixture(autouse=True)
def engine_timed_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_module, "ENGINE_S", 0.01)


@pytest.fixture
def clip(tmp_path: Path) -> str:
    return str(write_video(tmp_path / "clip.mp4", moving_images(12)))


def detector(seconds_per_image: float = 0.0) -> Detector:
    return Detector(RedEngine(seconds_per_image), imgsz=(48, 64))


def test_every_thread_is_accounted_for(clip: str) -> None:
    run = run_video(detector(), VideoPlan(clip))
    assert run.frames == run.detections == 12
    assert list(run.busy_s) == ["decode", "scale", "infer", "draw and encode"]
    assert all(seconds > 0 for seconds in run.busy_s.values())
    assert run.problems == ()


def test_without_encoding_and_with_fewer_frames(clip: str) -> None:
    run = run_video(detector(), VideoPlan(clip, 2, 5, encode=False))
    assert run.frames == 5
    assert list(run.busy_s) == ["decode", "scale", "infer"]


def test_a_slow_engine_is_what_limits(clip: str) -> None:
    run = run_video(detector(0.05), VideoPlan(clip, encode=False))
    assert max(run.busy_s, key=lambda stage: run.busy_s[stage]) == "infer"


def test_the_limit_in_words() -> None:
    assert (
        VideoRun(10, 2.0, {"decode": 0.1, "infer": 1.9}, (5, 5), 0, ()).limit
        == "infer limits: its thread works 95% of the time"
    )
    assert (
        "no thread works all the time (infer most, 60%)"
        in VideoRun(10, 2.0, {"decode": 0.1, "infer": 1.2}, (5, 5), 0, ()).limit
    )
    assert VideoRun(10, 2.0, {"infer": 1.0}, (4, 6), 0, ()).share_of_engine == 1


def test_reports(clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    bench_video(
        detector(),
        "red",
        VideoPlan(clip, limit=4),
        out,
        command="tood-bench video",
        reporter=Reporter(),
    )
    values = json.loads((out / "video.json").read_text())
    assert values["run"]["frames"] == 4
    assert "| infer |" in (out / "video.md").read_text()
    assert "<h1>" in (out / "video.html").read_text()
    assert "of the engine alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "option"),
    [({"batch": 0}, "--batch"), ({"batch": -1}, "--batch"), ({"limit": 0}, "--limit")],
)
def test_senseless_numbers(values: dict[str, Any], option: str) -> None:
    with pytest.raises(ToodError, match=option):
        VideoPlan("clip.mp4", **values)


def test_an_image_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(ToodError, match="not a video"):
        run_video(detector(), VideoPlan(str(write_image(tmp_path / "a.png"))))
