"""Test that commands, options, messages, files and numbers in the documents are those of the code.

Links within docs/ are checked by `make docs`; the example of the ONNX contract is run by
test_onnx_contract.py. Reports in docs/results keep the commands that made them.
"""

import argparse
import ast
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest

from tood_deploy.benchmark.latency.peak import network_cost
from tood_deploy.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]["scripts"]

# Documented ahead of the code. What the code has got since makes a test fail until it goes here.
NOT_YET_OPTIONS: list[str] = []
NOT_YET_FILES: list[str] = []

RENAMED = {"--rest", "--keep"}  # accepted for one release, and documented as such
FOREIGN = re.compile(
    r"^(pip|docker|git|ray|torchrun|perf_analyzer|grep|make|curl|\.venv)\b"
)  # other programs' command lines


class _ParsedError(Exception):
    """The command line was accepted; nothing is run."""


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Yield the command lines of ours in the pages' shell blocks: page and words."""
    for page in PAGES:
        for block in re.findall(
            r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and (words[0] in SCRIPTS or _module(words)):
                    yield page.name, words


def _module(words: Sequence[str]) -> str | None:
    """Return our module that is run by -m, or None."""
    at = words.index("-m") + 1 if "-m" in words[:-1] else 0
    return words[at] if at and words[at].startswith("tood_deploy.") else None


@pytest.mark.parametrize(
    ("page", "words"),
    [
        pytest.param(page, words, id=f"{page}: {' '.join(words)[:70]}")
        for page, words in command_lines()
    ],
)
def test_command_lines_are_accepted(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if set(words) & set(NOT_YET_OPTIONS):
        pytest.skip("documented ahead of the code")
    parse = argparse.ArgumentParser.parse_args

    def parse_only(
        self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: None = None
    ) -> NoReturn:
        parse(self, args, namespace)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(_ParsedError):
        _run(words, monkeypatch)


def _run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if module := _module(words):
        monkeypatch.setattr(sys, "argv", words[words.index(module) :])
        monkeypatch.delitem(sys.modules, module, raising=False)  # run afresh, as -m does
        runpy.run_module(module, run_name="__main__")
    else:
        module, _, name = SCRIPTS[words[0]].partition(":")
        getattr(import_module(module), name)(words[1:])


def test_there_are_command_lines_of_every_command() -> None:
    assert {words[0] for _, words in command_lines()} >= set(SCRIPTS)


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option that a command, the demo, or a script in benchmarks/ or examples/ has."""
    found = set()
    add = argparse.ArgumentParser.add_argument

    def record(self: argparse.ArgumentParser, *names: str, **settings: object) -> argparse.Action:
        action = add(self, *names, **settings)  # pyright: ignore[reportArgumentType]
        found.update(action.option_strings)
        return action

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse._ActionsContainer, "add_argument", record)
        for name in SCRIPTS:
            _, _, function = SCRIPTS[name].partition(":")
            with pytest.raises(SystemExit):
                getattr(import_module(SCRIPTS[name].partition(":")[0]), function)(["--help"])
    for path in [
        *(ROOT / "benchmarks").rglob("*.py"),
        ROOT / "benchmarks" / "gpu.sh",
        *(ROOT / "examples").glob("*.py"),
        ROOT / "tood_deploy" / "demo" / "__main__.py",
    ]:
        found.update(re.findall(r"""(?<=["'\s|])--[a-z][\w-]*""", path.read_text(encoding="utf-8")))
    return found


def test_named_options_exist(options: set[str]) -> None:
    unknown = set()
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for span in re.findall(r"`([^`]+)`", text):
            if not FOREIGN.match(span):
                unknown |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", span)) - options - RENAMED
    assert sorted(unknown) == sorted(set(NOT_YET_OPTIONS) & unknown)
    assert sorted(set(NOT_YET_OPTIONS) & options) == [], (
        "the code has these: take them out of NOT_YET_OPTIONS"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_are_python(page: Path) -> None:
    for code in re.findall(
        r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
    ):
        compile(code, page.name, "exec")


def test_named_files_exist() -> None:
    pattern = re.compile(
        r"(?<![\w/.-])(?:benchmarks|examples|tests|docs|tood_deploy|\.ci)/[\w./-]*\w"
    )
    texts = {
        page.name: re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for page in PAGES
    }
    missing = {
        (page, name)
        for page, text in texts.items()
        for name in pattern.findall(text)
        if not (ROOT / name).exists()
    }
    assert sorted(missing) == []


def test_architecture_names_every_folder_and_nothing_else() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    cells = re.findall(
        r"^\| (`[^|]+) \|",
        page.partition("## The house")[2].partition("## Rules")[0],
        flags=re.MULTILINE,
    )
    named = {name.rstrip("/") for cell in cells for name in re.findall(r"`([\w./]+)`", cell)}
    package = ROOT / "tood_deploy"
    assert sorted(name for name in named if not (package / name).exists()) == NOT_YET_FILES
    folders = {
        path.name
        for path in package.iterdir()
        if path.is_dir() and not path.name.startswith((".", "__"))
    }
    assert sorted(folders - named) == []


def texts_of_code() -> str:
    """Return every text constant of the package, `...` standing for what f-strings fill in."""
    texts = []
    for path in (ROOT / "tood_deploy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(map(_text_of, node.values)))
            elif isinstance(node, ast.Constant):
                texts.append(_text_of(node))
    return "\n".join(texts)


def _text_of(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "..."


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    code = texts_of_code()
    fragments = {
        fragment.strip()
        for message in messages
        for fragment in message.split("...")
        if len(fragment.strip()) > 3
    }
    assert len(messages) > 20
    assert sorted(fragment for fragment in fragments if fragment not in code) == []


def preset_rows() -> list[list[str]]:
    """Return the cells of the presets page's table, a list a preset."""
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    return [
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("| `")
    ]


def test_presets_page_has_the_published_ap_and_downloads() -> None:
    rows = preset_rows()
    assert [row[0] for row in rows] == list(PRESETS)
    for row in rows:
        preset = PRESETS[row[0]]
        assert row[3] == ("-" if preset.published_ap is None else str(preset.published_ap)), row
        assert row[7] == (
            "yes" if preset.weights else "none" if preset.published_ap is None else "by hand"
        ), row


def test_presets_page_has_the_parameters_and_multiply_adds() -> None:
    rows = {row[0]: row for row in preset_rows()}
    for name in ("r50-1x", "tiny"):
        parameters, gmacs = network_cost(PRESETS[name], (640, 640))
        assert rows[name][4] == f"{parameters / 1e6:.1f} M"
        assert rows[name][6] == f"{gmacs:.1f}"


def test_presets_of_one_network_have_one_cost() -> None:
    by_network: dict[tuple[object, ...], set[tuple[str, ...]]] = {}
    for row in preset_rows():
        preset = PRESETS[row[0]]
        network = (
            preset.detector,
            preset.backbone_style,
            preset.depth,
            preset.groups,
            preset.base_channels,
            preset.channels,
            preset.deform_stages,
            preset.deform_tower,
        )
        by_network.setdefault(network, set()).add(tuple(row[4:7]))
    assert [costs for costs in by_network.values() if len(costs) > 1] == []
