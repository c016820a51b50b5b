"""The exported forms of parts of the network, each alone: deformable convolutions, the head with
static kernels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch

from tood_deploy.export.graph import DeformConvOp, ExportedGraph, use_static_kernels
from tood_deploy.model.deform import DeformConv2d
from tood_deploy.model.static_detector import Bias


@pytest.mark.parametrize(
    ("form", "stride", "groups", "offset_groups"), [("op", 2, 8, 1), ("gather", 1, 1, 4)]
)
@pytest.mark.filterwarnings("ignore:# The axis name")  # two names for the one batch
def test_both_forms_equal_pytorch(
    form: str, stride: int, groups: int, offset_groups: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    layer = DeformConv2d(
        16, 16, 3, stride=stride, padding=1, groups=groups, offset_groups=offset_groups
    ).eval()
    torch.nn.init.normal_(layer.conv_offset.weight, std=0.2)
    module = DeformConvOp(layer).eval() if form == "op" else layer
    shape: Any = (
        {
            0: torch.export.Dim("batch", min=1),
            2: torch.export.Dim("rows", min=2),
            3: torch.export.Dim("columns", min=2),
        },
    )
    program = torch.onnx.export(
        module,
        (torch.randn(2, 16, 9, 12),),
        dynamo=True,
        opset_version=21,
        dynamic_shapes=shape,
        verbose=False,
    )
    assert program is not None
    program.save(tmp_path / "layer.onnx")
    assert ("DeformConv" in {node.op_type for node in program.model_proto.graph.node}) == (
        form == "op"
    )
    session = ort.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    for size in ((1, 16, 5, 7), (3, 16, 12, 8)):
        x = torch.randn(size)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.as_tensor(found), layer(x), rtol=1e-4, atol=1e-5)


def test_the_head_with_static_kernels_equals_the_head(seeded_model: Callable[..., Any]) -> None:
    model = seeded_model("tiny").eval()
    torch.manual_seed(0)
    levels = [
        torch.randn(2, model.preset.channels, *size)
        for size in ((9, 12), (5, 6), (3, 3), (2, 2), (1, 1))
    ]
    with torch.inference_mode():
        expected = model.bbox_head(levels)
    use_static_kernels(model.bbox_head)
    with torch.inference_mode():
        found = model.bbox_head(levels)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_batch_norms_behind_deformable_convolutions_are_folded_and_the_network_is_left_alone(
    seeded_model: Callable[..., Any],
) -> None:
    model = seeded_model("tiny", depth=50, base_channels=16, deform_stages=(3, 4))
    model.eval().requires_grad_(False)
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = model.backbone(x)
    exported = ExportedGraph(model, "gather", 100).detector.model.backbone
    assert isinstance(exported.get_submodule("layer3.0.bn2"), Bias)
    for found, wanted in zip(exported(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert all(
        torch.equal(found, wanted)
        for found, wanted in zip(model.backbone(x), expected, strict=True)
    )
