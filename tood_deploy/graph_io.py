"""The names of the exported graph: what goes in, what comes out, and the values on the way that keep their names (DESIGN section 4)."""

from tood_deploy.presets import STRIDES

INPUTS = ("images", "valid_hw", "score_threshold", "iou_threshold")
OUTPUTS = ("num_dets", "boxes", "scores", "labels")
LEVELS = tuple(f"p{i}" for i in range(3, 3 + len(STRIDES)))
HEAD_OUTPUTS = tuple(f"head_{kind}_{level}" for kind in ("scores", "boxes") for level in LEVELS)

# Values on the way to `OUTPUTS` that keep these names in every exported graph, stage by stage; none of them is an output of it.
STAGE_VALUES = {
    "pixels": ("pixels",),
    "backbone": ("c3", "c4", "c5"),
    "pyramid": LEVELS,
    "head": HEAD_OUTPUTS,
    "candidates": ("candidate_boxes", "candidate_scores", "candidate_labels"),
}
INNER_VALUES = tuple(name for names in STAGE_VALUES.values() for name in names)

# The maps among them, (B, C, h, w), in order, and the stage of each.
STAGE_OF_MAP = {
    name: stage for stage, names in STAGE_VALUES.items() if stage != "candidates" for name in names
}
MAP_NAMES = tuple(STAGE_OF_MAP)
