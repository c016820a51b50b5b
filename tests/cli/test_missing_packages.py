"""Every command in an installation without any extra: one line that names ours, and exit code 2."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from inference.fakes import write_image

from tood_deploy.errors import PACKAGES

Run = Callable[[Path, str, list[str]], tuple[int, str]]
OPTIONAL = sorted({name.split(".")[0] for name, package in PACKAGES.items() if package.extras})
# A process that has what every installation has, and a copy of it for every line that it reads.
COPIES = """
import importlib, json, os, sys, traceback
import av, cv2, imagesize, msgspec, numpy, onnxruntime, PIL.Image, rich.progress, rich.table

for line in sys.stdin:
    folder, missing, module, arguments = json.loads(line)
    if os.fork() == 0:
        os.chdir(folder)
        os.dup2(os.open("stderr", os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for name in [name for name in sys.modules if name.split(".")[0] in missing]:
            del sys.modules[name]
        sys.modules.update(dict.fromkeys(missing))
        code = 1
        try:
            code = importlib.import_module(f"tood_deploy.cli.{module}").main(arguments)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a image and files that have the names of models."""
    for name in ("m.pth", "m.onnx", "m.xml", "m.bin", "m.engine", "v.mp4", "r.json", "t.json"):
        (tmp_path / name).write_bytes(b"")
    write_image(tmp_path / "a.png")
    return tmp_path


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """A function of a folder, a command and packages: its exit code and stderr without these."""
    with subprocess.Popen(
        [sys.executable, "-c", COPIES], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        given, codes = process.stdin, process.stdout

        def in_a_copy(folder: Path, command: str, missing: list[str]) -> tuple[int, str]:
            module, *arguments = command.split()
            given.write(json.dumps([str(folder), missing, module, arguments]) + "\n")
            given.flush()
            code = int(codes.readline())
            return code, (folder / "stderr").read_text(encoding="utf-8")

        yield in_a_copy


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
def test_every_command_without_extras(
    command: str, package: str, extra: str, files: Path, run: Run
) -> None:
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
    command: str, package: str, extra: str, files: Path, run: Run
) -> None:
    code, err = run(files, command, [package])
    assert (code, err.count("\n")) == (2, 1), err
    assert f"the package {package} is not installed" in err
    assert f'pip install ".[{extra}]" in a checkout' in err


@pytest.mark.parametrize("command", ["infer m.onnx a.png", "export m.pth"])
def test_onnxruntime_missing(command: str, files: Path, run: Run) -> None:
    code, err = run(files, command, ["onnxruntime"])
    assert (code, err.count("\n")) == (2, 1), err
    assert "pip install --no-deps onnxruntime" in err


def test_any_other_missing_module_is_a_traceback(files: Path, run: Run) -> None:
    code, err = run(files, "infer m.onnx a.png", ["tood_deploy.inference.detector"])
    assert code == 1
    assert "Traceback" in err
