"""A proposal of padded sizes for people: a table, and a plot of what each further size saves. The plot needs matplotlib."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tood_deploy.errors import ToodError
from tood_deploy.export.tensorrt.shape_plan import ShapeProposal
from tood_deploy.extras import naming_extras
from tood_deploy.manifest import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "tood"}  # the same proposal gives the same file
LARGEST_DOT = 400.0  # area of the dot where most pictures lie, in square points


def proposal_table(proposal: ShapeProposal) -> Table:
    """One row for each number of sizes, the proposed one marked."""
    table = Table(title=f"padded sizes for {len(proposal.sizes_hw)} pictures")
    for column in ("", "sizes", "padding", "rows x columns: pictures"):
        table.add_column(column, justify="right" if column in ("sizes", "padding") else "left")
    for i, plan in enumerate(proposal.plans):
        uses = zip(plan.shapes_hw, plan.pictures, strict=True)
        text = ", ".join(f"{height}x{width}: {number}" for (height, width), number in uses)
        table.add_row("*" if i == proposal.chosen else "", str(len(plan.shapes_hw)), f"{plan.padding:.1%}", text)
    least = f"Padding to multiples of 32 alone takes {proposal.least:.1%}."
    table.caption = f"* proposed. {least} Pictures of other forms are scaled down to fit one of them."
    return table


def plot_proposal(proposal: ShapeProposal, path: Path) -> None:
    """Writes a figure: the pictures with the proposed sizes around them, and the padding by number of sizes.

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
    pictures, padding = figure.subplots(1, 2)
    _plot_pictures(pictures, proposal)
    counts = [len(plan.shapes_hw) for plan in proposal.plans]
    padding.plot(counts, [100 * plan.padding for plan in proposal.plans], marker="o")
    padding.plot(
        counts[proposal.chosen], 100 * proposal.plans[proposal.chosen].padding, "s", markersize=11, fillstyle="none", color="black"
    )
    padding.axhline(100 * proposal.least, linestyle="--", linewidth=1, label="multiples of 32 alone")
    padding.set(xlabel="number of sizes", ylabel="padding, % of input pixels", xticks=counts, ylim=(0, None), title="square: proposed")
    padding.legend()
    with atomic_path(path) as temporary, mpl.rc_context(STYLE):
        figure.savefig(temporary, dpi=110, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _plot_pictures(axes: Axes, proposal: ShapeProposal) -> None:
    """Every picture as a dot at its width and height as scaled, every proposed size as the rectangle from the origin."""
    numbers = Counter(proposal.sizes_hw)
    widths, heights = [width for _, width in numbers], [height for height, _ in numbers]
    largest = max(numbers.values())
    axes.scatter(widths, heights, s=[max(4.0, LARGEST_DOT * number / largest) for number in numbers.values()], alpha=0.5)
    for i, (height, width) in enumerate(proposal.shapes_hw):
        axes.plot([0, width, width], [height, height, 0], color=f"C{i + 1}", label=f"{height}x{width}")
    axes.set(xlabel="columns", ylabel="rows", xlim=(0, None), ylim=(0, None), aspect="equal", title="pictures as scaled, and their sizes")
    axes.legend(loc="lower left", title="rows x columns")
