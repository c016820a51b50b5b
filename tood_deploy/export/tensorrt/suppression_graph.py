"""Suppression alone as an ONNX graph without a loop: `nms_unrolled`, exported. Knows nothing of the graphs it goes into."""

from __future__ import annotations

from functools import lru_cache

import onnx
import torch
from torch import Tensor, nn

from tood_deploy.export.to_onnx import OPSET, quiet_exporter
from tood_deploy.model.nms_unrolled import nms_unrolled

INPUTS = ("boxes", "scores", "labels", "iou_threshold")
OUTPUTS = ("kept", "num_dets")
EXAMPLE_BATCH = 2


class UnrolledSuppression(nn.Module):
    """`nms_unrolled`; where it is not exact, the count is -1."""

    def __init__(self, max_det: int, rounds: int) -> None:
        super().__init__()
        self.max_det, self.rounds = max_det, rounds

    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: Tensor) -> tuple[Tensor, Tensor]:
        """What `OUTPUTS` names: positions (B, max_det) and how many count (B,), both int64."""
        found = nms_unrolled(boxes, scores, labels, iou_threshold, self.max_det, rounds=self.rounds)
        return found.kept, torch.where(found.exact, found.num_dets, -1)


@lru_cache(maxsize=4)
def suppression_graph(count: int, max_det: int, rounds: int) -> onnx.ModelProto:
    """The graph for `count` candidates a picture, dynamic in the batch; not to be changed, as further calls give the same."""
    batch = torch.export.Dim("batch", min=1)
    shape = (EXAMPLE_BATCH, count)
    example = (torch.zeros(*shape, 4), torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), torch.tensor(0.6))
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            UnrolledSuppression(max_det, rounds).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes=({0: batch}, {0: batch}, {0: batch}, None),
            verbose=False,
        )
    assert program is not None
    return program.model_proto
