"""Every command in an installation without any extra: one line that names ours, and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
from inference.fakes import write_image

from tood_deploy.errors import PACKAGES

OPTIONAL = sorted({name.split(".")[0] for name, package in PACKAGES.items() if package.extras})
RUN = """
import sys
for name in {missing}:
    sys.modules[name] = None
from tood_deploy.cli.{module} import main
sys.exit(main({arguments}))
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a image and files that have the names of models."""
    for name in ("m.pth", "m.onnx", "m.xml", "m.bin", "m.engine", "v.mp4", "r.json", "t.json"):
        (tmp_path / name).write_bytes(b"")
    write_image(tmp_path / "a.png")
    return tmp_path


def run(folder: Path, command: str, missing: list[str]) -> tuple[int, str]:
    module, *arguments = command.split()
    code = RUN.format(missing=missing, module=module, arguments=arguments)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("export m.pth", "", "export"),
        ("export tiny", "", "export"),
        ("export m.onnx --to openvino --output n.xml", "", "export"),
        ("infer m.pth a.png", "torch", "export"),
        ("infer r50-1x a.png", "torch", "export"),
        ("infer m.xml a.png", "openvino", "openvino"),
        ("infer m.onnx a.png --runtime openvino", "openvino", "openvino"),
        ("infer m.engine a.png", "cuda-bindings", "tensorrt"),
        ("batch m.onnx a.png --output o", "pyarrow", "cluster"),
        ("eval m.onnx --annotations t.json --images .", "", "eval"),
        ("eval r.json --annotations t.json", "", "eval"),
        ("bench latency m.onnx", "", "eval"),
        ("bench video m.onnx v.mp4", "", "eval"),
        ("bench parity m.pth m.onnx", "", "eval,export"),
        ("train tiny --train-json t.json --train-images .", "torch", "train"),
        ("train tiny --train-json t.json --train-images . --check-data", "torch", "train"),
    ],
)
def test_every_command_without_extras(command: str, package: str, extra: str, files: Path) -> None:
    code, err = run(files, command, OPTIONAL)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"error: the package {package}")
    assert f'pip install ".[{extra}]" in a checkout' in err


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("eval r.json --annotations t.json", "pycocotools", "eval"),
        ("eval r.json --annotations t.json", "jinja2", "eval"),
        ("bench latency m.onnx", "psutil", "eval"),
        ("export m.pth", "torch", "export"),
        ("export m.pth", "safetensors", "export"),
    ],
)
def test_a_single_package_that_is_missing(
    command: str, package: str, extra: str, files: Path
) -> None:
    code, err = run(files, command, [package])
    assert (code, err.count("\n")) == (2, 1), err
    assert f"the package {package} is not installed" in err
    assert f'pip install ".[{extra}]" in a checkout' in err


@pytest.mark.parametrize("command", ["infer m.onnx a.png", "export m.pth"])
def test_onnxruntime_missing(command: str, files: Path) -> None:
    code, err = run(files, command, ["onnxruntime"])
    assert (code, err.count("\n")) == (2, 1), err
    assert "pip install --no-deps onnxruntime" in err


def test_any_other_missing_module_is_a_traceback(files: Path) -> None:
    code, err = run(files, "infer m.onnx a.png", ["tood_deploy.inference.detector"])
    assert code == 1
    assert "Traceback" in err
