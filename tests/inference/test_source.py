"""What a user names becomes a source of frames: files, folders, cameras, streams."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from inference.fakes import moving_images, red_image, write_image, write_video
from inference.servers import serve
from inference.test_file_list import write_animation, write_pages

from tood_deploy.data.image_header import KNOWN_KINDS
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference import image_source as image_source_module
from tood_deploy.inference.source import ImageSource, open_source
from tood_deploy.inference.video import VideoSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "c.webp"):
        write_image(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.md").write_text("no image")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"no image either")
    write_image(tmp_path / "images" / "inner" / "d.png")
    return tmp_path / "images"


def names(source: Any) -> list[str]:
    return [Path(frame.name).name for frame in source]


def test_a_image_and_a_video(folder: Path, tmp_path: Path) -> None:
    assert isinstance(open_source(folder / "b.png"), ImageSource)
    assert isinstance(open_source(write_video(tmp_path / "v.mp4", moving_images(2))), VideoSource)


def test_a_folder_gives_its_own_images_in_order(folder: Path) -> None:
    source = open_source(folder)
    assert names(source) == ["a.JPG", "b.png", "c.webp"]
    assert (source.kind, source.length, source.skipped) == ("images", 3, 0)


def test_a_glob(folder: Path) -> None:
    assert names(open_source(f"{folder}/*.png")) == ["b.png"]
    assert names(open_source(f"{folder}/**/*.png")) == ["b.png", "d.png"]


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    assert names(open_source(write_image(tmp_path / "a[1].png"))) == ["a[1].png"]


def test_a_list_is_relative_to_its_own_folder(folder: Path) -> None:
    listed = folder / "list.txt"
    listed.write_text(f"# chosen\n\nb.png\n  inner/d.png \n{folder / 'a.JPG'}\n")
    assert names(open_source(listed)) == ["b.png", "d.png", "a.JPG"]


def test_several_sources_each_file_once(folder: Path) -> None:
    assert names(open_source([folder / "c.webp", folder, folder / "inner" / ".." / "b.png"])) == [
        "c.webp",
        "a.JPG",
        "b.png",
    ]


def test_images_and_videos_together(folder: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", moving_images(2))
    source = open_source([folder / "b.png", video])
    assert names(source) == ["b.png", "v.mp4", "v.mp4"]
    assert (source.kind, source.length) == ("video", None)


def test_a_file_without_a_known_suffix_is_recognised(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png").rename(tmp_path / "image")
    write_video(tmp_path / "v.mp4", moving_images(2)).rename(tmp_path / "video")
    assert isinstance(open_source(tmp_path / "image"), ImageSource)
    assert isinstance(open_source(tmp_path / "video"), VideoSource)


def test_one_bad_image_is_told_and_the_rest_goes_on(folder: Path) -> None:
    (folder / "aa.jpg").write_text("text under a wrong name")
    (folder / "zz.png").write_bytes(b"")
    source = open_source(folder)
    assert names(source) == ["a.JPG", "b.png", "c.webp"]
    assert source.skipped == 2
    assert [problem.split(": ")[1] for problem in source.problems] == [
        f"not an image; expected {KNOWN_KINDS}",
        "empty file; expected an image",
    ]


def test_a_listed_file_that_is_missing_is_told(folder: Path) -> None:
    listed = folder / "list.txt"
    listed.write_text("b.png\nnone.png\n")
    source = open_source(listed)
    assert names(source) == ["b.png"]
    assert "No such file" in source.problems[0]


def test_nothing_readable_at_all_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=r"none of the 2 .*a\.jpg: not an image"):
        list(open_source(tmp_path))


def test_a_bad_image_alone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("text")
    for spec in (tmp_path / "a.jpg", tmp_path):
        with pytest.raises(InputError, match="not an image"):
            list(open_source(spec))


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80")
    cases = {
        tmp_path / "none.jpg": "no such file or folder",
        tmp_path / "empty": "no image or video",
        tmp_path / "empty.txt": "names no file",
        tmp_path / "binary.txt": "cannot be read as a list",
        f"{tmp_path}/*.png": "no file has such a name",
        "x" * 5000: "no such file",
    }
    for spec, message in cases.items():
        with pytest.raises(InputError, match=message):
            open_source(spec)
    with pytest.raises(InputError, match="no source given"):
        open_source([])


def test_the_pixel_limit_reaches_every_file(tmp_path: Path) -> None:
    write_image(tmp_path / "small.png", np.zeros((4, 4, 3), np.uint8))
    write_image(tmp_path / "large.png", red_image())
    source = open_source(tmp_path, max_pixels=100)
    assert names(source) == ["small.png"]
    assert "--max-pixels" in source.problems[0]
    with pytest.raises(ToodError, match="max_pixels is 0"):
        open_source(tmp_path, max_pixels=0)


def test_an_image_at_an_address_is_an_image() -> None:
    data = cv2.imencode(".png", red_image())[1].tobytes()
    for content_type in ("image/png", "application/octet-stream"):
        with serve(content_type, lambda client: client.write(data)) as address:
            source = open_source(address)
            (frame,) = source
        assert (source.kind, frame.name) == ("images", address)
        assert (frame.image_bgr == red_image()).all()


def test_every_page_is_a_frame(tmp_path: Path) -> None:
    path = write_pages(tmp_path / "a.tif")
    source = open_source(path)
    assert [(frame.index, frame.page, frame.timestamp_s) for frame in source] == [
        (0, 1, None),
        (1, 2, None),
        (2, 3, None),
    ]
    assert (source.kind, source.length, source.notes) == ("images", 3, [])
    data = path.read_bytes()
    path.write_bytes(
        data[: len(data) * 2 // 3] + bytes(len(data) // 6) + data[len(data) * 5 // 6 :]
    )
    assert len(list(open_source(path, first_page=True))) == 1


def test_an_animation_is_a_video(tmp_path: Path) -> None:
    source = open_source(write_animation(tmp_path / "a.gif"))
    frames = list(source)
    assert source.kind == "video"
    assert [frame.timestamp_s for frame in frames] == [0.0, 0.1, 0.4]
    assert (frames[0].image_bgr != frames[2].image_bgr).any()
    first = open_source(tmp_path / "a.gif", first_page=True)
    assert len(list(first)) == 1
    assert first.kind == "images"
    assert "the first of 3" in first.notes[0]


def test_whatever_one_file_does_the_rest_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Any) -> bytes:
        if Path(path).name == "b.png":
            raise RuntimeError("a library met something")
        return Path(path).read_bytes()

    monkeypatch.setattr(image_source_module, "read_file", fail)
    source = open_source(folder)
    assert names(source) == ["a.JPG", "c.webp"]
    assert source.skipped == 1
    assert "b.png: cannot be read (RuntimeError: a library met something)" in source.problems[0]
