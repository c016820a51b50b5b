import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from inference.fakes import (
    CLASSES,
    RedEngine,
    moving_images,
    red_image,
    without_packets,
    write_image,
    write_video,
)
from inference.servers import MULTIPART, camera, serve
from inference.test_file_list import write_animation, write_pages

from tood_deploy.cli import infer
from tood_deploy.cli.infer import main
from tood_deploy.files import file_sha256
from tood_deploy.inference import detector as detector_module
from tood_deploy.manifest import Manifest, doubts
from tood_deploy.manifest_sections import Parity

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def engine() -> RedEngine:
    return RedEngine()


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    engine: RedEngine,
) -> Run:
    """Runs tood-infer with a stand-in engine in an empty folder.

    Gives exit code, stdout and stderr.
    """
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    asked: list[dict[str, Any]] = []

    def open_engine(model: str, **options: Any) -> RedEngine:
        asked.append({"model": model, **options})
        engine.closed = False
        return engine

    monkeypatch.setattr(detector_module, "open_engine", open_engine)

    def call(*arguments: str | Path, model: str = "model.pth") -> tuple[int, str, str]:
        code = main([model, *map(str, arguments)])
        out, err = capfd.readouterr()
        return code, out, err

    call.asked = asked  # pyright: ignore[reportFunctionMemberAccess]
    return call


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, one line on stderr with these words, nothing left in the working folder."""
    code, _, err = result
    assert code == 2
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    for word in words:
        assert word in err
    assert list(Path.cwd().iterdir()) == []


def test_a_image_with_all_outputs(run: Run, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    code, out, err = run(
        image, "--output", "out", "--json", "r.json", "--jsonl", "r.jsonl", "--crops", "crops"
    )
    assert code == 0
    assert out == f"{image}: 1 red thing\n"
    assert err.startswith("1 frames in ")
    for word in ("fps", "pre", "infer", "post", "end-to-end", "p95"):
        assert word in err
    drawn = cv2.imread("out/a.png")
    assert drawn is not None
    assert (drawn != red_image()).any()
    (row,) = json.loads(Path("r.json").read_text())
    assert (row["image_id"], row["category_id"]) == (1, 1)
    np.testing.assert_allclose(row["bbox"], [8, 8, 16, 16], atol=1)
    assert json.loads(Path("r.jsonl").read_text())["detections"][0]["class_name"] == CLASSES[0]
    assert [path.name for path in Path("crops").iterdir()] == ["a_000_red-thing.jpg"]


def test_a_video(run: Run, tmp_path: Path, engine: RedEngine) -> None:
    times = [0, 40, 50, 120, 500, 510]
    video = write_video(tmp_path / "v.avi.mkv", moving_images(6), times)
    code, out, _ = run(video, "--output", "v.mp4", "--batch", "4", "--jsonl", "-", "--quiet")
    assert code == 0
    assert engine.batches == [4, 2]
    assert [json.loads(line)["timestamp_s"] for line in out.splitlines()] == pytest.approx(
        [time / 1000 for time in times]
    )
    with av.open("v.mp4") as container:
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx(
            [time / 1000 for time in times]
        )


def test_chosen_frames_of_a_video(run: Run, tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_images(50))
    chosen = ("--start", "0.4", "--end", "40f", "--stride", "5", "--max-frames", "4")
    code, out, _ = run(video, *chosen, "--jsonl", "-", "--quiet")
    assert code == 0
    assert [json.loads(line)["index"] for line in out.splitlines()] == [10, 15, 20, 25]


def test_video_options_that_cannot_be(run: Run, tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_images(5))
    image = write_image(tmp_path / "a.png")
    assert_one_line(run(video, "--stride", "0"), "--stride is 0")
    assert_one_line(run(video, "--start", "soon"), "--start is soon", "300f")
    assert_one_line(run(video, "--start", "60"), "--start")
    assert_one_line(run(image, "--max-frames", "1"), "images have no frames")
    assert_one_line(run(video, "--codec", "h264"), "add --output")
    assert_one_line(run(video, "--output", "o.mp4", "--codec", "h263"), "h264, hevc, vp9, av1")
    assert_one_line(run(video, "--output", "o.mp4", "--crf", "99"), "--crf is 99")
    assert_one_line(run(video, "--reconnect-timeout", "0"), "--reconnect-timeout")
    assert_one_line(run("rtsp://a/b", "--start", "1"), "no beginning")


def test_how_a_video_is_encoded(run: Run, tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_images(5))
    code, *_ = run(video, "--output", "o.mp4", "--codec", "hevc", "--crf", "30", "--quiet")
    assert code == 0
    with av.open("o.mp4") as container:
        assert container.streams.video[0].codec_context.name == "hevc"


def test_lost_frames_are_told_and_make_the_exit_code(run: Run, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "v.mp4", moving_images(40))
    part = without_packets(whole, tmp_path / "part.mp4", range(13, 17))
    code, _, err = run(part, "--quiet")
    assert code == 1
    assert "4 frames were lost between others" in err


def test_a_stream_is_connected_to_again(run: Run) -> None:
    with serve(MULTIPART, camera(6, 0.01)) as address:
        code, out, err = run(address, "--jsonl", "-", "--max-frames", "9", "--quiet")
        assert (code, len(out.splitlines())) == (0, 9)
        assert "connecting again, for the 1st time" in err
        code, _, err = run(address, "--quiet", "--no-reconnect")
        assert code == 1
        assert "the connection ended" in err


def test_fast_decode(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Any] = []
    real = cv2.imdecode
    monkeypatch.setattr(
        cv2, "imdecode", lambda data, flags: decoded.append(flags) or real(data, flags)
    )
    image = write_image(tmp_path / "a.jpg", red_image(200, 400, left=80, top=40, side=80))
    for option in ([], ["--fast-decode"]):
        code, out, _ = run(image, "--imgsz", "48", "96", "--jsonl", "-", *option)
        record = json.loads(out)
        assert (code, record["height"], record["width"]) == (0, 200, 400)
        np.testing.assert_allclose(record["detections"][0]["box"], [80, 40, 160, 120], atol=6)
    assert decoded == [cv2.IMREAD_COLOR, cv2.IMREAD_REDUCED_COLOR_4]


def test_quiet_says_nothing(run: Run, tmp_path: Path) -> None:
    assert run(write_image(tmp_path / "a.png"), "--quiet") == (0, "", "")


def test_options_reach_the_engine(run: Run, tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    run(
        image,
        "--threads",
        "2",
        "--device",
        "cuda",
        "--preset",
        "tiny",
        "--classes",
        "a,b",
        "--convention",
        "authors",
    )
    run(image)
    assert run.asked == [  # pyright: ignore[reportFunctionMemberAccess]
        {
            "model": "model.pth",
            "device": "cuda",
            "threads": 2,
            "preset": "tiny",
            "class_names": ["a", "b"],
            "convention": "authors",
        },
        {"model": "model.pth", "device": "cpu"},
    ]


def test_max_det_conf_and_imgsz(run: Run, tmp_path: Path, engine: RedEngine) -> None:
    seen: list[Any] = []
    real = engine._run
    engine._run = lambda images, *rest: (
        seen.append((images.shape, *rest[1:])) or real(images, *rest)
    )  # pyright: ignore[reportAttributeAccessIssue]
    image = write_image(tmp_path / "a.png")
    assert (
        run(image, "--conf", "0.5", "--iou", "0.4", "--imgsz", "128", "64", "--max-det", "1")[0]
        == 0
    )
    assert seen == [((1, 64, 96, 3), 0.5, 0.4)]


def test_coco_ids_from_annotations(run: Run, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "images" / name)
    images = [{"id": 11, "file_name": "b.png"}, {"id": 12, "file_name": "a.png"}]
    categories = [{"id": 5, "name": CLASSES[1]}, {"id": 3, "name": CLASSES[0]}]
    (tmp_path / "annotations.json").write_text(
        json.dumps({"images": images, "categories": categories})
    )
    assert (
        run(
            tmp_path / "images",
            "--json",
            "r.json",
            "--coco-annotations",
            tmp_path / "annotations.json",
        )[0]
        == 0
    )
    assert [
        (row["image_id"], row["category_id"]) for row in json.loads(Path("r.json").read_text())
    ] == [(12, 3), (11, 3)]


def test_ids_count_the_images_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "images" / name)
    (tmp_path / "images" / "b.png").write_bytes(b"")
    assert run(tmp_path / "images", "--json", "r.json")[0] == 1
    assert [row["image_id"] for row in json.loads(Path("r.json").read_text())] == [1, 3]


def test_pages_animations_and_odd_names(run: Run, tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9.png")
    write_image(tmp_path / "in" / "x.png").rename(tmp_path / "in" / latin)
    write_image(tmp_path / "in" / "x.png").rename(tmp_path / "in" / f"{'n' * 249}.png")
    write_pages(tmp_path / "in" / "pages.tif")
    write_animation(tmp_path / "in" / "moving.gif")
    (tmp_path / "in" / "notes.md").write_text("text")
    code, out, err = run(
        tmp_path / "in", "--output", "out", "--jsonl", "r.jsonl", "--json", "r.json", "--crops", "c"
    )
    assert code == 0, err
    assert "1 no image or video (notes.md)" in err
    assert len(out.splitlines()) == 8
    assert r"caf\xe9.png: 1 red thing" in out
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(
        [latin, f"{'n' * 249}.png", "moving.mp4", *(f"pages-{i}.jpg" for i in (1, 2, 3))]
    )
    assert len(list(Path("c").iterdir())) == 8
    assert len(json.loads(Path("r.json").read_text())) == 8
    records = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [record.get("page") for record in records if record["source"].endswith("pages.tif")] == [
        1,
        2,
        3,
    ]
    assert str(tmp_path / "in" / latin) in [record["source"] for record in records]
    assert run(tmp_path / "in", "--first-page", "--json", "r.json")[0] == 0
    ids = [row["image_id"] for row in json.loads(Path("r.json").read_text())]
    assert ids == [1, 2, 3, 4]


def test_ids_of_pages(run: Run, tmp_path: Path) -> None:
    write_pages(tmp_path / "a.tif")
    write_image(tmp_path / "b.png")
    assert run(tmp_path / "a.tif", tmp_path / "b.png", "--json", "r.json")[0] == 0
    ids = [row["image_id"] for row in json.loads(Path("r.json").read_text())]
    assert ids == [1, 2, 3, 4]


def test_equal_names_in_two_folders(run: Run, tmp_path: Path) -> None:
    one, two = (
        write_image(tmp_path / "one" / "a.png"),
        write_image(tmp_path / "two" / "a.png", red_image(left=40)),
    )
    assert run(one, two, "--output", "out", "--quiet")[0] == 0
    images = [cv2.imread(f"out/{folder}/a.png") for folder in ("one", "two")]
    assert images[0] is not None
    assert images[1] is not None
    assert (images[0] != images[1]).any()


class TestBadInput:
    def test_no_such_file(self, run: Run) -> None:
        assert_one_line(run("none.jpg", "--output", "out"), "none.jpg", "no such file")

    def test_a_folder_without_images(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert_one_line(run(tmp_path / "empty", "--output", "out"), "no image or video")

    def test_a_truncated_jpeg(self, run: Run, tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.jpg")
        path.write_bytes(path.read_bytes()[:-100])
        assert_one_line(
            run(
                path,
                "--output",
                "out",
                "--json",
                "r.json",
                "--jsonl",
                "r.jsonl",
                "--crops",
                "crops",
            ),
            "cut",
        )

    @pytest.mark.parametrize("data", [b"", b"plain text, not an image\n" * 20])
    def test_a_file_that_is_no_image(self, run: Run, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "a.jpg").write_bytes(data)
        assert_one_line(run(tmp_path / "a.jpg", "--output", "out"), "a.jpg", "image")

    @pytest.mark.parametrize("size", [(1, 1), (20, 20000), (20000, 20)])
    def test_odd_sizes_work(self, run: Run, tmp_path: Path, size: tuple[int, int]) -> None:
        code, _, _ = run(
            write_image(tmp_path / "a.png", np.full((*size, 3), 60, np.uint8)),
            "--output",
            "out",
            "--imgsz",
            "64",
            "96",
        )
        drawn = cv2.imread("out/a.png")
        assert code == 0
        assert drawn is not None
        assert drawn.shape == (*size, 3)

    def test_sixteen_bits_work(self, run: Run, tmp_path: Path) -> None:
        cv2.imwrite(str(tmp_path / "a.png"), red_image().astype(np.uint16) * 257)
        assert run(tmp_path / "a.png")[:2] == (0, f"{tmp_path / 'a.png'}: 1 red thing\n")

    def test_too_many_pixels(self, run: Run, tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.png")
        assert_one_line(run(path, "--max-pixels", "1000"), "3,072 pixels", "--max-pixels")
        assert run(path, "--max-pixels", "4000")[0] == 0

    def test_a_video_without_frames(self, run: Run, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.mp4", moving_images(4), movflags="faststart")
        path.write_bytes(path.read_bytes().split(b"mdat")[0] + b"mdat")
        assert_one_line(run(path, "--output", "out"), "not one frame")

    def test_a_cut_video_keeps_what_was_decoded(self, run: Run, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.mp4", moving_images(40), movflags="faststart")
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
        code, out, err = run(path, "--output", "out")
        assert code == 1
        assert "of 40 frames" in err
        assert "failed: " in err.splitlines()[-1]
        with av.open("out/a.mp4") as container:
            assert len(list(container.decode(video=0))) == len(out.splitlines()) > 5

    def test_one_bad_image_of_many(self, run: Run, tmp_path: Path) -> None:
        for name in ("a.png", "c.png"):
            write_image(tmp_path / "images" / name)
        (tmp_path / "images" / "b.png").write_text("text")
        code, out, err = run(tmp_path / "images", "--output", "out", "--batch", "2")
        assert code == 1
        assert len(out.splitlines()) == 2
        assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "c.png"]
        warning, closing_line, failure = err.splitlines()
        assert warning.startswith(f"warning: {tmp_path / 'images' / 'b.png'}: not an image")
        assert closing_line.startswith("2 frames in ")
        assert failure == "failed: 1 images or frames could not be read"

    def test_nothing_readable_of_many(self, run: Run, tmp_path: Path) -> None:
        for name in ("a.jpg", "b.jpg"):
            (tmp_path / name).write_text("text")
        code, _, err = run(tmp_path / "*.jpg", "--output", "out")
        assert code == 2
        assert err.splitlines()[-1].startswith("error: none of the 2 ")
        assert list(Path.cwd().iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--conf", "1.5"], ["conf is 1.5", "0 to 1"]),
            (["--conf", "-0.1"], ["conf is -0.1"]),
            (["--conf", "nan"], ["conf is nan"]),
            (["--iou", "2"], ["iou is 2.0"]),
            (["--imgsz", "0", "100"], ["imgsz is 0 100", "positive"]),
            (["--imgsz", "-5", "100"], ["imgsz is -5 100"]),
            (["--batch", "0"], ["batch is 0", "positive"]),
            (["--max-det", "0"], ["max_det is 0"]),
            (["--max-det", "101"], ["max_det is 101", "1 to 4"]),
            (["--max-pixels", "0"], ["max_pixels is 0"]),
            (["--coco-annotations", "x.json"], ["--json"]),
            (["--output", "/proc/none"], ["cannot be written"]),
            (["--output", "/dev/null/out"], ["cannot be written"]),
            (["--json", "/dev/null/r.json"], ["cannot be written"]),
            (["--jsonl", "/dev/null/r.jsonl"], ["cannot be written"]),
            (["--crops", "/dev/null/crops"], ["cannot be written"]),
            (["--output", "a.mp4"], ["cannot hold this input"]),
        ],
    )
    def test_values_out_of_range(
        self, run: Run, tmp_path: Path, arguments: list[str], words: list[str]
    ) -> None:
        assert_one_line(run(write_image(tmp_path / "a.png"), *arguments), *words)

    def test_fast_decode_of_what_is_shown_or_no_image(self, run: Run, tmp_path: Path) -> None:
        image = write_image(tmp_path / "a.jpg")
        assert_one_line(
            run(image, "--fast-decode", "--output", "out"),
            "--fast-decode reads images smaller",
            "whole ones are needed for --output;",
        )
        assert_one_line(
            run(image, "--fast-decode", "--crops", "c", "--show"), "needed for --crops and --show;"
        )
        assert_one_line(
            run(write_video(tmp_path / "v.mp4", moving_images(2)), "--fast-decode"),
            "v.mp4",
            "leave --fast-decode out",
        )

    def test_an_input_is_never_overwritten(self, run: Run, tmp_path: Path) -> None:
        path = write_image(tmp_path / "a.png")
        before = path.read_bytes()
        assert_one_line(run(path, "--output", tmp_path), "would be overwritten")
        assert path.read_bytes() == before

    @pytest.mark.parametrize("option", ["--json", "--jsonl", "--output"])
    def test_no_output_replaces_anything_that_is_read(
        self, run: Run, tmp_path: Path, option: str
    ) -> None:
        image = write_image(tmp_path / "a.png")
        listing, truth = tmp_path / "list.txt", tmp_path / "truth.json"
        listing.write_text("a.png\n")
        truth.write_text(
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "a.png"}],
                    "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES)],
                }
            )
        )
        model = tmp_path / "model.pth"
        model.write_text("weights")
        (tmp_path / "hard.png").hardlink_to(image)
        targets = (image, tmp_path / "hard.png")
        targets += () if option == "--output" else (listing, truth, model)
        before = {path: path.read_bytes() for path in targets}
        for target in targets:
            more = ["--coco-annotations", truth, "--json", "r.json"] if target == truth else []
            if target == truth and option == "--json":
                more = more[:2]
            result = run(listing, option, target, *more, model=str(model))
            assert_one_line(result, "would be overwritten")
            assert {path: path.read_bytes() for path in targets} == before

    def test_two_outputs_of_one_name(self, run: Run, tmp_path: Path) -> None:
        image = write_image(tmp_path / "a.png")
        assert_one_line(run(image, "--json", "r", "--jsonl", "./r"), "is written by --json, too")

    def test_crops_replace_no_input(self, run: Run, tmp_path: Path) -> None:
        image = write_image(tmp_path / "a.png")
        crop = write_image(tmp_path / "a_000_red-thing.jpg")
        assert_one_line(run(image, crop, "--crops", tmp_path), "has the name of a crop")
        assert run(image, "--crops", tmp_path)[0] == 0

    def test_a_video_of_an_unknown_codec_spoils_no_run(self, run: Run, tmp_path: Path) -> None:
        image = write_image(tmp_path / "a.png")
        video = write_video(tmp_path / "b.mp4", moving_images(3))
        video.write_bytes(video.read_bytes().replace(b"avc1", b"zzzz"))
        code, out, err = run(image, video, "--json", "r.json", "--jsonl", "r.jsonl")
        assert (code, out) == (1, f"{image}: 1 red thing\n")
        assert "b.mp4" in err
        assert "Traceback" not in err
        assert len(json.loads(Path("r.json").read_text())) == 1
        assert len(Path("r.jsonl").read_text().splitlines()) == 1

    def test_a_frame_that_an_output_cannot_take(self, run: Run, tmp_path: Path) -> None:
        wide = write_image(tmp_path / "b.png", np.full((8, 70_000, 3), 60, np.uint8))
        images = [write_image(tmp_path / "a.png"), wide.rename(tmp_path / "b.jpg")]
        code, out, err = run(*images, "--output", "out", "--json", "r.json", "--imgsz", "48", "64")
        assert (code, len(out.splitlines())) == (1, 2)
        assert "70000 x 8 pixels cannot be written as .jpg" in err
        assert sorted(path.name for path in Path("out").iterdir()) == ["a.png"]
        assert len(json.loads(Path("r.json").read_text())) == 1

    def test_a_full_disk(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        cv2.imwrite(str(tmp_path / "a.png"), red_image())
        code, _, err = run(tmp_path / "a.png", "--output", "out", "--quiet")
        assert (code, err.count("\n")) == (2, 1)
        assert "No space left on device" in err
        assert list(Path("out").iterdir()) == []

    def test_show_without_windows(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("DISPLAY", raising=False)
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
        assert_one_line(run(write_image(tmp_path / "a.png"), "--show"), "--show")

    def test_options_of_checkpoints_beside_an_artefact(self, run: Run, tmp_path: Path) -> None:
        assert_one_line(
            run(write_image(tmp_path / "a.png"), "--preset", "tiny", model="model.onnx"), "--preset"
        )

    def test_usage_errors_exit_with_2(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in (
            ["m.onnx"],
            ["m.onnx", "a.jpg", "--conf", "high"],
            ["m.onnx", "a.jpg", "--device", "tpu"],
        ):
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line.endswith("see tood-infer --help") for line in lines] == [True] * 3


class TestDoubts:
    @pytest.fixture
    def artefact(self, tmp_path: Path) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(b"an artefact")
        return path

    def test_of_an_artefact(self, artefact: Path) -> None:
        manifest = RedEngine().manifest
        assert "no parity verdict" in doubts(artefact, manifest)
        proven = replace(manifest, parity=Parity(), artefact_sha256=file_sha256(artefact))
        assert doubts(artefact, proven) == ""
        artefact.write_bytes(b"another")
        assert "another SHA-256" in doubts(artefact, proven)

    def test_are_one_line_on_stderr(
        self, run: Run, artefact: Path, tmp_path: Path, engine: RedEngine
    ) -> None:
        image = write_image(tmp_path / "a.png")
        code, _, err = run(image, "--quiet", model=str(artefact))
        assert (code, err.count("\n")) == (0, 1)
        assert err.startswith("warning: ")
        engine.manifest = Manifest(
            engine.manifest.preset, parity=Parity(), artefact_sha256=file_sha256(artefact)
        )
        assert run(image, "--quiet", model=str(artefact))[2] == ""


class TestAnotherFileThanItsManifestDescribes:
    @pytest.fixture
    def artefact(self, tmp_path: Path, engine: RedEngine) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(b"an artefact")
        engine.manifest = replace(engine.manifest, parity=Parity(), artefact_sha256="0" * 64)
        path.with_suffix(".json").write_text(engine.manifest.to_json())
        return path

    def test_is_refused_before_it_is_opened(self, run: Run, artefact: Path, tmp_path: Path) -> None:
        image = write_image(tmp_path / "a.png")
        result = run(image, "--json", "r.json", model=str(artefact))
        assert_one_line(result, "another SHA-256", "--allow-mismatch")
        assert run.asked == []  # pyright: ignore[reportFunctionMemberAccess]

    def test_runs_where_that_is_asked_for(self, run: Run, artefact: Path, tmp_path: Path) -> None:
        image = write_image(tmp_path / "a.png")
        code, _, err = run(image, "--quiet", "--allow-mismatch", model=str(artefact))
        assert (code, err.count("\n")) == (0, 1)
        assert err.startswith("warning: ")

    def test_a_checkpoint_has_nothing_to_mismatch(self, run: Run, tmp_path: Path) -> None:
        assert_one_line(run(write_image(tmp_path / "a.png"), "--allow-mismatch"), "no manifest")


def test_the_pixel_limit_of_opencv_is_raised_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENCV_IO_MAX_IMAGE_PIXELS", raising=False)
    image = write_image(tmp_path / "a.png")
    run(image, "--max-pixels", "1000000")
    assert "OPENCV_IO_MAX_IMAGE_PIXELS" not in os.environ
    run(image, "--max-pixels", str(2**31))
    assert os.environ.pop("OPENCV_IO_MAX_IMAGE_PIXELS") == str(2**31)


def test_the_default_pixel_limit_is_the_librarys() -> None:
    from tood_deploy.data.image_header import MAX_PIXELS

    assert infer.build_parser().get_default("max_pixels") == MAX_PIXELS


SLOW_RUN = """
import sys
sys.path.insert(0, "tests")
from inference.fakes import RedEngine
from tood_deploy.cli.infer import main
from tood_deploy.inference import detector
detector.open_engine = lambda model, **options: RedEngine(0.02)
sys.exit(main(sys.argv[1:]))
"""


def start_slow_run(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(SLOW_RUN), "model.pth", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_an_interrupted_video_plays(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_images(24) * 50)
    process = start_slow_run(
        video, "--output", tmp_path / "out", "--jsonl", "-", "--json", tmp_path / "r.json"
    )
    assert process.stdout is not None
    written = [json.loads(process.stdout.readline()) for _ in range(10)]
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    lines = len(written) + len(rest.splitlines())
    with av.open(str(tmp_path / "out" / "v.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert len(times) == lines < 1200
    assert times == pytest.approx([0.04 * i for i in range(lines)])
    assert len(json.loads((tmp_path / "r.json").read_text())) == lines
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["v.mp4"]


def test_a_reader_that_goes_away_ends_the_run(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_images(24) * 50)
    code, err = run_and_stop_reading(video, "--jsonl", "-")
    assert (code, err) == (141, "")


def test_other_outputs_are_completed_where_nobody_reads_stdout(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_images(24) * 2)
    results, lines = tmp_path / "r.json", tmp_path / "r.jsonl"
    code, err = run_and_stop_reading(
        video, "--output", tmp_path / "out.mp4", "--json", results, "--jsonl", lines
    )
    assert (code, err) == (141, "")
    assert len(json.loads(results.read_text())) == len(lines.read_text().splitlines()) == 48
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert len(list(container.decode(video=0))) == 48


def run_and_stop_reading(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and stderr of a run whose stdout is read for one line; without the closing line."""
    process = start_slow_run(*arguments)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    lines = [line for line in err.splitlines(keepends=True) if " frames in " not in line]
    return process.wait(timeout=30), "".join(lines)


class TestSlices:
    def test_an_image_in_slices(self, run: Run, tmp_path: Path) -> None:
        image = write_image(tmp_path / "a.png", red_image(300, 420, left=200, top=100, side=16))
        size = ("--slice", "96", "--imgsz", "96", "96", "--no-whole")
        code, _, err = run(image, "--jsonl", "r.jsonl", "--batch", "4", *size)
        assert code == 0, err
        record = json.loads(Path("r.jsonl").read_text(encoding="utf-8"))
        assert [one["box"] for one in record["detections"]] == [[200, 100, 216, 116]]

    def test_a_small_image_is_one_window_and_said_once(self, run: Run, tmp_path: Path) -> None:
        for name in "ab":
            write_image(tmp_path / "images" / f"{name}.png")
        code, _, err = run(tmp_path / "images", "--slice", "640", "640")
        assert code == 0
        assert err.count("640 x 640") == 1

    def test_classes_and_thresholds(self, run: Run, tmp_path: Path) -> None:
        image = write_image(tmp_path / "a.png")
        Path("t.json").write_text(json.dumps({"default": 0.9, "classes": {CLASSES[0]: 0.5}}))
        for given, expected in (
            (("--conf", f"0.9,{CLASSES[0]}=0.5"), 1),
            (("--conf", f"0.2,{CLASSES[0]}=0.8"), 0),
            (("--conf", "t.json"), 1),
            (("--only", CLASSES[0]), 1),
            (("--only", CLASSES[1]), 0),
            (("--except", CLASSES[0]), 0),
        ):
            code, _, err = run(image, "--jsonl", "r.jsonl", *given)
            assert code == 0, err
            record = json.loads(Path("r.jsonl").read_text(encoding="utf-8"))
            assert len(record["detections"]) == expected, given

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (("--slice", "0"), ("0", "positive")),
            (("--slice", "640", "-1"), ("-1", "positive")),
            (("--slice", "1", "2", "3"), ("1 2 3",)),
            (("--slice", "64", "--overlap", "0.95"), ("0.95", "0.9")),
            (("--slice", "64", "--merge-threshold", "2"), ("2",)),
            (("--overlap", "0.1"), ("--overlap", "--slice")),
            (("--no-whole",), ("--no-whole", "--slice")),
            (("--slice", "64", "--fast-decode"), ("fast_decode",)),
            (("--conf", "0.3,red thin=0.5"), ("did you mean 'red thing'",)),
            (("--conf", "0.3,red thing=7"), ("7",)),
            (("--conf", "none.json"), ("none.json",)),
            (("--only", "zebra"), ("zebra", "red thing")),
            (("--only", "red thing", "--except", "red thing"), ("one of them",)),
            (("--crs", "EPSG:4326"), ("--geojson",)),
            (("--geojson", "out.geojson"), ("georeferenced",)),
        ],
    )
    def test_bad_values_are_one_line(
        self, run: Run, tmp_path: Path, given: tuple[str, ...], words: tuple[str, ...]
    ) -> None:
        if "--geojson" in given:
            pytest.importorskip("rasterio")
        image = write_image(tmp_path / "a.png")
        assert_one_line(run(image, *given), *words)
