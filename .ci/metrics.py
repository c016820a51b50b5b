"""Print what can be counted of the code: sizes, import lines, typing, documentation.

Numbers to look at, no gate.

`python .ci/metrics.py --export` also exports `tiny` and counts the files whose functions ran.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tood_deploy"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(tree: ast.AST) -> Iterator[Function]:
    """Yield every function and method, inner ones too."""
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Return the lines of a function from `def` on, without its docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    documented = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - documented


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Yield the public functions and classes of a module, and those classes' public methods."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                methods = (inner for inner in node.body if isinstance(inner, Function))
                yield from (method for method in methods if not method.name.startswith("_"))


def is_typed(function: Function) -> bool:
    """Return whether all arguments but `self` and the result have annotations."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [extra for extra in (arguments.vararg, arguments.kwarg) if extra]
    own = [argument for argument in named if argument.arg not in ("self", "cls")]
    return function.returns is not None and all(argument.annotation for argument in own)


def is_described(definition: Function | ast.ClassDef) -> bool:
    """Return whether there is a docstring, or the definition overrides one that has it."""
    decorators = {ast.unparse(decorator) for decorator in definition.decorator_list}
    return ast.get_docstring(definition) is not None or "override" in decorators


def lines_of_code(path: Path) -> int:
    """Return the lines that are neither blank nor a comment."""
    stripped = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return sum(bool(line) and not line.startswith("#") for line in stripped)


def import_lines(tree: ast.AST) -> int:
    """Return how many lines import statements take, those inside functions too."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return sum((node.end_lineno or 0) - node.lineno + 1 for node in imports)


def measure_package() -> Iterator[tuple[str, str, str]]:
    """Yield rows of what is counted, its value, and the goal."""
    paths = sorted(PACKAGE.rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    largest = max(paths, key=sizes.__getitem__)
    folders = Counter(path.parent for path in paths if path.name != "__init__.py")
    fullest, modules = folders.most_common(1)[0]
    functions = [function for tree in trees.values() for function in functions_of(tree)]
    lengths = [body_lines(function) for function in functions]
    longest = max(functions, key=body_lines)
    public = [node for tree in trees.values() for node in public_definitions(tree)]
    untyped = [node for node in public if isinstance(node, Function) and not is_typed(node)]
    undocumented = [node for node in public if not is_described(node)]
    imported = sum(import_lines(tree) for tree in trees.values())
    written = [size for path, size in sizes.items() if size > 1]
    yield "files", str(len(paths)), "at most 140"
    yield "lines of a file, median", f"{statistics.median(written):.0f}", "130 to 220"
    yield "lines of the longest file", f"{sizes[largest]} ({largest.name})", "at most 500"
    yield "modules in the fullest folder", f"{modules} ({fullest.name})", "at most 15"
    share = imported / sum(map(lines_of_code, paths))
    yield "import lines", f"{share:.1%} of the code", "at most 7.5%"
    yield "lines of a function, median", f"{statistics.median(lengths):.0f}", "at most 10"
    yield "lines of the longest function", f"{max(lengths)} ({longest.name})", "at most 50"
    yield "public functions without types", _named(untyped), "none"
    yield "public names without docstring", _named(undocumented), "none"
    tests = sorted((ROOT / "tests").rglob("*.py"))
    yield "lines of tests", str(sum(len(path.read_bytes().splitlines()) for path in tests)), ""


def _named(definitions: list[Any]) -> str:
    names = ", ".join(definition.name for definition in definitions[:5])
    return f"{len(definitions)} ({names})" if definitions else "none"


def files_of_an_export() -> set[str]:
    """Export `tiny` with the command's own code, and return our files whose functions ran."""
    from tood_deploy.cli.export import main

    ran: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            ran.add(frame.f_code.co_filename)

    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["tood-export", str(PACKAGE / "weights" / "tiny-demo.safetensors")]
        sys.argv += ["--output", f"{folder}/tiny.onnx", "--quiet"]
        sys.setprofile(note)
        try:
            status = main()
        finally:
            sys.setprofile(None)
    if status:
        raise SystemExit(f"the export ended with {status}")
    return {str(Path(name).relative_to(PACKAGE)) for name in ran if name.startswith(str(PACKAGE))}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export", action="store_true", help="also count the files of an export")
    table = Table("counted", "value", "goal")
    arguments = parser.parse_args()
    for row in measure_package():
        table.add_row(*row)
    if arguments.export:
        files = files_of_an_export()
        table.add_row("files that an export of tiny runs", str(len(files)), "at most 28")
        print(*sorted(files), sep="\n")
    Console().print(table)


if __name__ == "__main__":
    main()
