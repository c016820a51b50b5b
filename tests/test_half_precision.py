"""What an .onnx in half precision is for, by its manifest."""

from typing import Any

import pytest
from manifest_values import stated

from tood_deploy.engines.precision_support import (
    advise_on,
    half_precision_of,
    mixes_int8_and_half,
    why_not_on_cpus,
)
from tood_deploy.manifest import Manifest


def manifest(precision: str, beside: str = "") -> Manifest:
    options: dict[str, Any] = {"half_precision": {"precision": beside}} if beside else {}
    return stated(precision, options=options)


@pytest.mark.parametrize(
    ("found", "half", "runs"),
    [
        (manifest("fp32"), "", True),
        (manifest("int8"), "", True),
        (manifest("fp16"), "fp16", True),
        (manifest("bf16"), "bf16", False),
        (manifest("int8", "bf16"), "bf16", False),
        (manifest("int8", "fp16"), "fp16", False),
    ],
)
def test_what_runs_on_cpus(found: Manifest, half: str, runs: bool) -> None:
    assert half_precision_of(found) == half
    assert mixes_int8_and_half(found) == (found.precision == "int8" and bool(half))
    assert (why_not_on_cpus("a.onnx", found) == "") == runs
    assert bool(advise_on("a.onnx", found)) == bool(half)


def test_the_commands_name_the_file() -> None:
    lines = advise_on("a.onnx", manifest("bf16"))
    assert (
        "next, in OpenVINO, on a CPU with bf16: tood-infer a.onnx IMAGES --output DIR --runtime openvino"
        in lines
    )
    assert any(
        "tood-infer a.onnx IMAGES --output DIR --device cuda" in line
        for line in advise_on("a.onnx", manifest("fp16"))
    )
    assert not any("openvino" in line for line in advise_on("a.onnx", manifest("fp16")))
