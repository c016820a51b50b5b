"""The one direction of imports, read from the syntax trees.

Imports inside functions and for type checkers count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "tood_deploy"

# A unit may import the units of the rows above it, and itself; units of one row never import one
# another, save the ground floor's.
LAYERS = (
    {
        "errors",
        "preset",
        "presets",
        "detections",
        "draw",
        "files",
        "graph_io",
        "manifest_sections",
        "reporter",
    },
    {"manifest", "distributions", "matching", "preprocess", "windows"},
    {"onnx_file", "data", "model"},
    {"parity"},
    {"training", "engines"},
    {"export", "inference"},
    {"serve"},
    {"batch", "benchmark"},
    {"cli"},
    {"demo", "__main__"},
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
TORCH_FREE = LAYERS[0] | {"preprocess", "engines", "inference", "batch"}
TORCH_ENGINES = "engines/torch_"


def python_files() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def unit_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def imported_modules(source: str) -> Iterator[str]:
    """Dotted names; `from a import b` gives a.b, since b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or RANK[importer] == RANK[imported] == 0:
        return True
    return RANK[imported] < RANK[importer]


def violations(file: str, source: str) -> list[str]:
    """What one file imports and must not."""
    unit, wrong = unit_of(file), []
    for name in imported_modules(source):
        parts = name.split(".")
        if parts[0] == "torch" and unit in TORCH_FREE and not file.startswith(TORCH_ENGINES):
            wrong.append(f"{name}: this part runs without torch")
        if parts[0] != "tood_deploy" or parts[1:] == ["__version__"]:
            continue
        imported = parts[1] if len(parts) > 1 else ""
        if imported not in RANK:
            wrong.append(f"{name}: import it from the module it lives in")
        elif not may_import(unit, imported):
            wrong.append(f"{name}: {unit} lies below or beside it")
        elif imported == "model" and unit in TORCH_FREE and not file.startswith(TORCH_ENGINES):
            wrong.append(f"{name}: the model needs torch, this part runs without it")
    return wrong


@pytest.mark.parametrize("file", [file for file in python_files() if file != "__init__.py"])
def test_imports_go_one_way(file: str) -> None:
    assert unit_of(file) in RANK, f"give {unit_of(file)} a row in LAYERS"
    assert violations(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("engines/base.py", "from tood_deploy.export import graph"),
        ("model/head.py", "def f():\n    import tood_deploy.inference.detector"),
        ("preprocess.py", "from tood_deploy.model.boxes import decode_boxes"),
        ("presets.py", "if TYPE_CHECKING:\n    from tood_deploy.engines import Engine"),
        ("cli/infer.py", "from tood_deploy import Detector"),
        ("inference/source.py", "import torch.nn"),
        ("engines/onnx_engine.py", "from tood_deploy.model import build_model"),
    ],
)
def test_a_wrong_import_is_found(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("engines/torch_engine.py", "import torch\nfrom tood_deploy.model import build_model"),
        ("manifest.py", "from tood_deploy.presets import Preset"),
        (
            "cli/export.py",
            "from tood_deploy import __version__\nfrom tood_deploy.export import graph",
        ),
    ],
)
def test_a_right_import_passes(file: str, source: str) -> None:
    assert violations(file, source) == []
