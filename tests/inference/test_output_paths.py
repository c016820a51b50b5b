"""Which file each output goes to."""

from pathlib import Path, PurePath

import pytest

from tood_deploy.errors import OutputError
from tood_deploy.inference.frame import Input
from tood_deploy.inference.output_paths import plan_outputs, shorten


def inputs_of(names: list[str]) -> list[Input]:
    moving = (".avi", ".mov", ".mp4", ".webm")
    return [
        Input(
            name,
            "video" if name.endswith(moving) or "/dev/" in name or "rtsp" in name else "images",
        )
        for name in names
    ]


def planned(names: list[str], output: str = "out") -> list[str]:
    return [str(path) for path in plan_outputs(inputs_of(names), Path(output)).values()]


@pytest.mark.parametrize(
    ("names", "outputs"),
    [
        (["a/x.jpg"], ["out/x.jpg"]),
        (["a/x.jpg", "a/y.PNG"], ["out/x.jpg", "out/y.PNG"]),
        (["a/x.jpg", "b/x.jpg"], ["out/a/x.jpg", "out/b/x.jpg"]),
        (
            ["r/a/x.jpg", "r/b/c/x.jpg", "r/b/y.jpg"],
            ["out/a/x.jpg", "out/b/c/x.jpg", "out/b/y.jpg"],
        ),
        (["../one/x.jpg", "two/x.jpg"], None),
        (["x.avi"], ["out/x.mp4"]),
        (["x.avi", "x.mov", "x.mp4"], ["out/x.avi.mp4", "out/x.mov.mov", "out/x.mp4.mp4"]),
        (["x.avi", "x.webm"], ["out/x.avi.mp4", "out/x.webm.mp4"]),
        (["x.gif", "y.avif", "z.pgm"], ["out/x.png", "out/y.png", "out/z.png"]),
        (["X.jpg", "sub/x.JPG"], ["out/X.jpg", "out/sub/x.JPG"]),
        (["rtsp://user:secret@camera.local:554/main/1?x=2"], ["out/camera_local_main_1.mp4"]),
        (["/dev/video0"], ["out/video0.mp4"]),
    ],
)
def test_every_input_has_a_file_of_its_own(names: list[str], outputs: list[str] | None) -> None:
    result = planned(names)
    assert len(set(result)) == len(names)
    assert all(name.startswith("out/") and ".." not in name for name in result)
    assert outputs is None or result == outputs


def test_names_that_some_file_systems_take_for_one() -> None:
    assert planned(["a/IMG.JPG", "a/img.jpg"]) == ["out/IMG.JPG", "out/img-2.jpg"]
    composed = planned(["a/\u00e9.jpg", "a/e\u0301.jpg"])
    assert composed == ["out/\u00e9.jpg", "out/e\u0301-2.jpg"]
    assert planned(["a.jpg", "A.JPG", "a-2.jpg"])[2] != "out/A-2.JPG"


def test_pages_have_numbers() -> None:
    result = plan_outputs([Input("x/a.tif", "images", 12), Input("x/a-01.jpg")], Path("out"))
    assert [str(path) for path in result.values()] == [
        *(f"out/a.tif-{page:02d}.jpg" for page in range(1, 13)),
        "out/a-01.jpg.jpg",
    ]
    assert list(plan_outputs([Input("a.tif", "images", 3)], Path("out"))) == [
        ("a.tif", 1),
        ("a.tif", 2),
        ("a.tif", 3),
    ]
    with pytest.raises(OutputError, match="one file for 3 pages"):
        plan_outputs([Input("a.tif", "images", 3)], Path("out.jpg"))


def test_an_animation_is_written_as_a_video() -> None:
    result = plan_outputs([Input("a.gif", "video", animated=True), Input("b.gif")], Path("out"))
    assert [str(path) for path in result.values()] == ["out/a.mp4", "out/b.png"]


def test_long_names_are_cut_and_stay_different() -> None:
    names = [f"{'x' * 249}{ending}" for ending in ("1.webm", "2.webm")] + ["\u00e9" * 126 + ".avi"]
    result = planned([*names, names[0].replace("webm", "jpg"), "x" * 251 + ".jpg"])
    assert len(set(result)) == 5
    assert all(len(Path(name).name.encode()) <= 255 for name in result)
    assert shorten(PurePath("x" * 250 + ".jpg"), room=20).suffix == ".jpg"


def test_one_file_for_a_single_input(tmp_path: Path) -> None:
    assert planned(["a.avi"], "b/c.mp4") == ["b/c.mp4"]
    assert planned(["a.jpg"], "c.png") == ["c.png"]
    (tmp_path / "folder.mp4").mkdir()
    assert planned(["a.avi"], str(tmp_path / "folder.mp4")) == [
        str(tmp_path / "folder.mp4" / "a.mp4")
    ]


@pytest.mark.parametrize(
    ("names", "output", "message"),
    [
        (["a.jpg", "b.jpg"], "c.jpg", "one file for 2 inputs"),
        (["a.jpg"], "c.mp4", "cannot hold this input"),
        (["a.mp4"], "c.jpg", "cannot hold this input"),
        (["a.mp4"], "c.webm", r"\.mkv, \.mov, \.mp4"),
    ],
)
def test_files_that_cannot_hold_the_output(names: list[str], output: str, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        planned(names, output)


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for output in (tmp_path, tmp_path / "link", image):
        names = [str(image), str(tmp_path / "b.jpg")][: 2 if output.is_dir() else 1]
        with pytest.raises(OutputError, match="is an input"):
            plan_outputs(inputs_of(names), output)
