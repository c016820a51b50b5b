"""What a user names becomes a source of frames: files, folders, cameras, streams."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference.fakes import moving_images, red_image, write_image, write_video

from tood_deploy.data.image_header import IMAGE_SUFFIXES
from tood_deploy.errors import InputError, ToodError
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
        "not an image; expected one of " + problem_kinds(),
        "empty file; expected an image",
    ]


def problem_kinds() -> str:
    return ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))


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
