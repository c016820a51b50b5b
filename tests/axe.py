"""axe-core from npm: what a page lacks for people who use it by keyboard or screen reader."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

PACKAGE, SCRIPT = "axe-core@4.14.1", "package/axe.min.js"


@functools.cache
def _axe_source() -> str:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", folder]
        packed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert packed.returncode == 0, packed.stderr
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            file = archive.extractfile(SCRIPT)
            assert file is not None
            return file.read().decode()


def accessibility_problems(page: Any) -> list[str]:
    """Return the rules that a page of Playwright breaks, with the elements that do."""
    page.evaluate(_axe_source())
    violations = page.evaluate("axe.run().then(results => results.violations)")
    return [
        f"{one['id']} ({one['impact']}): {', '.join(node['html'][:120] for node in one['nodes'])}"
        for one in violations
    ]
