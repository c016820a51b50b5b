"""The heads: TOOD's, and its relatives' of two towers; `build_head` gives a preset's."""

from tood_deploy.model.head import SeparateTowers
from tood_deploy.model.heads.tood import TaskAlignedHead
from tood_deploy.model.heads.towers import (
    AtssHead,
    FcosHead,
    GflHead,
    PaaHead,
    RetinaHead,
    VfnetHead,
)
from tood_deploy.presets import DetectorName, Preset

Head = TaskAlignedHead | SeparateTowers

HEADS: dict[DetectorName, type[TaskAlignedHead] | type[SeparateTowers]] = {
    "tood": TaskAlignedHead,
    "atss": AtssHead,
    "gfl": GflHead,
    "paa": PaaHead,
    "fcos": FcosHead,
    "vfnet": VfnetHead,
    "retinanet": RetinaHead,
}

# The convolution of every head that gives the class logits.
CLASS_LAYERS: dict[DetectorName, str] = {
    "tood": "tood_cls",
    "atss": "atss_cls",
    "gfl": "gfl_cls",
    "paa": "atss_cls",
    "fcos": "conv_cls",
    "vfnet": "vfnet_cls",
    "retinanet": "retina_cls",
}


def build_head(preset: Preset) -> Head:
    """Return the head of a preset, with random initial weights."""
    return HEADS[preset.detector](preset)
