"""The published models of TOOD and its relatives, and our small ones, as literal values.

Knows nothing of torch. Sources: reference/SPEC.md section 6; reference/SPEC_FAMILY.md section 7;
the MMDetection 3.3.0 model index; the authors' README.
"""

import difflib
from dataclasses import replace

from tood_deploy.errors import DownloadError, ToodError
from tood_deploy.preset import (
    COCO_CLASSES,
    MAX_CANDIDATES,
    MAX_IMGSZ,
    MIN_VOTES,
    MIN_VOTING_IOU,
    SIZE_DIVISOR,
    STRIDES,
    VOTING_SIGMA,
    Anchor,
    ChannelOrder,
    Convention,
    DetectorName,
    Preset,
    PublishedWeights,
    Resize,
    Sizing,
)

__all__ = [
    "BASES",
    "COCO_CLASSES",
    "MAX_CANDIDATES",
    "MAX_IMGSZ",
    "MIN_VOTES",
    "MIN_VOTING_IOU",
    "PRESETS",
    "SIZE_DIVISOR",
    "STRIDES",
    "VOTING_SIGMA",
    "Anchor",
    "ChannelOrder",
    "Convention",
    "DetectorName",
    "Preset",
    "PublishedWeights",
    "Resize",
    "Sizing",
    "get_preset",
    "like_presets",
    "published_weights",
]


SHOWN = 4  # presets in a message


def _openmmlab(folder: str, name: str, suffix: str, file: str = "") -> PublishedWeights:
    """Return where MMDetection publishes weights.

    Args:
        folder: of the method.
        name: of the configuration, in 2.x.
        suffix: date and hash, at the end of the file's name.
        file: name of the file before the suffix, where it is not the configuration's.
    """
    path = f"{folder}/{name}/{file or f'{name}_'}{suffix}"
    url = f"https://download.openmmlab.com/mmdetection/v2.0/{path}.pth"
    return PublishedWeights(url, suffix.rsplit("-", 1)[1])


ATSS = Preset(
    "atss-r50-1x",
    50,
    detector="atss",
    anchor="based",
    tower_stages=4,
    weights=_openmmlab("atss", "atss_r50_fpn_1x_coco", "20200209-985f7bd0"),
    published_ap=39.4,
)
GFL = Preset(
    "gfl-r50-1x",
    50,
    detector="gfl",
    tower_stages=4,
    weights=_openmmlab("gfl", "gfl_r50_fpn_1x_coco", "20200629_121244-25944287"),
    published_ap=40.2,
)
PAA = Preset(
    "paa-r50-1x",
    50,
    detector="paa",
    anchor="based",
    tower_stages=4,
    score_voting=True,
    weights=_openmmlab("paa", "paa_r50_fpn_1x_coco", "20200821-936edec3"),
    published_ap=40.4,
)
# Its backbone is Caffe's, in strides and in the scale and order of its input.
FCOS = Preset(
    "fcos-r50-1x",
    50,
    detector="fcos",
    backbone_style="caffe",
    relu_before_p7=True,
    tower_stages=4,
    tower_bias=True,
    std=(1.0, 1.0, 1.0),
    channel_order="bgr",
    anchor_offset=0.5,
    weights=_openmmlab(
        "fcos",
        "fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco",
        "-0a0d75a8",
        "fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco",
    ),
    published_ap=38.7,
)
VFNET = Preset(
    "vfnet-r50-1x",
    50,
    detector="vfnet",
    relu_before_p7=True,
    tower_stages=3,
    weights=_openmmlab("vfnet", "vfnet_r50_fpn_1x_coco", "20201027-38db6f58"),
    published_ap=41.6,
)
RETINANET = Preset(
    "retinanet-r50-1x",
    50,
    detector="retinanet",
    anchor="based",
    extra_levels="input",
    tower_stages=4,
    anchor_side=4.0,
    anchor_octaves=3,
    anchor_ratios=(0.5, 1.0, 2.0),
    delta_stds=(1.0, 1.0, 1.0, 1.0),
    iou_threshold=0.5,
    weights=_openmmlab("retinanet", "retinanet_r50_fpn_1x_coco", "20200130-c2398f9e"),
    published_ap=36.5,
)
# Of what a network of this detector has where neither weights nor configuration show it.
BASES: dict[DetectorName, Preset] = {
    "tood": Preset("r50-1x", 50),
    **{preset.detector: preset for preset in (ATSS, GFL, PAA, FCOS, VFNET, RETINANET)},
}


def _variant(base: Preset, schedule: str, depth: int, name: str, suffix: str, ap: float) -> Preset:
    """Return a published model that differs from another in depth and training alone.

    Args:
        base: the other.
        schedule: of the training, for the preset's name.
        depth: of the ResNet.
        name: of the configuration, in 2.x.
        suffix: date and hash, at the end of the file's name.
        ap: COCO AP (0 to 100).
    """
    folder = base.detector
    weights = _openmmlab(folder, f"{folder}_{name}_coco", suffix)
    return replace(
        base, name=f"{folder}-r{depth}-{schedule}", depth=depth, weights=weights, published_ap=ap
    )


# In MMDetection's model index 2x means multi-scale training of GFL and VFNet, one scale of PAA and
# RetinaNet.
VARIANTS = (
    replace(
        ATSS,
        name="atss-r101-1x",
        depth=101,
        weights=_openmmlab(
            "atss", "atss_r101_fpn_1x_coco", "20200825-dfcadd6f", "atss_r101_fpn_1x_"
        ),
        published_ap=41.5,
    ),
    _variant(GFL, "2x", 50, "r50_fpn_mstrain_2x", "20200629_213802-37bb1edc", 42.9),
    _variant(GFL, "2x", 101, "r101_fpn_mstrain_2x", "20200629_200126-dd12f847", 44.7),
    _variant(PAA, "2x", 50, "r50_fpn_2x", "20200821-c98bfc4e", 41.6),
    _variant(PAA, "3x", 50, "r50_fpn_mstrain_3x", "20210121_145722-06a6880b", 43.3),
    _variant(PAA, "1x", 101, "r101_fpn_1x", "20200821-0a1825a4", 42.6),
    _variant(PAA, "2x", 101, "r101_fpn_2x", "20200821-6829f96b", 43.5),
    _variant(PAA, "3x", 101, "r101_fpn_mstrain_3x", "20210122_084202-83250d22", 45.1),
    _variant(VFNET, "2x", 50, "r50_fpn_mstrain_2x", "20201027-7cc75bd2", 44.8),
    _variant(VFNET, "1x", 101, "r101_fpn_1x", "20201027pth-c831ece7", 43.6),
    _variant(VFNET, "2x", 101, "r101_fpn_mstrain_2x", "20201027pth-4a5d53f1", 46.7),
    _variant(RETINANET, "2x", 50, "r50_fpn_2x", "20200131-fdb43119", 37.4),
    _variant(RETINANET, "1x", 101, "r101_fpn_1x", "20200130-7a93545f", 38.5),
    _variant(RETINANET, "2x", 101, "r101_fpn_2x", "20200131-5560aee8", 38.9),
)
# The other of two networks that have the same weights, for files that do not say which they are.
OTHER_STYLES = (
    replace(
        FCOS,
        name="fcos-r50-pytorch",
        backbone_style="pytorch",
        std=(58.395, 57.12, 57.375),
        channel_order="rgb",
        weights=None,
        published_ap=None,
    ),
    replace(
        RETINANET,
        name="retinanet-r50-caffe-1x",
        backbone_style="caffe",
        std=(1.0, 1.0, 1.0),
        channel_order="bgr",
        weights=_openmmlab("retinanet", "retinanet_r50_caffe_fpn_1x_coco", "20200531-f11027c5"),
        published_ap=36.3,
    ),
)
TINY = Preset("tiny", 18, base_channels=32, channels=64, imgsz=(240, 320))


def _tiny(base: Preset) -> Preset:
    """Return a detector at the size of `tiny`."""
    return replace(
        base,
        name=f"tiny-{base.detector}",
        depth=TINY.depth,
        base_channels=TINY.base_channels,
        channels=TINY.channels,
        imgsz=TINY.imgsz,
        weights=None,
        published_ap=None,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "r50-1x",
            50,
            weights=_openmmlab("tood", "tood_r50_fpn_1x_coco", "20211210_103425-20e20746"),
            published_ap=42.4,
        ),
        Preset(
            "r50-anchor-1x",
            50,
            anchor="based",
            weights=_openmmlab(
                "tood", "tood_r50_fpn_anchor_based_1x_coco", "20211214_100105-b776c134"
            ),
            published_ap=42.4,
        ),
        Preset(
            "r50-2x",
            50,
            weights=_openmmlab("tood", "tood_r50_fpn_mstrain_2x_coco", "20211210_144231-3b23174c"),
            published_ap=44.5,
        ),
        Preset(
            "r101-2x",
            101,
            weights=_openmmlab("tood", "tood_r101_fpn_mstrain_2x_coco", "20211210_144232-a18f53c8"),
            published_ap=46.1,
        ),
        Preset(
            "x101-2x",
            101,
            groups=64,
            weights=_openmmlab(
                "tood", "tood_x101_64x4d_fpn_mstrain_2x_coco", "20211211_003519-a4f36113"
            ),
            published_ap=47.6,
        ),
        Preset(
            "r101-dcn-2x",
            101,
            deform_stages=(2, 3, 4),
            deform_tower=2,
            weights=_openmmlab(
                "tood", "tood_r101_fpn_dconv_c3-c5_mstrain_2x_coco", "20211210_213728-4a824142"
            ),
            published_ap=49.3,
        ),
        # Published by the authors alone, on file-sharing sites that no program can download from;
        # 50.5 is their minival.
        Preset(
            "x101-dcn-2x",
            101,
            groups=64,
            deform_stages=(3, 4),
            deform_tower=2,
            convention="authors",
            published_ap=50.5,
        ),
        TINY,
        *(ATSS, GFL, PAA, FCOS, VFNET, RETINANET),
        *VARIANTS,
        *OTHER_STYLES,
        *map(_tiny, (ATSS, GFL, PAA)),
    )
}


def get_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        ToodError: there is none; the message names the nearest.
    """
    if name not in PRESETS:
        raise ToodError(f"no preset is called {name!r}; expected one such as {like_presets(name)}")
    return PRESETS[name]


def like_presets(name: str) -> str:
    """Return the presets whose names are nearest, for messages; the first where none is near."""
    near = difflib.get_close_matches(name, PRESETS, SHOWN) or list(PRESETS)[:SHOWN]
    return f"{', '.join(near)} (docs/presets.md lists all {len(PRESETS)})"


def published_weights(preset: Preset) -> PublishedWeights:
    """Return where a preset's weights can be downloaded.

    Raises:
        DownloadError: they cannot; the message says what to do instead.
    """
    if preset.weights is not None:
        return preset.weights
    if preset.published_ap is None:
        raise DownloadError(
            f"{preset.name}: no weights are published for this preset; "
            "give the path of a checkpoint"
        )
    raise DownloadError(
        f"{preset.name}: its weights are published by the authors alone, on file-sharing sites "
        "that need a browser; download them by hand (links: README of fcjian/TOOD) and give the "
        "path of the file"
    )
