"""Which padded sizes an engine should take for a folder of images, and how that is shown."""

import io
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tood_deploy.data.images import read_image_size
from tood_deploy.errors import DeviceError, InputError, OutputError, ToodError
from tood_deploy.export.tensorrt.shapes import (
    ShapeProposal,
    plan_shapes,
    plot_proposal,
    proposal_table,
    propose_shapes,
)
from tood_deploy.preprocess import choose_canvas, fit_size, pad_size

IMGSZ = (800, 1333)
SIDES = st.tuples(st.integers(100, 1000), st.integers(100, 1000))


def padded_pixels(images: list[tuple[int, int]], shapes: tuple[tuple[int, int], ...]) -> int:
    """Slowly: every image looks for the smallest size that holds it."""
    total = 0
    for image in images:
        height, width = fit_size(image, IMGSZ)
        total += min(
            rows * columns for rows, columns in shapes if rows >= height and columns >= width
        )
    return total


def fewest_pixels(images: list[tuple[int, int]], count: int) -> int:
    """By trying all sets of that many sizes that hold all images."""
    needed = [pad_size(fit_size(image, IMGSZ)) for image in images]
    sizes = {(max(a[0], b[0]), max(a[1], b[1])) for a in needed for b in needed}
    best = []
    for shapes in combinations(sorted(sizes), count):
        if all(
            any(rows >= height and columns >= width for rows, columns in shapes)
            for height, width in needed
        ):
            best.append(padded_pixels(images, shapes))
    return min(best)


@settings(max_examples=60, deadline=None)
@given(st.lists(SIDES, min_size=1, max_size=7))
def test_one_and_two_sizes_are_the_best_there_are_and_three_nearly(
    images: list[tuple[int, int]],
) -> None:
    plans = plan_shapes(images, IMGSZ).plans
    for count, plan in enumerate(plans[:3], start=1):
        found, best = padded_pixels(images, plan.shapes_hw), fewest_pixels(images, count)
        assert best <= found <= best * (1 if count < 3 else 1.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(SIDES, min_size=1, max_size=40))
def test_plans_hold_every_image_and_more_sizes_waste_less(images: list[tuple[int, int]]) -> None:
    proposal = plan_shapes(images, IMGSZ)
    real = sum(height * width for height, width in (fit_size(image, IMGSZ) for image in images))
    assert 1 <= len(proposal.plans) <= 6
    for plan in proposal.plans:
        assert plan.padding == pytest.approx(1 - real / padded_pixels(images, plan.shapes_hw))
        assert Counter(choose_canvas(image, IMGSZ, plan.shapes_hw) for image in images) == dict(
            zip(plan.shapes_hw, plan.images, strict=True)
        )
    paddings = [plan.padding for plan in proposal.plans]
    assert paddings == sorted(paddings, reverse=True)
    assert min(paddings) >= proposal.least - 1e-12


def test_landscape_and_portrait() -> None:
    proposal = plan_shapes([(480, 640)] * 3 + [(640, 480)] * 2, IMGSZ)
    assert proposal.shapes_hw == ((800, 1088), (1088, 800))
    assert proposal.plans[proposal.chosen].images == (3, 2)
    assert proposal.plans[0].shapes_hw == ((1088, 1088),)
    assert (
        proposal.plans[1].padding == pytest.approx(proposal.least) == pytest.approx(1 - 1067 / 1088)
    )


def test_one_size_is_enough_where_images_are_alike() -> None:
    proposal = plan_shapes([(480, 640), (481, 641)], IMGSZ)
    assert len(proposal.plans) == 1
    assert proposal.shapes_hw == ((800, 1088),)


def test_a_further_size_must_save_something() -> None:
    # Half of the images need 1344 columns, half 1312: a size of their own saves 1.2% of all pixels.
    proposal = plan_shapes([(480, 800), (480, 780)] * 10, IMGSZ)
    assert [plan.shapes_hw for plan in proposal.plans] == [
        ((800, 1344),),
        ((800, 1312), (800, 1344)),
    ]
    assert proposal.plans[0].padding - proposal.plans[1].padding == pytest.approx(0.012, abs=1e-3)
    assert proposal.shapes_hw == ((800, 1344),)


@pytest.mark.parametrize(("count", "shapes"), [(1, 1), (2, 2), (6, 2)])
def test_a_number_of_sizes_can_be_asked_for(count: int, shapes: int) -> None:
    assert len(plan_shapes([(480, 640), (640, 480)], IMGSZ, count).shapes_hw) == shapes


def test_the_same_images_give_the_same_plan() -> None:
    rng = np.random.default_rng(0)
    images = [(int(height), int(width)) for height, width in rng.integers(100, 4000, (300, 2))]
    first = plan_shapes(images, IMGSZ)
    assert plan_shapes(images[::-1], IMGSZ).plans == first.plans
    assert len(first.plans) == 6


class TestFolder:
    def propose(self, folder: Path) -> ShapeProposal:
        return propose_shapes(folder, (240, 320))

    def test_sizes_are_read_from_the_headers(self, tmp_path: Path) -> None:
        for name, size in (("a.png", (48, 64)), ("b.jpg", (64, 48)), ("c.bmp", (48, 64))):
            cv2.imwrite(str(tmp_path / name), np.zeros((*size, 3), np.uint8))
        (tmp_path / "notes.txt").write_text("not a image")
        assert self.propose(tmp_path).shapes_hw == ((256, 320), (320, 256))

    def test_images_are_turned_as_their_exif_says(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jpg"
        cv2.imwrite(str(path), np.zeros((48, 64, 3), np.uint8))
        start, rest = path.read_bytes()[:2], path.read_bytes()[2:]
        turned_right = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
        path.write_bytes(
            start + b"\xff\xe1" + (len(turned_right) + 2).to_bytes(2) + turned_right + rest
        )
        image = cv2.imread(str(path))
        assert image is not None
        assert image.shape[:2] == (64, 48)  # what the detector sees
        assert read_image_size(path) == (64, 48)

    def test_a_file_that_is_no_image_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_text("no image")
        with pytest.raises(InputError, match=r"a\.jpg: its size cannot be read"):
            self.propose(tmp_path)

    def test_an_empty_folder_and_none(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no images in it"):
            self.propose(tmp_path)
        with pytest.raises(InputError, match="no such folder"):
            self.propose(tmp_path / "nowhere")


PROPOSAL = plan_shapes([(480, 640)] * 3 + [(640, 480)], (800, 1333))


def test_the_table() -> None:
    file = io.StringIO()
    Console(width=140, file=file).print(proposal_table(PROPOSAL))
    lines = file.getvalue().splitlines()
    (marked,) = (line for line in lines if "*" in line and "proposed" not in line)
    assert "800x1088: 3, 1088x800: 1" in marked
    assert "1.9%" in marked
    assert any("1088x1088: 4" in line for line in lines)


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_the_plot(suffix: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"shapes{suffix}"
    plot_proposal(PROPOSAL, path)
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_proposal_gives_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        plot_proposal(PROPOSAL, tmp_path / name)
    content = (tmp_path / "a.svg").read_text()
    assert content == (tmp_path / "b.svg").read_text()
    assert "800x1088" in content
    assert "padding, % of input pixels" in content


def test_places_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ToodError, match=r"shapes\.txt; expected a name ending in \.png, \.svg, \.pdf"
    ):
        plot_proposal(PROPOSAL, tmp_path / "shapes.txt")
    with pytest.raises(OutputError, match="cannot be written"):
        plot_proposal(PROPOSAL, Path("/proc/nowhere/shapes.png"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DeviceError, match=r"the package matplotlib is not installed; .*\[eval\]"):
        plot_proposal(PROPOSAL, tmp_path / "shapes.png")
    assert not list(tmp_path.iterdir())
