"""Which files a user means, and what each of them holds."""

import os
from pathlib import Path

import pytest
from inference.fakes import moving_images, red_image, write_image, write_video
from PIL import Image

from tood_deploy.detections import Detections
from tood_deploy.errors import InputError
from tood_deploy.inference.file_list import FileList, input_of, is_video, list_files
from tood_deploy.inference.frame import Input
from tood_deploy.inference.output_paths import plan_outputs
from tood_deploy.inference.sinks import Annotated
from tood_deploy.inference.source import open_source


def listed(*specs: object) -> FileList:
    return list_files([str(spec) for spec in specs])


def names(files: FileList) -> list[str]:
    return [Path(file.name).name for file in files.inputs]


def write_pages(path: Path, count: int = 3) -> Path:
    pages = [Image.fromarray(red_image()[..., ::-1].copy()) for _ in range(count)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def write_animation(path: Path) -> Path:
    frames = [Image.fromarray(image[..., ::-1].copy()) for image in moving_images(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 300, 50])
    return path


def test_the_content_tells_whatever_the_name_says(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png").rename(tmp_path / "image.mp4")
    video = write_video(tmp_path / "v.mp4", moving_images(2)).rename(tmp_path / "video.jpg")
    photo = write_image(tmp_path / "b.jpg").rename(tmp_path / "PHOTO.JFIF")
    listing = write_image(tmp_path / "c.png").rename(tmp_path / "no-list.txt")
    assert input_of(image) == Input(str(image), "images")
    assert input_of(video) == Input(str(video), "video")
    assert input_of(photo) == Input(str(photo), "images")
    assert listed(listing).inputs == (Input(str(listing), "images"),)
    assert is_video(video)
    assert not is_video(image)


def test_pages_and_animations(tmp_path: Path) -> None:
    pages, moving = write_pages(tmp_path / "a.tif"), write_animation(tmp_path / "b.gif")
    assert input_of(pages) == Input(str(pages), "images", 3)
    assert input_of(moving) == Input(str(moving), "video", animated=True)
    assert input_of(pages, first_page=True) == Input(str(pages))
    assert input_of(moving, first_page=True) == Input(str(moving))
    assert input_of(pages).parts == tuple((str(pages), page) for page in (1, 2, 3))


def test_a_folder_names_what_is_not_run(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png").rename(tmp_path / "image-without-ending")
    write_video(tmp_path / "v.mp4", moving_images(2)).rename(tmp_path / "video-without-ending")
    write_image(tmp_path / "a.png")
    (tmp_path / "inner").mkdir()
    (tmp_path / ".hidden.png").touch()
    for name in ("1.csv", "2.csv", "3.csv", "4.txt"):
        (tmp_path / name).write_text("a,b\n" * 20)
    files = listed(tmp_path)
    assert names(files) == ["a.png", "image-without-ending", "video-without-ending"]
    (note,) = files.notes
    assert "4 no image or video (1.csv, 2.csv, 3.csv and 1 more)" in note
    assert "1 hidden (.hidden.png)" in note
    assert "1 a folder (inner)" in note


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffa.png\r\nb.png\r\n".encode(),
        "\ufeffa.png\r\nb.png".encode("utf-16-le"),
        "\ufeffa.png\nb.png\n".encode("utf-16-be"),
        b"# chosen\n\n  a.png \nb.png",
    ],
)
def test_a_list_of_any_editor(tmp_path: Path, text: bytes) -> None:
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(text)
    files = listed(tmp_path / "list.txt")
    assert names(files) == ["a.png", "b.png"]
    assert files.lists == (str(tmp_path / "list.txt"),)


def test_nothing_changes_a_name_in_a_list(tmp_path: Path) -> None:
    odd = [" a.png", "a.png ", "#1.png", "b\u2028c.png", "d\x0be.png"]
    for name in odd:
        write_image(tmp_path / "x.png").rename(tmp_path / name)
    (tmp_path / "list.txt").write_text("\n".join(odd), encoding="utf-8")
    assert names(listed(tmp_path / "list.txt")) == odd


def test_a_name_that_is_no_utf8_in_a_folder_and_in_a_list(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_image(tmp_path / "a.png").rename(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.png\n")
    assert names(listed(tmp_path / "list.txt")) == names(listed(tmp_path)) == [name]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b.png", "y/" * 3000])
def test_text_that_can_be_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        listed(name)
    write_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(f"{name}\na.png\n")
    assert names(listed(tmp_path / "list.txt"))[1] == "a.png"


@pytest.mark.parametrize("name", [b"12:30:00.mp4", b"file:x.mp4", b"caf\xe9.mkv", b"http:.mp4"])
def test_a_video_of_any_name_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(name))
    write_video(tmp_path / "v.mp4", moving_images(3)).rename(path)
    source = open_source(path)
    (output,) = plan_outputs(source.inputs, Path("out")).values()
    assert output.name == path.name
    with Annotated({(str(path), None): output}) as sink:
        for frame in source:
            sink.write(frame, Detections.empty())
    assert len(list(open_source(Path("out")))) == 3


def test_a_file_named_twice_is_run_once_with_a_note(tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    files = listed(image, tmp_path / ".." / tmp_path.name / "a.png", tmp_path)
    assert files.inputs == (Input(str(image)),)
    assert files.notes == ["2 of 3 names stand for files that are named before; each is run once"]
