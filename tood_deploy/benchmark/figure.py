"""Figures by matplotlib as inline SVG that takes the page's text colour, so that one figure serves light and dark.

No pyplot: no window, no global state. `new_figure` makes one, `embed_figure` turns it into HTML.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

# Told apart on white and on near-black, and by people who cannot tell red from green (they differ in lightness too).
SERIES = ("#2f81f7", "#d9822b", "#2fa36b", "#d6455d", "#9467d0", "#1a9fb0", "#b58900", "#8a8f98")
INK = "#010203"  # stands for the page's text colour, which replaces it in the SVG
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "tood", "font.family": "sans-serif", "font.size": 10.0}


def new_figure(width: float = 5.2, height: float = 3.5) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, a faint grid and no box; at 5.2 inches wide its letters are readable on a phone."""
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=SERIES)
    axes.grid(alpha=0.18, color=INK, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def embed_figure(figure: Figure, description: str) -> Markup:
    """The figure as inline SVG: scales with the page, text stays text. `description` is for those who cannot see it.

    Whatever was left black takes the page's text colour; backgrounds become transparent.
    """
    _ink(figure)
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, dpi=150, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # figure_1, axes_1: the same in every figure of the page, and never referred to
    width, height = figure.get_size_inches() * 72
    opening = Markup('<svg role="img" aria-label="{}" viewBox="0 0 {:g} {:g}" style="max-width:{:g}px" xmlns:xlink="{}">').format(
        description, width, height, width * 1.6, "http://www.w3.org/1999/xlink"
    )
    return Markup('<div class="figure">') + opening + Markup(svg[svg.index(">") + 1 :]) + Markup("</div>\n")


def _ink(figure: Figure) -> None:
    for text in figure.findobj(Text):
        if isinstance(text, Text) and same_color(text.get_color(), "black"):
            text.set_color(INK)
    for axes in figure.axes:
        axes.tick_params(which="both", color=INK, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
    for legend in figure.findobj(Legend):
        legend.get_frame().set_visible(False)  # type: ignore[union-attr]
