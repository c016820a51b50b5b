"""Name what an exported artefact has: the graph's values, and the endings of its files.

Other modules import these names and endings and never write them again (DESIGN section 4). Knows no
runtime and no graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tood_deploy.presets import STRIDES, Preset

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INPUTS = ("images", "valid_hw", "score_threshold", "iou_threshold")
OUTPUTS = ("num_dets", "boxes", "scores", "labels")
LEVELS = tuple(f"p{i}" for i in range(3, 3 + len(STRIDES)))
HEAD_OUTPUTS = tuple(f"head_{kind}_{level}" for kind in ("scores", "boxes") for level in LEVELS)

# Values on the way to `OUTPUTS` that keep these names in every exported graph, stage by stage.
# None of them is an output of the graph; an engine of tood-export gives the candidates.
CANDIDATES = ("candidate_boxes", "candidate_scores", "candidate_labels")
STAGE_VALUES = {
    "pixels": ("pixels",),
    "backbone": ("c3", "c4", "c5"),
    "pyramid": LEVELS,
    "head": HEAD_OUTPUTS,
    "candidates": CANDIDATES,
}
INNER_VALUES = tuple(name for names in STAGE_VALUES.values() for name in names)
# Of detectors that hold the class score alone against thresholds, what the head hands on beside its
# maps: a factor of the scores, so that it is judged with them.
RANKING = tuple(f"head_ranking_{level}" for level in LEVELS)

# The maps among them, (B, C, h, w), in order, and the stage of each.
STAGE_OF_MAP = {
    name: stage for stage, names in STAGE_VALUES.items() if stage != "candidates" for name in names
}
MAP_NAMES = tuple(STAGE_OF_MAP)

Target = Literal["onnx", "openvino", "engine", "triton", "torch"]

ONNX_SUFFIX = ".onnx"
OPENVINO_SUFFIX = ".xml"
OPENVINO_WEIGHTS_SUFFIX = ".bin"  # of the file beside an OpenVINO .xml
ENGINE_SUFFIXES = (".engine", ".plan")
TORCH_SUFFIX = ".pt2"
ARTEFACT_SUFFIXES = (ONNX_SUFFIX, OPENVINO_SUFFIX, *ENGINE_SUFFIXES, TORCH_SUFFIX)

# What the files of every export target may end in, the usual ending first. Triton takes a folder.
TARGET_SUFFIXES: dict[Target, tuple[str, ...]] = {
    "onnx": (ONNX_SUFFIX,),
    "openvino": (OPENVINO_SUFFIX,),
    "engine": ENGINE_SUFFIXES,
    "triton": ("",),
    "torch": (TORCH_SUFFIX,),
}


def inner_value_names(preset: Preset) -> tuple[str, ...]:
    """Return the names of all values on the way to `OUTPUTS` in a detector's graph."""
    return INNER_VALUES + (RANKING if preset.ranks_by_class_score else ())


def program_outputs(preset: Preset) -> tuple[str, ...]:
    """Return the names of what a .pt2 program gives, in order.

    `OUTPUTS`, whether these are exact, and the values on the way to them, for who looks inside.
    """
    return (*OUTPUTS, "exact", *inner_value_names(preset))


# OpenVINO's files in the folder of a model server: a target of the command alone.
OVMS = "ovms"


def graph_feeds(
    images: NDArray[np.uint8],
    valid_hw: NDArray[np.int32],
    score_threshold: float,
    iou_threshold: float,
) -> dict[str, NDArray[Any]]:
    """Return the graph's inputs by name, as ONNX Runtime and OpenVINO take them.

    Args:
        images: (B, H, W, 3) uint8 RGB, padded to multiples of 32.
        valid_hw: (B, 2) int32 rows and columns that hold real pixels.
        score_threshold: 0 to 1.
        iou_threshold: 0 to 1.
    """
    import numpy as np  # here, as --help of the commands imports this module and no numpy

    thresholds = np.array(score_threshold, np.float32), np.array(iou_threshold, np.float32)
    return dict(zip(INPUTS, (images, valid_hw, *thresholds), strict=True))
