"""Sizes, batches and builder options of an engine: how they are written, and what is refused."""

from pathlib import Path
from typing import Any, cast

import pytest

from tood_deploy.engines.tensorrt.library import Flavour, Name
from tood_deploy.errors import ToodError
from tood_deploy.export.tensorrt.options import (
    EngineOptions,
    Profiles,
    SizeOptions,
    batch_from_text,
    default_shapes,
    shapes_from_text,
    shapes_or_auto,
)
from tood_deploy.manifest_sections import OptimizationProfile


def test_landscape_and_portrait_by_default() -> None:
    assert default_shapes((800, 1333)) == ((800, 1344), (1344, 800))
    assert default_shapes((1333, 800)) == ((800, 1344), (1344, 800))
    assert default_shapes((640, 640)) == ((640, 640),)
    assert default_shapes((1, 1)) == ((32, 32),)


def test_shapes_read_back() -> None:
    text = "800x1344,1344x800"
    assert Profiles(shapes_from_text(text)).text() == text
    assert shapes_or_auto(text) == shapes_from_text(text)
    assert shapes_or_auto("auto") == "auto"
    assert shapes_from_text(" 32x64 ") == ((32, 64),)


def test_batches() -> None:
    assert batch_from_text("1,8,32") == (1, 8, 32)
    assert batch_from_text("4") == (1, 4, 4)


def test_manifest_says_size_and_batch_of_each() -> None:
    assert Profiles(((64, 96), (96, 64)), (1, 2, 4)).for_manifest() == (
        OptimizationProfile((64, 96), 1, 2, 4),
        OptimizationProfile((96, 64), 1, 2, 4),
    )


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


@pytest.mark.parametrize("text", ["", "800", "800x", "800x1344;32x32", "800x1344,", "-32x32"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(ToodError, match="expected HxW, or several"):
        shapes_from_text(text)


@pytest.mark.parametrize("text", ["", "a", "1,2", "1,2,3,4", "1.5", "-1"])
def test_other_batches_are_refused(text: str) -> None:
    with pytest.raises(ToodError, match="expected MIN,OPT,MAX"):
        batch_from_text(text)


def test_the_largest_batch_alone() -> None:
    assert SizeOptions(max_batch=4).batches == (1, 4, 4)
    assert SizeOptions(batch=(2, 3, 4)).batches == (2, 3, 4)
    assert SizeOptions().batches == (1, 1, 8)
    with pytest.raises(ToodError, match="largest batch is 0"):
        SizeOptions(max_batch=0)


def flavour(name: str) -> Flavour:
    return Flavour(cast(Name, name), None, "1.0", cast(Any, None))


SET = {
    "optimisation_level": 0,
    "timing_cache": Path("cache"),
    "version_compatible": True,
    "hardware_compatible": True,
    "compute_capabilities": ("8.9",),
}
LACKED_BY = {name: "tensorrt" if name == "compute_capabilities" else "tensorrt_rtx" for name in SET}


@pytest.mark.parametrize("name", SET)
def test_an_option_of_the_other_flavour_is_refused(name: str) -> None:
    options = EngineOptions(**{name: SET[name]})
    with pytest.raises(ToodError, match="means nothing to"):
        options.check(flavour(LACKED_BY[name]))
    (other,) = {"tensorrt", "tensorrt_rtx"} - {LACKED_BY[name]}
    options.check(flavour(other))


def test_what_both_have_passes() -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        EngineOptions().check(flavour(name))
        EngineOptions(workspace_mib=64).check(flavour(name))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workspace_mib": 0}, "workspace is 0 MiB; expected a positive number"),
        ({"optimisation_level": 6}, "optimisation level is 6; expected 0 to 5"),
        ({"optimisation_level": -1}, "expected 0 to 5"),
        ({"compute_capabilities": ("8.9", "8.9")}, "one stands there twice"),
        ({"nms": "plugin"}, "nms is 'plugin'; expected unrolled or loop"),
        (
            {"nms": "loop", "nms_rounds": 16},
            "nms is loop, which ends by itself, and 16 rounds are given; leave --nms-rounds out",
        ),
        ({"nms_rounds": 0}, "nms rounds are 0; expected 1 to 256"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ToodError, match=message):
        EngineOptions(**values)
