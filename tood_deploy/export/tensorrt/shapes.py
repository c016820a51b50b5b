"""Choose the few padded sizes an engine should take for the images of a folder.

Comes in: images, of which only the headers are read. Goes out: the sizes that waste the fewest
pixels on padding. Every image goes to the smallest size that holds it, as the detector does; none
is scaled down for want of room. The best set is searched among the sizes that hold one image or two
of them together, by exchanging two at a time until no exchange gains anything (k-medoids): one or
two sizes are the very best, more are within some percent of it. The same images always give the
same plan. Knows nothing of TensorRT.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from tood_deploy.data.images import image_paths, read_image_size
from tood_deploy.errors import ToodError, naming_extras
from tood_deploy.export.tensorrt.options import MAX_SHAPES, Shape
from tood_deploy.files import atomic_path
from tood_deploy.preprocess import choose_canvas, fit_size, pad_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SMALL_GAIN = 0.02  # of all pixels: a further size that saves less is not proposed


@dataclass(frozen=True)
class ShapePlan:
    """The sizes for one number of them.

    Attributes:
        shapes_hw: rows and columns, the smallest first.
        images: how many images go to each of them.
        padding: share of the engine's input pixels that is padding, 0 to 1.
    """

    shapes_hw: tuple[Shape, ...]
    images: tuple[int, ...]
    padding: float


@dataclass(frozen=True)
class ShapeProposal:
    """Plans of 1, 2, ... sizes, and which of them is proposed.

    Attributes:
        plans: one for each number of sizes, while a further size saves anything; at most six.
        chosen: the position in `plans` of the proposed one: the first after which a further size
            saves less than 2% of all pixels.
        sizes_hw: rows and columns of every image as scaled, before padding.
        least: the padding that multiples of 32 cost in any case.
    """

    plans: tuple[ShapePlan, ...]
    chosen: int
    sizes_hw: tuple[Shape, ...]
    least: float

    @property
    def shapes_hw(self) -> tuple[Shape, ...]:
        """Return the proposed sizes."""
        return self.plans[self.chosen].shapes_hw


def propose_shapes(folder: Path, imgsz: tuple[int, int], count: int | None = None) -> ShapeProposal:
    """Return sizes for the images of a folder.

    Args:
        folder: of images; only their headers are read.
        imgsz: (short side, long side) in pixels that images are scaled to fit.
        count: how many sizes to propose; chosen by what each further one saves where not given.

    Raises:
        InputError: no such folder, no images, or one whose size cannot be read.
    """
    return plan_shapes([read_image_size(path) for path in image_paths(folder)], imgsz, count)


def plan_shapes(
    images_hw: Sequence[Shape], imgsz: tuple[int, int], count: int | None = None
) -> ShapeProposal:
    """Return sizes for images of these rows and columns; see `propose_shapes`."""
    sizes = tuple(fit_size(image, imgsz) for image in images_hw)
    needed = Counter(pad_size(size) for size in sizes)
    plans = [_weigh(shapes, images_hw, imgsz, sizes) for shapes in _best_sets(needed)]
    savings = [before.padding - after.padding for before, after in pairwise(plans)]
    small = next((i for i, saved in enumerate(savings) if saved < SMALL_GAIN), len(plans) - 1)
    chosen = small if count is None else min(count, len(plans)) - 1
    least = 1 - _area(sizes) / sum(
        height * width * number for (height, width), number in needed.items()
    )
    return ShapeProposal(tuple(plans), chosen, sizes, least)


def _area(sizes_hw: Sequence[Shape]) -> int:
    return sum(height * width for height, width in sizes_hw)


def _weigh(
    shapes: Sequence[Shape],
    images_hw: Sequence[Shape],
    imgsz: tuple[int, int],
    sizes: Sequence[Shape],
) -> ShapePlan:
    """Return how the detector uses a set of sizes."""
    in_order = sorted(
        shapes, key=lambda shape: (shape[0] * shape[1], shape)
    )  # of sizes that do equally well the detector takes the first
    used = Counter(choose_canvas(image, imgsz, in_order) for image in images_hw)
    kept = tuple(shape for shape in in_order if used[shape])
    padded = sum(height * width * used[height, width] for height, width in kept)
    return ShapePlan(kept, tuple(used[shape] for shape in kept), 1 - _area(sizes) / padded)


def _best_sets(needed: Counter[Shape]) -> list[list[Shape]]:
    """Return the best sets of 1, 2, ... sizes, up to six or as many as there are."""
    items = sorted(needed)
    candidates = sorted({(max(a[0], b[0]), max(a[1], b[1])) for a in items for b in items})
    costs = _costs(items, candidates, needed)
    everything = candidates.index(
        (max(height for height, _ in items), max(width for _, width in items))
    )
    best: list[int] = [everything]
    sets = [[candidates[everything]]]
    while len(best) < min(MAX_SHAPES, len(items)):
        best = _exchange(costs, [*best, _cheapest(costs, best)])
        sets.append([candidates[i] for i in best])
    return sets


def _costs(
    items: list[Shape], candidates: list[Shape], needed: Counter[Shape]
) -> NDArray[np.float64]:
    """Return (items, candidates): pixels that images of a padded size take in a candidate.

    Infinite where they do not fit.
    """
    sides, rooms = np.array(items, float), np.array(candidates, float)
    fits = (sides[:, None, :] <= rooms[None, :, :]).all(2)
    numbers = np.array([needed[item] for item in items], float)
    return np.where(fits, numbers[:, None] * rooms.prod(1)[None, :], np.inf)


def _cheapest(costs: NDArray[np.float64], others: list[int]) -> int:
    """Return the candidate that, beside the others, makes the whole cheapest."""
    return int(np.minimum(_alone(costs, others)[:, None], costs).sum(0).argmin())


def _exchange(costs: NDArray[np.float64], chosen: list[int]) -> list[int]:
    """Exchange two candidates after two others for better ones until none are left."""
    improving = True
    while improving:
        improving = False
        for pair in combinations(chosen, 2):
            kept = [candidate for candidate in chosen if candidate not in pair]
            proposal = [*kept, *_cheapest_pair(costs, kept)]
            if _total(costs, proposal) < _total(costs, chosen):
                chosen, improving = proposal, True
                break
    return chosen


def _cheapest_pair(costs: NDArray[np.float64], others: list[int]) -> tuple[int, int]:
    """Return the two candidates that, beside the others, make the whole cheapest."""
    with_one = np.minimum(_alone(costs, others)[:, None], costs)
    totals = np.stack([np.minimum(column[:, None], costs).sum(0) for column in with_one.T])
    first, second = np.unravel_index(int(totals.argmin()), totals.shape)
    return int(first), int(second)


def _alone(costs: NDArray[np.float64], chosen: list[int]) -> NDArray[np.float64]:
    """Return (items,): pixels with these candidates alone."""
    return costs[:, chosen].min(1, initial=np.inf)


def _total(costs: NDArray[np.float64], chosen: list[int]) -> float:
    return float(_alone(costs, chosen).sum())


PLOT_SUFFIXES = (".png", ".svg", ".pdf")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tood",
}  # the same proposal gives the same file
LARGEST_DOT = 400.0  # area of the dot where most images lie, in square points


def proposal_table(proposal: ShapeProposal) -> Table:
    """Return one row for each number of sizes, the proposed one marked."""
    table = Table(title=f"padded sizes for {len(proposal.sizes_hw)} images")
    for column in ("", "sizes", "padding", "rows x columns: images"):
        table.add_column(column, justify="right" if column in ("sizes", "padding") else "left")
    for i, plan in enumerate(proposal.plans):
        uses = zip(plan.shapes_hw, plan.images, strict=True)
        text = ", ".join(f"{height}x{width}: {number}" for (height, width), number in uses)
        table.add_row(
            "*" if i == proposal.chosen else "",
            str(len(plan.shapes_hw)),
            f"{plan.padding:.1%}",
            text,
        )
    least = f"Padding to multiples of 32 alone takes {proposal.least:.1%}."
    table.caption = f"* proposed. {least} Images of other forms are scaled down to fit one of them."
    return table


def plot_proposal(proposal: ShapeProposal, path: Path) -> None:
    """Write a figure: images with the proposed sizes around them, and padding by number of sizes.

    Args:
        proposal: the sizes.
        path: of a .png, .svg or .pdf file.

    Raises:
        ToodError: another ending, or a place that cannot be written.
        DeviceError: matplotlib is not installed.
    """
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise ToodError(f"plot is {path}; expected a name ending in {', '.join(PLOT_SUFFIXES)}")
    with naming_extras():
        import matplotlib as mpl
        from matplotlib.figure import Figure
    figure = Figure((10, 4.4), layout="constrained")
    images, padding = figure.subplots(1, 2)
    _plot_images(images, proposal)
    counts = [len(plan.shapes_hw) for plan in proposal.plans]
    padding.plot(counts, [100 * plan.padding for plan in proposal.plans], marker="o")
    padding.plot(
        counts[proposal.chosen],
        100 * proposal.plans[proposal.chosen].padding,
        "s",
        markersize=11,
        fillstyle="none",
        color="black",
    )
    padding.axhline(
        100 * proposal.least, linestyle="--", linewidth=1, label="multiples of 32 alone"
    )
    padding.set(
        xlabel="number of sizes",
        ylabel="padding, % of input pixels",
        xticks=counts,
        ylim=(0, None),
        title="square: proposed",
    )
    padding.legend()
    with atomic_path(path) as temporary, mpl.rc_context(STYLE):
        figure.savefig(
            temporary, dpi=110, metadata={"Date": None} if path.suffix.lower() == ".svg" else None
        )


def _plot_images(axes: Axes, proposal: ShapeProposal) -> None:
    """Draw every image as a dot at its width and height as scaled.

    Every proposed size is a rectangle from the origin.
    """
    numbers = Counter(proposal.sizes_hw)
    widths, heights = [width for _, width in numbers], [height for height, _ in numbers]
    largest = max(numbers.values())
    axes.scatter(
        widths,
        heights,
        s=[max(4.0, LARGEST_DOT * number / largest) for number in numbers.values()],
        alpha=0.5,
    )
    for i, (height, width) in enumerate(proposal.shapes_hw):
        axes.plot(
            [0, width, width], [height, height, 0], color=f"C{i + 1}", label=f"{height}x{width}"
        )
    axes.set(
        xlabel="columns",
        ylabel="rows",
        xlim=(0, None),
        ylim=(0, None),
        aspect="equal",
        title="images as scaled, and their sizes",
    )
    axes.legend(loc="lower left", title="rows x columns")
