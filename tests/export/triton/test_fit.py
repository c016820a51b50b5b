"""Whether Triton can serve a model, by its manifest alone."""

from pathlib import Path
from typing import Any

import pytest
from export.small_graph import save_small
from manifest_values import stated

from tood_deploy.errors import ToodError
from tood_deploy.export.triton.fit import check_precision, plan_serving
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.export.triton.repository import triton_repository
from tood_deploy.manifest import Manifest


def manifest(precision: str, **options: Any) -> Manifest:
    return stated(precision, options=options)


MIXED = {"int8": {"scheme": "s8s8"}, "half_precision": {"precision": "bf16"}}


@pytest.mark.parametrize(
    ("source", "backend", "device", "message"),
    [
        (
            manifest("bf16"),
            "onnxruntime",
            "cuda",
            "in bf16: .* serve fp32, int8, or fp16 on GPUs, or give --backend tensorrt",
        ),
        (manifest("fp16"), "onnxruntime", "cpu", "in fp16 and device cpu"),
        (manifest("int8", **MIXED), "onnxruntime", "cuda", "in int8 beside bf16"),
        (
            manifest("int8", int8={"scheme": "u8s8"}),
            "tensorrt",
            "cuda",
            "zero points, which TensorRT lacks",
        ),
        (
            manifest("int8", autotune={"scheme": "u8s8"}),
            "tensorrt",
            "cuda",
            "zero points, which TensorRT lacks",
        ),
    ],
)
def test_refused(source: Manifest, backend: Any, device: Any, message: str) -> None:
    with pytest.raises(ToodError, match=f"^a.onnx.*{message}"):
        check_precision("a.onnx", source, backend, TritonOptions(device=device))


@pytest.mark.parametrize(
    ("source", "backend", "device"),
    [
        (manifest("fp32"), "onnxruntime", "cpu"),
        (manifest("int8", int8={"scheme": "u8s8"}), "onnxruntime", "cpu"),
        (manifest("fp16"), "onnxruntime", "cuda"),
        (manifest("bf16"), "tensorrt", "cuda"),
        (manifest("int8", **MIXED), "tensorrt", "cuda"),
    ],
)
def test_served(source: Manifest, backend: Any, device: Any, tmp_path: Path) -> None:
    options = TritonOptions(name="a", backend=backend, device=device)
    plan = plan_serving(Path("a.onnx"), source, tmp_path, options, None)
    assert (plan.backend, plan.version, plan.profiles.batch) == (backend, 1, (1, 1, 8))


def test_in_python_too_and_nothing_is_left(tmp_path: Path) -> None:
    model = save_small(tmp_path / "a.onnx", stated="bf16")
    with pytest.raises(ToodError, match="in bf16"):
        triton_repository(model, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_schemes() -> None:
    assert [
        manifest("int8", **options).build.int8_scheme
        for options in ({}, {"int8": {"scheme": "s8s8"}})
    ] == ["", "s8s8"]
