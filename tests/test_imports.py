"""What is imported when, seen from fresh interpreters.

The runtime needs no torch, `--help` nothing heavy at all.
"""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_layering import LAYERS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]["scripts"]
HEAVY = {"numpy", "cv2", "onnxruntime", "torch", "av", "rich"}
RUNTIME = (*sorted(LAYERS[0]), "preprocess", "engines", "inference")
NEED_TORCH = {
    f"tood_deploy.engines.torch_{name}"
    for name in ("engine", "fast", "frames", "graphs", "program")
}

RUN_HELP = """
import sys
from {module} import {function}
sys.argv = ["{command}", "--help"]
try:
    code = {function}()
except SystemExit as stop:
    code = stop.code
print("loaded:", *sorted(sys.modules))
sys.exit(code)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def runtime_modules() -> list[str]:
    files = [file for unit in RUNTIME for file in (ROOT / "tood_deploy").glob(f"{unit}.py")]
    files += [file for unit in RUNTIME for file in (ROOT / "tood_deploy" / unit).rglob("*.py")]
    names = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in files
    }
    return sorted(names - NEED_TORCH)


def test_runtime_imports_without_torch() -> None:
    modules = ["tood_deploy", *runtime_modules()]
    assert "tood_deploy.engines.onnx_engine" in modules
    blocked = "import sys; sys.modules['torch'] = None"
    names = "from tood_deploy import PRESETS, Detections, Detector, open_engine"
    result = run_python("\n".join([blocked, *(f"import {module}" for module in modules), names]))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", SCRIPTS)
def test_help_imports_nothing_heavy(command: str) -> None:
    module, function = SCRIPTS[command].split(":")
    result = run_python(RUN_HELP.format(module=module, function=function, command=command))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {command} ")
    loaded = result.stdout.rpartition("loaded:")[2].split()
    assert "argparse" in loaded
    assert HEAVY.isdisjoint(name.split(".")[0] for name in loaded), HEAVY & set(loaded)
