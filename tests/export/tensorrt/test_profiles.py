"""Sizes and batches of an engine: how they are written, and what is refused."""

import pytest

from tood_deploy.errors import ToodError
from tood_deploy.export.tensorrt.options import (
    Profiles,
    batch_from_text,
    default_shapes,
    shapes_from_text,
)


def test_landscape_and_portrait_by_default() -> None:
    assert default_shapes((800, 1333)) == ((800, 1344), (1344, 800))
    assert default_shapes((1333, 800)) == ((800, 1344), (1344, 800))
    assert default_shapes((640, 640)) == ((640, 640),)
    assert default_shapes((1, 1)) == ((32, 32),)


def test_shapes_read_back() -> None:
    text = "800x1344,1344x800"
    assert Profiles(shapes_from_text(text)).text() == text
    assert shapes_from_text(" 32x64 ") == ((32, 64),)


def test_batches() -> None:
    assert batch_from_text("1,8,32") == (1, 8, 32)
    assert batch_from_text("4") == (1, 4, 4)


def test_manifest_says_size_and_batch_of_each() -> None:
    assert Profiles(((64, 96), (96, 64)), (1, 2, 4)).to_list() == [
        {"size_hw": [64, 96], "batch": [1, 2, 4]},
        {"size_hw": [96, 64], "batch": [1, 2, 4]},
    ]


@pytest.mark.parametrize(
    ("shapes", "batch", "message"),
    [
        ((), (1, 1, 1), "shapes are 0; expected 1 to 6"),
        (tuple((32, 32 * i) for i in range(1, 8)), (1, 1, 1), "shapes are 7; expected 1 to 6"),
        (
            ((800, 1333),),
            (1, 1, 1),
            "shape 800x1333: expected height and width as multiples of 32; give 800x1344",
        ),
        (((0, 32),), (1, 1, 1), "shape 0x32: .* give 32x32"),
        (((32, 32), (32, 32)), (1, 1, 1), "one stands there twice"),
        (
            ((32, 32),),
            (2, 1, 4),
            "batch is 2,1,4; expected MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX",
        ),
        (((32, 32),), (1, 8, 4), "batch is 1,8,4"),
        (((32, 32),), (0, 1, 4), "batch is 0,1,4"),
    ],
)
def test_what_no_profile_holds_is_refused(
    shapes: tuple[tuple[int, int], ...], batch: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ToodError, match=message):
        Profiles(shapes, batch)


@pytest.mark.parametrize(
    "text", ["", "800", "800x", "800x1344;32x32", "800x1344,", "-32x32", "auto"]
)
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(ToodError, match="expected HxW, or several"):
        shapes_from_text(text)


@pytest.mark.parametrize("text", ["", "a", "1,2", "1,2,3,4", "1.5", "-1"])
def test_other_batches_are_refused(text: str) -> None:
    with pytest.raises(ToodError, match="expected MIN,OPT,MAX"):
        batch_from_text(text)
