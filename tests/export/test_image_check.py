"""Images are looked at evenly, as many as there is time for, and those that fail are named."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from inference.fakes import red_image, write_image

from tood_deploy.data import images as image_check
from tood_deploy.data.images import ImagesToCheck, check_images, spread_evenly
from tood_deploy.errors import InputError


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [write_one(tmp_path / f"{number}.png") for number in range(6)]


def write_one(path: Path) -> Path:
    write_image(path, red_image())
    return path


@pytest.mark.parametrize("count", [1, 2, 5, 8, 100])
def test_every_beginning_is_spread(count: int) -> None:
    order = spread_evenly(count)
    assert sorted(order) == list(range(count))
    if count == 8:
        assert order == [0, 4, 2, 6, 1, 5, 3, 7]


def test_whole_images_pass(images: Sequence[Path]) -> None:
    check_images([])
    check_images([ImagesToCheck("--a", images), ImagesToCheck("--b", images[:1])])


def test_all_headers_come_before_the_first_whole_image(images: Sequence[Path]) -> None:
    images[5].write_bytes(b"")
    decoded: list[Path] = []
    with pytest.raises(
        InputError,
        match=r"^--a: 1 of 6 images cannot be read: .*5\.png; expected whole image files",
    ):
        check_images([ImagesToCheck("--a", images, decoded.append)])
    assert not decoded


def test_a_missing_file_is_named(images: Sequence[Path]) -> None:
    images[2].unlink()
    with pytest.raises(InputError, match=r"2\.png"):
        check_images([ImagesToCheck("--a", images, decode=None)])


def test_the_first_are_named_and_the_others_counted(images: Sequence[Path]) -> None:
    for path in images[:5]:
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        InputError,
        match=r"5 of 6 images cannot be read: \S+0\.png, \S+1\.png, \S+2\.png and 2 more;",
    ):
        check_images([ImagesToCheck("--a", images)], seconds=60)


def test_no_longer_than_there_is_time(
    images: Sequence[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which every decoded image takes a second."""
    now = [0.0]
    decoded: list[str] = []

    def decode(path: Path) -> None:
        now[0] += 1
        decoded.append(path.name)

    monkeypatch.setattr(image_check.time, "perf_counter", lambda: now[0])
    check_images(
        [ImagesToCheck("--a", images, decode), ImagesToCheck("--b", images, decode)], seconds=5
    )
    assert decoded == ["0.png", "4.png", "2.png", *["0.png", "4.png", "2.png"]], (
        "half of the time each"
    )
    decoded.clear()
    check_images([ImagesToCheck("--a", images, decode)], seconds=0)
    assert decoded == ["0.png"], "one at least"
