"""The builder's list of layers: kernels, types, bytes, streams and profiles, without a GPU."""

from dataclasses import replace

import pytest

from tood_deploy.errors import ArtefactError
from tood_deploy.export.tensorrt.kernels import Kernel, KernelTensor, kernels_from_log, summarise
from tood_deploy.export.tensorrt.layers import LayerReport


def tensor(name: str, shape: str, type_: str) -> str:
    return (
        f"{{ Name: {name}, Dimensions: [{shape}], Strides: [1], StrideOrder: [0], "
        f"Datatype: {type_}, Format: (NHWC) Channel major format }}"
    )


def line(name: str, kind: str, reads: str, writes: str, stream: int = 0) -> str:
    weight = tensor("w, [1]", "2,4", "Half") if kind == "correlation" else ""
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {reads}], Constants: [ {weight}], "
        f"Outputs: [ {writes}], TacticName: x, StreamId: {stream}, Metadata: [ONNX Layer: a, b]"
    )


PIXELS, LOW = tensor("i", "1,8", "UInt8"), tensor("x", "-1,8", "Half")
WIDE = tensor("z", "1,4", "Float")
LOG = "\n".join(
    [
        "Layers:",
        line("__mye1_0_myl1_0", "shape_call", "", ""),
        line("s_myl1_1", "signal", "", "", 1),
        line("__myl_CastTran_myl1_2", "kgen", PIXELS, LOW),
        line("conv, [1]_myl1_3", "correlation", LOW, tensor("y", "-1,4", "Half"), 1),
        line("conv8_myl1_4", "correlation", tensor("q", "1,4", "Int8"), WIDE),
        line("__myl_AddRelu_myl1_5", "kgen", tensor("z", "", "Float"), tensor("o", "3", "Int64")),
        "",
    ]
)


def test_what_an_image_takes() -> None:
    kernels = kernels_from_log(LOG)
    assert [kernel.name for kernel in kernels][1] == "conv, [1]_myl1_3"
    assert kernels[1].inputs == (KernelTensor("x", (1, 8), "Half"),)
    assert [kernel.bytes for kernel in kernels] == [8 + 16, 16 + 8 + 16, 4 + 16 + 16, 4 + 24]
    assert [kernel.only_moves for kernel in kernels] == [True, False, False, False]
    summary = summarise(kernels)
    assert (summary.kernels, summary.moving, summary.streams) == (4, 1, 2)
    assert summary.by_precision == {"fp16": 2, "int8": 1, "fp32": 1}
    assert summary.by_kind == {"kgen": 2, "correlation": 2}
    assert summary.requantised == 1
    assert summary.mib == pytest.approx(sum(kernel.bytes for kernel in kernels) / 2**20)


def test_kernels_of_the_first_profile_alone() -> None:
    twice = LOG + LOG.replace("Layers:\n", "").replace("_myl1_", "_myl3_")
    assert kernels_from_log(twice, 2) == kernels_from_log(LOG)
    assert len(kernels_from_log(twice)) == 8


def test_a_log_of_another_form() -> None:
    with pytest.raises(ArtefactError, match="lists no kernels"):
        kernels_from_log("Layers:\nLayer(CaskConvolution): conv1")
    report = LayerReport((), note="no GPU").with_kernels("Layers:\n", 1)
    assert report.kernels is None
    assert report.note.startswith("no GPU; ")


def test_a_report_has_them_in_place_of_a_plan_that_cannot_be_opened() -> None:
    report = LayerReport((), note="no GPU").with_kernels(LOG, 1)
    assert report.note == ""
    assert report.engine is not None
    assert [layer.precision for layer in report.engine] == ["fp16", "fp16", "int8", "fp32"]
    assert LayerReport(()).with_kernels("", 1) == LayerReport(())


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("__myl_Move_myl0_7", True),
        ("__myl_TranCastResh_myl0_7", True),
        ("__myl_CastMul_myl0_1", False),
    ],
)
def test_kernels_that_only_move(name: str, moves: bool) -> None:
    kernel = Kernel(name, "kgen", (), (), (), 0)
    assert kernel.only_moves is moves
    assert replace(kernel, kind="copy").only_moves
