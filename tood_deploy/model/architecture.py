"""Which network a state dict belongs to, told from the names and shapes of its tensors alone."""

import re
from collections.abc import Mapping
from dataclasses import replace

from tood_deploy.errors import CheckpointError
from tood_deploy.model.resnet import STAGE_BLOCKS
from tood_deploy.presets import PRESETS, Preset

Shapes = Mapping[str, tuple[int, ...]]

# A key that each part of a TOOD detector has.
LANDMARKS = ("backbone.conv1.weight", "backbone.layer1.0.conv2.weight", "neck.fpn_convs.0.conv.weight", "bbox_head.tood_cls.weight")


def preset_from_shapes(shapes: Shapes, origin: str) -> Preset:
    """The network these tensors fill, as the first preset of its structure, else as one named "custom".

    The class count is the file's, with numbered names; anchor kind and convention leave no trace in shapes and are the preset's.

    Raises:
        CheckpointError: these are not the tensors of a TOOD detector.
    """
    if missing := [key for key in LANDMARKS if key not in shapes]:
        parts = sorted({".".join(key.split(".")[:2]) for key in shapes})
        raise CheckpointError(
            f"{origin}: not a TOOD detector: {', '.join(missing)} missing; found {len(shapes)} tensors of "
            f"{', '.join(parts[:6])}{' and more' if len(parts) > 6 else ''}"
        )
    found = _custom_preset(shapes, origin)
    for preset in PRESETS.values():
        if same_structure(preset, found):
            return replace(preset, class_names=found.class_names)
    return found


def same_structure(first: Preset, second: Preset) -> bool:
    """Whether the state dicts of two presets have the same keys and, the class count apart, shapes."""

    def structure(preset: Preset) -> tuple[object, ...]:
        width = preset.base_width if preset.groups > 1 else 0
        return (
            *(preset.depth, preset.groups, width, preset.base_channels, preset.deform_stages),
            *(preset.channels, preset.tower_stages, preset.deform_tower),
        )

    return structure(first) == structure(second)


def numbered_classes(count: int) -> tuple[str, ...]:
    """Names for classes that nobody named."""
    return tuple(f"class_{i}" for i in range(count))


def _custom_preset(shapes: Shapes, origin: str) -> Preset:
    width, group_width = shapes["backbone.layer1.0.conv2.weight"][:2]
    deform_stages = tuple(n for n in range(1, 5) if f"backbone.layer{n}.0.conv2.conv_offset.weight" in shapes)
    return Preset(
        "custom",
        _depth(shapes, origin),
        groups=width // group_width,
        base_width=group_width,
        base_channels=shapes["backbone.conv1.weight"][0],
        deform_stages=deform_stages,
        channels=shapes["neck.fpn_convs.0.conv.weight"][0],
        tower_stages=_count(r"bbox_head\.inter_convs\.(\d+)\.", shapes),
        deform_tower=_count(r"bbox_head\.inter_convs\.(\d+)\.conv\.conv_offset\.", shapes),
        class_names=numbered_classes(shapes["bbox_head.tood_cls.weight"][0]),
    )


def _count(pattern: str, shapes: Shapes) -> int:
    return len({match[1] for key in shapes if (match := re.match(pattern, key))})


def _depth(shapes: Shapes, origin: str) -> int:
    blocks = tuple(_count(rf"backbone\.layer{n}\.(\d+)\.", shapes) for n in range(1, 5))
    bottlenecks = "backbone.layer1.0.conv3.weight" in shapes
    for depth, expected in STAGE_BLOCKS.items():
        if blocks == expected and (depth >= 50) == bottlenecks:
            return depth
    raise CheckpointError(
        f"{origin}: the backbone's stages have {blocks} blocks; expected a ResNet of depth {', '.join(map(str, STAGE_BLOCKS))}"
    )
