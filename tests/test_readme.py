"""What README says of files, presets and commands is what is there."""

import re
from pathlib import Path

import pytest

from tood_deploy.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree_paths() -> set[str]:
    """The files of README's tree, with their folders."""
    block = README.partition("## What lies where")[2].split("```")[1]
    folders: list[str] = []
    paths = set()
    for indent, name in re.findall(r"^( *)([\w./-]+)", block, flags=re.MULTILINE):
        folders = folders[: len(indent) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            paths.add("".join(folders) + name)
    return paths


def test_tree_names_files_that_exist() -> None:
    assert [path for path in sorted(tree_paths()) if not (ROOT / path).is_file()] == []


def test_tree_names_every_module() -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tood_deploy").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert sorted(modules - tree_paths()) == []


def test_preset_table_agrees_with_the_presets() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \|.*\| ([\d.]+|-) \| (yes|by hand|none) \|$", README, flags=re.MULTILINE
    )
    assert [name for name, _, _ in rows] == list(PRESETS)
    for name, ap, download in rows:
        preset = PRESETS[name]
        assert ap == ("-" if preset.published_ap is None else str(preset.published_ap)), name
        assert (download == "yes") == (preset.weights is not None), name


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_examples_are_python(code: str) -> None:
    compile(code, "README.md", "exec")
