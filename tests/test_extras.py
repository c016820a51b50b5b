"""Which extra brings a package, and what a user reads where it is missing."""

import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
from test_layering import PACKAGE, imported_modules, python_files

from tood_deploy import Detector, __version__
from tood_deploy.errors import PACKAGES, DeviceError, naming_extras, not_installed

PROJECT: dict[str, Any] = tomllib.loads(
    (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
)["project"]
NO_EXTRAS_OF_USERS = {"dev", "docs"}
WITHOUT_EXTRA = {
    "_typeshed",  # of type checkers alone
    "sympy",  # comes with torch, which imports it itself
    "supervision",
    "tensorrt",
    "tensorrt_rtx",
}  # a user's own; and libraries that come from NVIDIA
REPLACED = {"onnxruntime-gpu"}  # its module is onnxruntime


def distribution(requirement: str) -> str:
    return requirement.split(">=")[0].replace("_", "-")


def test_the_table_is_that_of_pyproject() -> None:
    declared: dict[str, set[str]] = {distribution(name): set() for name in PROJECT["dependencies"]}
    for extra, requirements in PROJECT["optional-dependencies"].items():
        for name in {distribution(requirement) for requirement in requirements} - REPLACED:
            if extra not in NO_EXTRAS_OF_USERS:
                declared.setdefault(name, set()).add(extra)
    assert {
        distribution(package.distribution): set(package.extras) for package in PACKAGES.values()
    } == declared


def test_every_package_that_is_imported_is_in_the_table() -> None:
    imported = {
        name
        for file in python_files()
        for name in imported_modules((PACKAGE / file).read_text(encoding="utf-8"))
    }
    foreign = {
        name
        for name in imported
        if name.split(".")[0] not in {"tood_deploy", *sys.stdlib_module_names, *WITHOUT_EXTRA}
    }
    assert "torch.Tensor" in foreign
    assert [
        name
        for name in sorted(foreign)
        if not any(f"{name}.".startswith(f"{module}.") for module in PACKAGES)
    ] == []


@pytest.mark.parametrize(
    ("module", "extras", "brackets"),
    [
        ("torch", (), "[export]"),
        ("torch", ("train",), "[train]"),
        ("openvino", ("train",), "[openvino]"),
        ("psutil", ("eval", "export"), "[eval,export]"),
        ("rich", ("eval",), ""),
    ],
)
def test_the_sentence_names_a_checkout_and_a_wheel(
    module: str, extras: tuple[str, ...], brackets: str
) -> None:
    sentence = not_installed(module, *extras)
    assert sentence.startswith(f"the package {module} is not installed; ")
    assert f'pip install ".{brackets}"' in sentence
    assert f'pip install "tood_deploy-{__version__}-py3-none-any.whl{brackets}"' in sentence


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("torch", "torch"),
        ("onnx_ir", "onnx-ir"),
        ("cuda", "cuda-bindings"),
        ("cuda.core", "cuda-core"),
        ("google", "protobuf"),
    ],
)
def test_a_missing_package_is_named(name: str, missing: str) -> None:
    with (
        pytest.raises(DeviceError, match=f"the package {missing} is not installed"),
        naming_extras(),
    ):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_part_of_a_missing_package_stands_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with (
        pytest.raises(DeviceError, match="the package safetensors is not installed"),
        naming_extras(),
    ):
        import safetensors.torch  # noqa: F401


@pytest.mark.parametrize("name", ["tood_deploy.gone", "torch.gone", "gone", None])
def test_any_other_missing_module_is_a_bug(name: str | None) -> None:
    with pytest.raises(ModuleNotFoundError), naming_extras():
        raise ModuleNotFoundError("no such module", name=name)


def hide(monkeypatch: pytest.MonkeyPatch, package: str, *ours: str) -> None:
    """Makes a package missing; our modules that import it are loaded again."""
    monkeypatch.setitem(sys.modules, package, None)
    for module in ours:
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.parametrize(
    ("model", "package", "ours", "extra"),
    [
        ("m.pth", "torch", "tood_deploy.engines.torch_engine", "export"),
        ("tiny", "torch", "tood_deploy.engines.torch_engine", "export"),
        ("m.xml", "openvino", "", "openvino"),
        (
            "m.engine",
            "cuda.bindings",
            "tood_deploy.engines.tensorrt.cuda tood_deploy.engines.tensorrt.engine",
            "tensorrt",
        ),
        ("m.onnx", "onnxruntime", "tood_deploy.engines.onnx_engine", "onnxruntime-gpu"),
    ],
)
def test_detector_names_the_extra(
    model: str, package: str, ours: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, package, *ours.split())
    monkeypatch.chdir(tmp_path)
    if "." in model:
        Path(model).write_bytes(b"<?xml")
        Path(model).with_suffix(".bin").write_bytes(b"")
    with pytest.raises(DeviceError, match="is not installed") as caught:
        Detector(model)
    assert extra in str(caught.value)


def test_onnxruntime_that_another_package_has_emptied_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "onnxruntime", "tood_deploy.engines.onnx_engine", "tood_deploy.onnx_file")
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    (tmp_path / "m.onnx").write_bytes(b"\x08")
    with pytest.raises(
        DeviceError,
        match="onnxruntime is not installed, or another package has damaged it; run pip uninstall",
    ):
        Detector(tmp_path / "m.onnx")
