import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from markupsafe import Markup

from tood_deploy.benchmark.html_report import (
    INK,
    Card,
    Section,
    Table,
    Tile,
    embed_figure,
    embed_image,
    fold,
    gallery,
    image,
    new_figure,
    pair,
    paragraph,
    plain,
    render_page,
    write_json,
    write_markdown,
)

VOID = {"meta", "img", "br", "link", "use", "path", "defs"}
GREY = np.full((30, 60, 3), 128, np.uint8)


class Balance(HTMLParser):
    """Fails on tags that do not match; collects what attributes refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def figure(title: str = "a figure") -> Markup:
    drawn, axes = new_figure()
    axes.plot([0, 1], [1, 0], label="falling")
    axes.legend()
    axes.set_title(title)
    return embed_figure(drawn, title)


def test_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    body = gallery(
        [Card("c", image(GREY, "grey")), Card("d", pair(figure(), figure()))], "one"
    ) + fold("more", Table(["a"], [["b"]]).html())
    sections = [Section("One", body, "lead"), Section("Two", paragraph("text"))]
    path = tmp_path / "new" / "page.html"
    render_page(
        "Title",
        sections,
        path,
        lead="l",
        tiles=[Tile("AP", "1.00", "r")],
        facts={"command": "x"},
        warnings=["careful"],
    )
    html = path.read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert {
        reference.partition(":")[0]
        for reference in parser.references
        if not reference.startswith("#")
    } == {"data"}
    assert {"#s1", "#s2"} <= set(parser.references)
    assert not re.search(r"url\((?!#)|@import|<script|<link", html)
    for text in (
        "Title",
        "careful",
        "1.00",
        "viewport",
        "prefers-color-scheme: dark",
        "lead",
        "command",
    ):
        assert text in html


def test_texts_are_escaped(tmp_path: Path) -> None:
    nasty = '<script>alert("x")</script>'
    body = (
        Table([nasty], [[nasty]], nasty).html()
        + gallery([Card(nasty, image(GREY, nasty))])
        + paragraph(nasty)
        + figure(nasty)
        + fold(nasty, Markup(""))
    )
    render_page(
        nasty,
        [Section(nasty, body, nasty)],
        tmp_path / "p.html",
        lead=nasty,
        tiles=[Tile(nasty, nasty, nasty)],
        facts={nasty: nasty},
        warnings=[nasty],
    )
    assert "<script" not in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_table_in_markdown() -> None:
    table = Table(
        ["class", "AP", "n"],
        [["a|b<i>", 12.345, 3], ["c", None, 0], ["d", float("nan"), -1]],
        "note",
    )
    assert table.markdown().split("\n") == [
        "| class | AP | n |", "| --- | ---: | ---: |", "| a\\|b&lt;i> | 12.35 | 3 |", "| c | - | 0 |", "| d | - | -1 |", "", "note"  # noqa: E501
    ]  # fmt: skip


def test_figures_take_the_colour_of_the_page() -> None:
    svg = figure("axes & names")
    assert "currentColor" in svg
    assert INK not in svg
    assert "#000000" not in svg
    assert 'aria-label="axes &amp; names"' in svg
    assert ">axes &amp; names</text>" in svg


def test_the_same_figure_is_the_same_text() -> None:
    assert figure() == figure()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(30, 60, (30, 60)), (100, 2560, (50, 1280)), (2560, 1, (1280, 1))],
)
def test_images_are_inside_and_not_too_large(
    height: int, width: int, expected: tuple[int, int]
) -> None:
    kind, data = embed_image(np.full((height, width, 3), (10, 120, 240), np.uint8)).split(",")
    image = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert kind == "data:image/jpeg;base64"
    assert image is not None
    assert image.shape[:2] == expected
    np.testing.assert_allclose(
        image.reshape(-1, 3).mean(axis=0), (10, 120, 240), atol=6
    )  # JPEG's loss


def test_values_become_plain(tmp_path: Path) -> None:
    values = {
        "a": np.float32(0.5),
        1: (np.int64(2), float("nan")),
        "c": np.array([[1.0, np.inf]]),
        "d": [None, True, "é"],
    }
    assert plain(values) == {"a": 0.5, "1": [2, None], "c": [[1.0, None]], "d": [None, True, "é"]}
    write_json(tmp_path / "v.json", values)
    assert json.loads((tmp_path / "v.json").read_text(encoding="utf-8")) == plain(values)


def test_markdown_has_a_blank_line_between_parts(tmp_path: Path) -> None:
    write_markdown(tmp_path / "r.md", ["# a\n", "", "b"])
    assert (tmp_path / "r.md").read_text() == "# a\n\nb\n"
