"""Test that what README says of presets, numbers and links is so, here and on a package index."""

import re
import tomllib
from pathlib import Path

import pytest

from tood_deploy.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RELATIVE_LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)]+)\)")


def test_preset_table_agrees_with_the_presets() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \|.*\| ([\d.]+|-) \| (yes|by hand|none) \|$", README, flags=re.MULTILINE
    )
    assert [name for name, _, _ in rows] == [
        name for name, preset in PRESETS.items() if preset.detector == "tood"
    ]
    for name, ap, download in rows:
        preset = PRESETS[name]
        assert ap == ("-" if preset.published_ap is None else str(preset.published_ap)), name
        assert (download == "yes") == (preset.weights is not None), name


def test_measured_table_is_the_one_of_the_performance_page() -> None:
    measured = README.partition("## Measured")[2].partition("## ")[0]
    rows = [
        line.removesuffix(" |")
        for line in measured.splitlines()
        if line.startswith("| ") and " ms " in line
    ]
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert len(rows) >= 5
    assert [row for row in rows if row not in performance] == []


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_examples_are_python(code: str) -> None:
    compile(code, "README.md", "exec")


def test_links_lead_to_files_and_headings() -> None:
    for link in RELATIVE_LINK.findall(README):
        name, _, anchor = link.partition("#")
        assert (ROOT / name).is_file(), link
        if anchor:
            assert anchor in _anchors((ROOT / name).read_text(encoding="utf-8")), link


def _anchors(markdown: str) -> set[str]:
    """Return the anchors of a page's headings, as MkDocs and forges write them."""
    headings = re.findall(r"^#+ (.+)$", markdown, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def test_a_package_index_gets_no_relative_link() -> None:
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"][
        "metadata"
    ]["hooks"]["fancy-pypi-readme"]
    text = README
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert RELATIVE_LINK.findall(README)
    assert RELATIVE_LINK.findall(text) == []
    assert "`docs/performance.md`" in text  # the file's name stays readable
