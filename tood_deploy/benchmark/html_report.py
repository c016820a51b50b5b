"""The building blocks of reports: one self-contained HTML page, the same in Markdown, JSON.

Tables, figures and images come in; files come out. Knows nothing of detectors, metrics or what is
reported. Fractions stay fractions in JSON; whoever makes a table chooses its units.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from numpy.typing import NDArray

from tood_deploy import __version__
from tood_deploy.files import write_text
from tood_deploy.reporter import printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NOTHING = "-"
MARKDOWN = re.compile(r"[\\`*\[\]|$~]")  # what acts in a cell of a Markdown table
LARGEST_IMAGE_PX = 1280
JPEG_QUALITY = 82

Cell = str | int | float | None


def _literal(value: object) -> object:
    """Return what a template shows of a value: of a text no character that acts, HTML as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_TEMPLATES = Environment(
    loader=PackageLoader("tood_deploy.benchmark"),
    autoescape=True,
    finalize=_literal,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Table:
    """Rows below headers; the first column names the row, the others are numbers or short texts.

    Attributes:
        headers: one text a column.
        rows: cells; None and NaN are shown as a dash, floats with two digits after the point.
        note: a sentence below.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def html(self) -> Markup:
        """Return the table as HTML; it scrolls sideways where the screen is narrow."""
        return render(
            "table.html",
            headers=self.headers,
            rows=[[show(cell) for cell in row] for row in self.rows],
            note=self.note,
        )

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [
            self.headers,
            ["---"] + ["---:"] * (len(self.headers) - 1),
            *([show(cell) for cell in row] for row in self.rows),
        ]
        text = "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)
        return f"{text}\n\n{self.note}" if self.note else text

    def rich(self) -> RichTable:
        """Return the table for a terminal."""
        from rich.table import Table as RichTable

        shown = RichTable(caption=self.note, caption_justify="left")
        for number, header in enumerate(self.headers):
            shown.add_column(printable(header), justify="right" if number else "left")
        for row in self.rows:
            shown.add_row(*(printable(show(cell)) for cell in row))
        return shown


@dataclass(frozen=True)
class Card:
    """One image or figure of a gallery.

    Attributes:
        caption: a line above it.
        body: what `embed_figure` or `image` gave.
    """

    caption: str
    body: Markup


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading.

    Attributes:
        title: the heading.
        body: HTML from `Table.html`, `gallery`, `embed_figure`, `image` or `paragraph`; several are
            joined with +.
        lead: a sentence or two that say what is to be seen.
    """

    title: str
    body: Markup
    lead: str = ""


@dataclass(frozen=True)
class Tile:
    """A number in large letters at the top of the page, with what it is and a remark."""

    name: str
    value: str
    remark: str = ""


def render(template: str, **values: Any) -> Markup:
    """Fill a template of this package; every text is escaped, Markup is not."""
    return Markup(_TEMPLATES.get_template(template).render(**values))


def render_page(
    title: str,
    sections: Sequence[Section],
    path: Path,
    *,
    lead: str = "",
    tiles: Sequence[Tile] = (),
    facts: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
) -> None:
    """Write one HTML page that needs no other file and no network.

    It is readable on a phone, and light or dark as the reader has it.

    Args:
        title: of the page.
        sections: in order; two or more get a table of contents.
        path: of the file.
        lead: a sentence below the title.
        tiles: the most important numbers.
        facts: what was run on what: name and value, at the end of the page.
        warnings: lines that stand out at the top.

    Raises:
        OutputError: the file cannot be written.
    """
    page = {
        "title": title,
        "lead": lead,
        "tiles": tiles,
        "warnings": warnings,
        "sections": sections,
        "facts": facts or {},
    }
    write_text(path, render("page.html", **page, version=__version__))


def paragraph(text: str) -> Markup:
    """Return a plain paragraph."""
    return Markup("<p>{}</p>\n").format(text)


def gallery(cards: Sequence[Card], columns: Literal["one", "two", "many"] = "two") -> Markup:
    """Return cards in order.

    Args:
        cards: of images or figures.
        columns: how many are beside one another where the screen is wide enough: "one" for pairs,
            "many" for small figures.
    """
    return render("gallery.html", cards=cards, columns=columns)


def pair(left: Markup, right: Markup) -> Markup:
    """Return two images side by side, the right one below the left on a narrow screen."""
    return Markup('<div class="pair">{}{}</div>\n').format(left, right)


def fold(summary: str, body: Markup) -> Markup:
    """Return something long that a reader opens with a click."""
    return Markup("<details><summary>{}</summary>{}</details>\n").format(printable(summary), body)


def image(image_bgr: NDArray[np.uint8], description: str) -> Markup:
    """Return an `<img>` with the image inside.

    Args:
        image_bgr: (H, W, 3) uint8.
        description: for those who cannot see it.
    """
    return Markup('<img src="{}" alt="{}" loading="lazy">\n').format(
        embed_image(image_bgr), printable(description)
    )


def embed_image(image_bgr: NDArray[np.uint8], largest_px: int = LARGEST_IMAGE_PX) -> str:
    """Return a data URI of the image as JPEG.

    Args:
        image_bgr: (H, W, 3) uint8.
        largest_px: longest side; a larger image is scaled down.
    """
    scale = largest_px / max(image_bgr.shape[:2])
    if scale < 1:
        size_wh = (
            max(1, round(image_bgr.shape[1] * scale)),
            max(1, round(image_bgr.shape[0] * scale)),
        )
        image_bgr = np.asarray(
            cv2.resize(image_bgr, size_wh, interpolation=cv2.INTER_AREA), np.uint8
        )
    _, data = cv2.imencode(".jpg", image_bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def show(cell: Cell) -> str:
    """Return a cell as text."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return NOTHING
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def _markdown_cell(cell: str) -> str:
    return MARKDOWN.sub(r"\\\g<0>", printable(cell)).replace("<", "&lt;")


def write_markdown(path: Path, parts: Sequence[str]) -> None:
    """Write Markdown: headings, paragraphs and tables, a blank line between them.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(path, "\n\n".join(part.strip() for part in parts if part.strip()) + "\n")


def write_json(path: Path, values: Any) -> None:
    """Write JSON that every reader takes: NaN and infinite numbers become null, arrays lists.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(
        path, json.dumps(plain(values), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )


def plain(values: Any) -> Any:
    """Return the same as lists, dictionaries, texts and finite numbers."""
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, np.ndarray | np.generic):
        return plain(values.tolist())
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return None
    return values


# Distinct on white and on near-black, and for people who do not see red and green apart: they
# differ in lightness too.
SERIES = ("#2f81f7", "#d9822b", "#2fa36b", "#d6455d", "#9467d0", "#1a9fb0", "#b58900", "#8a8f98")
MATPLOTLIB_FORMULA = r"\mathdefault"
INK = "#010203"  # stands for the page's text colour, which replaces it in the SVG
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tood",
    "font.family": "sans-serif",
    "font.size": 10.0,
}


def new_figure(width: float = 5.2, height: float = 3.5) -> tuple[Figure, Axes]:
    """Return an empty figure with one pair of axes, a faint grid and no box.

    At 5.2 inches wide its letters are readable on a phone.
    """
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=SERIES)
    axes.grid(alpha=0.18, color=INK, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def embed_figure(figure: Figure, description: str) -> Markup:
    """Return the figure as inline SVG: it scales with the page, text stays text.

    Whatever was left black takes the page's text colour; backgrounds become transparent.

    Args:
        figure: to embed.
        description: for those who cannot see it.
    """
    _ink(figure)
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            dpi=150,
            metadata={"Date": None, "Creator": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The names figure_1, axes_1 are the same in every figure of the page, and never referred to.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    width, height = figure.get_size_inches() * 72
    opening = Markup(
        '<svg role="img" aria-label="{}" viewBox="0 0 {:g} {:g}" style="max-width:{:g}px" '
        'xmlns:xlink="{}">'
    ).format(printable(description), width, height, width * 1.6, "http://www.w3.org/1999/xlink")
    return (
        Markup('<div class="figure">')
        + opening
        + Markup(svg[svg.index(">") + 1 :])
        + Markup("</div>\n")
    )


def _ink(figure: Figure) -> None:
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if same_color(text.get_color(), "black"):
            text.set_color(INK)
        # A dollar sign of a name is no formula; those of logarithmic axes are.
        if "$" in text.get_text() and MATPLOTLIB_FORMULA not in text.get_text():
            text.set_parse_math(False)
        if printable(text.get_text()) != text.get_text() and "\n" not in text.get_text():
            text.set_text(printable(text.get_text()))
    for axes in figure.axes:
        axes.tick_params(which="both", color=INK, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
    for legend in figure.findobj(Legend):
        legend.get_frame().set_visible(False)  # type: ignore[union-attr]
