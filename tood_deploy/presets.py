"""The published TOOD models, and our own small one, as literal values. Knows nothing of torch.

A `Preset` says everything that building, loading and running a detector needs: the network's dimensions, the classes,
the test-time convention and the input statistics. Derive variants with `dataclasses.replace`.
Sources: reference/SPEC.md sections 1, 2, 4 and 6; the MMDetection 3.3.0 model index; the authors' README.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from tood_deploy.errors import ToodError

Anchor = Literal["free", "based"]
Convention = Literal["mmdet", "authors"]

STRIDES = (8, 16, 32, 64, 128)
SIZE_DIVISOR = 32
MAX_CANDIDATES = 3840  # of all levels together: the most that TensorRT's TopK takes

COCO_CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,"
    "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,"
    "toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,"
    "teddy bear,hair drier,toothbrush".split(",")
)


@dataclass(frozen=True)
class PublishedWeights:
    """Where weights are published: the URL and the first 8 hexadecimal digits of the file's SHA-256."""

    url: str
    sha256_prefix: str


@dataclass(frozen=True)
class Preset:
    """One TOOD detector.

    Attributes:
        name: the preset's name, or "custom" for a network that no preset describes.
        depth: ResNet depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        groups, base_width: ResNeXt's cardinality and width per group; a plain ResNet has one group, and its width counts for nothing.
        base_channels: channels of the stem; the stages hold 1, 2, 4, 8 times as many (times 4 for bottlenecks).
        deform_stages: backbone stages (1 to 4) whose 3x3 convolutions are deformable (DCNv2, one offset group).
        channels: channels of pyramid and head.
        tower_stages: convolutions of the head's tower.
        deform_tower: how many of these, from the first, are deformable (DCNv2, `TOWER_OFFSET_GROUPS` offset groups).
        anchor: "free" decodes distances, "based" decodes deltas against one square anchor of 8 strides.
        class_names: one name per class, in the order of the scores.
        convention: whose test-time behaviour to follow, MMDetection's or the authors' (reference/SPEC.md section 4).
        imgsz: (short side, long side) in pixels that a picture is scaled to fit.
        mean, std: RGB, in pixel values of 0 to 255.
        weights: the published checkpoint, None where none can be downloaded.
        published_ap: COCO AP (0 to 100) its publisher states, on val2017.
    """

    name: str
    depth: int
    groups: int = 1
    base_width: int = 4
    base_channels: int = 64
    deform_stages: tuple[int, ...] = ()
    channels: int = 256
    tower_stages: int = 6
    deform_tower: int = 0
    anchor: Anchor = "free"
    class_names: tuple[str, ...] = COCO_CLASSES
    convention: Convention = "mmdet"
    imgsz: tuple[int, int] = (800, 1333)
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    weights: PublishedWeights | None = None
    published_ap: float | None = None

    def __post_init__(self) -> None:
        allowed = {"depth": (18, 34, 50, 101, 152), "anchor": ("free", "based"), "convention": ("mmdet", "authors")}
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise ToodError(f"preset {self.name}: {field} is {getattr(self, field)!r}; expected one of {values}")
        if not self.class_names:
            raise ToodError(f"preset {self.name}: no class names; a detector needs at least one class")
        if len(self.imgsz) != 2 or min(self.imgsz) < 1:
            raise ToodError(f"preset {self.name}: imgsz is {self.imgsz}; expected two positive numbers, short and long side")

    @property
    def num_classes(self) -> int:
        """How many classes the detector tells apart."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the download address stays out, an artefact does not need it."""
        values = asdict(self)
        del values["weights"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preset":
        """The preset that `to_dict` wrote.

        Raises:
            ToodError: a field is missing, unknown or out of range.
        """
        known = {field.name for field in fields(cls)} - {"weights"}
        if unknown := set(values) - known:
            raise ToodError(f"preset holds unknown fields {sorted(unknown)}; it was written by another version of tood_deploy")
        arguments: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        try:
            return cls(**arguments)
        except TypeError as error:
            raise ToodError(f"preset cannot be read ({error}); expected the fields {sorted(known)}") from error


def _openmmlab(name: str, suffix: str) -> PublishedWeights:
    url = f"https://download.openmmlab.com/mmdetection/v2.0/tood/{name}/{name}_{suffix}.pth"
    return PublishedWeights(url, suffix.rsplit("-", 1)[1])


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("r50-1x", 50, weights=_openmmlab("tood_r50_fpn_1x_coco", "20211210_103425-20e20746"), published_ap=42.4),
        Preset(
            "r50-anchor-1x",
            50,
            anchor="based",
            weights=_openmmlab("tood_r50_fpn_anchor_based_1x_coco", "20211214_100105-b776c134"),
            published_ap=42.4,
        ),
        Preset("r50-2x", 50, weights=_openmmlab("tood_r50_fpn_mstrain_2x_coco", "20211210_144231-3b23174c"), published_ap=44.5),
        Preset("r101-2x", 101, weights=_openmmlab("tood_r101_fpn_mstrain_2x_coco", "20211210_144232-a18f53c8"), published_ap=46.1),
        Preset(
            "x101-2x",
            101,
            groups=64,
            weights=_openmmlab("tood_x101_64x4d_fpn_mstrain_2x_coco", "20211211_003519-a4f36113"),
            published_ap=47.6,
        ),
        Preset(
            "r101-dcn-2x",
            101,
            deform_stages=(2, 3, 4),
            deform_tower=2,
            weights=_openmmlab("tood_r101_fpn_dconv_c3-c5_mstrain_2x_coco", "20211210_213728-4a824142"),
            published_ap=49.3,
        ),
        # Published by the authors alone, on file-sharing sites that no program can download from; 50.5 is their minival.
        Preset("x101-dcn-2x", 101, groups=64, deform_stages=(3, 4), deform_tower=2, convention="authors", published_ap=50.5),
        Preset("tiny", 18, base_channels=32, channels=64, imgsz=(240, 320)),
    )
}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ToodError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise ToodError(f"no preset is called {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
