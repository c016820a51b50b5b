"""The proposal on paper: the table marks one row, the plot is whole, the same every time, and refused by its name alone."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tood_deploy.errors import DeviceError, OutputError, ToodError
from tood_deploy.export.tensorrt.shapes import plan_shapes, plot_proposal, proposal_table

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
