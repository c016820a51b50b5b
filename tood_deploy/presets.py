"""The published TOOD models, and our own small one, as literal values. Knows nothing of torch.

A `Preset` says everything that building, loading and running a detector needs: the network's
dimensions, the classes, the test-time convention and the input statistics. Derive variants with
`dataclasses.replace`. Sources: reference/SPEC.md sections 1, 2, 4 and 6; the MMDetection 3.3.0
model index; the authors' README.
"""

from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, Literal

from tood_deploy.errors import DownloadError, ToodError

Anchor = Literal["free", "based"]
Convention = Literal["mmdet", "authors"]
ChannelOrder = Literal["rgb", "bgr"]
Resize = Literal["fit", "stretch"]

STRIDES = (8, 16, 32, 64, 128)
SIZE_DIVISOR = 32
MAX_IMGSZ = 16384  # pixels of a side of the network's input
MAX_CANDIDATES = 3840  # of all levels together: the most that TensorRT's TopK takes

ALLOWED = {
    "depth": (18, 34, 50, 101, 152),
    "anchor": ("free", "based"),
    "convention": ("mmdet", "authors"),
    "channel_order": ("rgb", "bgr"),
    "resize": ("fit", "stretch"),
}

DIMENSIONS = {  # of the network, and what they may be
    "groups": (1, 1024),
    "base_width": (1, 1024),
    "base_channels": (1, 1024),
    "channels": (1, 4096),
    "tower_stages": (1, 64),
    "deform_tower": (0, 64),
}

COCO_CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop "
    "sign,parking meter,bench,"
    "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine "
    "glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted "
    "plant,bed,dining table,"
    "toilet,tv,laptop,mouse,remote,keyboard,cell "
    "phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,"
    "teddy bear,hair drier,toothbrush".split(",")
)


@dataclass(frozen=True)
class PublishedWeights:
    """Where weights are published.

    The URL and the first 8 hexadecimal digits of the file's SHA-256.
    """

    url: str
    sha256_prefix: str


@dataclass(frozen=True)
class Sizing:
    """How an image is brought to the size of the network's input; `preprocess` carries it out.

    Attributes:
        imgsz: where images fit, (short side, long side) in pixels; where they are stretched, (rows,
            columns).
        resize: "fit" keeps the aspect, "stretch" does not.
        scale_factor: of rows and columns; in place of `imgsz`, every image is resized to its own
            size times this.
        divisor: rows and columns are padded to a multiple of it.
        canvas_hw: rows and columns that every image is padded to; None for the next multiples of
            `divisor`.
    """

    imgsz: tuple[int, int]
    resize: Resize = "fit"
    scale_factor: tuple[float, float] | None = None
    divisor: int = SIZE_DIVISOR
    canvas_hw: tuple[int, int] | None = None

    def __str__(self) -> str:
        first, second = self.imgsz
        to = (
            f"by factors of {self.scale_factor[0]:g} and {self.scale_factor[1]:g}"
            if self.scale_factor
            else f"{first} x {second}"
        )
        verb = {
            "fit": "scaled" if self.scale_factor else "scaled to fit",
            "stretch": "stretched" if self.scale_factor else "stretched to",
        }
        padded = f", padded to {self.canvas_hw[0]} x {self.canvas_hw[1]}" if self.canvas_hw else ""
        return f"{verb[self.resize]} {to}{padded}" + (
            f", sides multiples of {self.divisor}" if self.divisor != SIZE_DIVISOR else ""
        )


@dataclass(frozen=True)
class Preset:
    """One TOOD detector.

    Attributes:
        name: the preset's name, or "custom" for a network that no preset describes.
        depth: ResNet depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        groups, base_width: ResNeXt's cardinality and width per group; a plain ResNet has one group,
            and its width counts for nothing.
        base_channels: channels of the stem; the stages hold 1, 2, 4, 8 times as many (times 4 for
            bottlenecks).
        deform_stages: backbone stages (1 to 4) whose 3x3 convolutions are deformable (DCNv2, one
            offset group).
        channels: channels of pyramid and head.
        tower_stages: convolutions of the head's tower.
        deform_tower: how many of these, from the first, are deformable (DCNv2,
            `TOWER_OFFSET_GROUPS` offset groups).
        anchor: "free" decodes distances, "based" decodes deltas against one square anchor of 8
            strides.
        class_names: one name per class, in the order of the scores.
        convention: whose test-time behaviour to follow, MMDetection's or the authors'
            (reference/SPEC.md section 4).
        imgsz: (short side, long side) in pixels that an image is scaled to fit; (rows, columns)
            where it is stretched.
        mean, std: RGB, in pixel values of 0 to 255.
        norm_groups, norm_eps: of the head's group norms.
        batch_norm_eps: of the backbone's batch norms.
        anchor_side: of the square anchor, in strides.
        anchor_offset: of the anchor points from the cells' upper left corners, in strides.
        delta_means, delta_stds: of the deltas dx, dy, dw, dh that anchor-based heads give.
        channel_order: that the network takes. Artefacts take RGB in any case, and reorder it.
        pad_value: what padding holds after normalising, in the order RGB.
        resize, scale_factor, pad_divisor, canvas_hw: see `Sizing`.
        score_threshold, iou_threshold, max_det: what evaluation uses where it is not told
            otherwise.
        candidates_per_level: (anchor, class) pairs of every level that go into suppression.
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
    norm_groups: int = 32
    norm_eps: float = 1e-5
    batch_norm_eps: float = 1e-5
    anchor_side: float = 8.0
    anchor_offset: float = 0.0
    delta_means: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    delta_stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    channel_order: ChannelOrder = "rgb"
    pad_value: tuple[float, float, float] = (0.0, 0.0, 0.0)
    resize: Resize = "fit"
    scale_factor: tuple[float, float] | None = None
    pad_divisor: int = SIZE_DIVISOR
    canvas_hw: tuple[int, int] | None = None
    score_threshold: float = 0.05
    iou_threshold: float = 0.6
    max_det: int = 100
    candidates_per_level: int = 1000
    weights: PublishedWeights | None = None
    published_ap: float | None = None

    def __post_init__(self) -> None:
        for field, values in ALLOWED.items():
            self._check(field, getattr(self, field) in values, f"one of {values}")
        self._check("class_names", bool(self.class_names), "at least one")
        self._check(
            "imgsz",
            len(self.imgsz) == 2 and 1 <= min(self.imgsz) <= max(self.imgsz) <= MAX_IMGSZ,
            f"short and long side, 1 to {MAX_IMGSZ} pixels",
        )
        for field, (low, high) in DIMENSIONS.items():
            self._check(field, low <= getattr(self, field) <= high, f"{low} to {high}")
        self._check(
            "deform_tower", self.deform_tower <= self.tower_stages, "no more than the tower"
        )
        self._check("deform_stages", set(self.deform_stages) <= {1, 2, 3, 4}, "stages 1 to 4")
        groups_fit = self.norm_groups >= 1 and self.channels % self.norm_groups == 0
        self._check(
            "norm_groups",
            groups_fit,
            f"a number that divides the {self.channels} channels of the head",
        )
        for field in (
            "norm_eps",
            "batch_norm_eps",
            "anchor_side",
            "std",
            "delta_stds",
            "scale_factor",
        ):
            self._check(
                field,
                all(0 < value < float("inf") for value in _numbers(getattr(self, field))),
                "positive numbers",
            )
        for field in ("mean", "pad_value", "anchor_offset", "delta_means"):
            self._check(
                field,
                all(isfinite(value) for value in _numbers(getattr(self, field))),
                "finite numbers",
            )
        for field in ("pad_divisor", "canvas_hw"):
            multiples = all(
                0 < value <= MAX_IMGSZ and value % SIZE_DIVISOR == 0
                for value in _numbers(getattr(self, field))
            )
            self._check(field, multiples, f"multiples of {SIZE_DIVISOR} up to {MAX_IMGSZ}")
        for field in ("score_threshold", "iou_threshold"):
            self._check(field, 0 <= getattr(self, field) <= 1, "a number from 0 to 1")
        for field in ("max_det", "candidates_per_level"):
            self._check(
                field, 1 <= getattr(self, field) <= MAX_CANDIDATES, f"1 to {MAX_CANDIDATES}"
            )

    def _check(self, field: str, right: bool, expected: str) -> None:
        if not right:
            raise ToodError(
                f"preset {self.name}: {field} is {getattr(self, field)!r}; expected {expected}"
            )

    @property
    def sizing(self) -> Sizing:
        """How images are brought to the size of the network's input."""
        return Sizing(self.imgsz, self.resize, self.scale_factor, self.pad_divisor, self.canvas_hw)

    @property
    def num_classes(self) -> int:
        """How many classes the detector tells apart."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON.

        The download address stays out, an artefact does not need it.
        """
        values = asdict(self)
        del values["weights"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preset":
        """Return the preset that `to_dict` wrote.

        Raises:
            ToodError: a field is missing, unknown or out of range.
        """
        known = {field.name for field in fields(cls)} - {"weights"}
        if unknown := set(values) - known:
            raise ToodError(
                f"preset holds unknown fields {sorted(unknown)}; it was written by another version "
                "of tood_deploy"
            )
        from msgspec import ValidationError, convert  # here, as --help reads the table of presets

        try:
            return convert(values, cls)
        except ValidationError as error:
            raise ToodError(f"preset cannot be read: {error}") from error


def _numbers(value: float | tuple[float, ...] | None) -> tuple[float, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _openmmlab(name: str, suffix: str) -> PublishedWeights:
    url = f"https://download.openmmlab.com/mmdetection/v2.0/tood/{name}/{name}_{suffix}.pth"
    return PublishedWeights(url, suffix.rsplit("-", 1)[1])


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "r50-1x",
            50,
            weights=_openmmlab("tood_r50_fpn_1x_coco", "20211210_103425-20e20746"),
            published_ap=42.4,
        ),
        Preset(
            "r50-anchor-1x",
            50,
            anchor="based",
            weights=_openmmlab("tood_r50_fpn_anchor_based_1x_coco", "20211214_100105-b776c134"),
            published_ap=42.4,
        ),
        Preset(
            "r50-2x",
            50,
            weights=_openmmlab("tood_r50_fpn_mstrain_2x_coco", "20211210_144231-3b23174c"),
            published_ap=44.5,
        ),
        Preset(
            "r101-2x",
            101,
            weights=_openmmlab("tood_r101_fpn_mstrain_2x_coco", "20211210_144232-a18f53c8"),
            published_ap=46.1,
        ),
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
            weights=_openmmlab(
                "tood_r101_fpn_dconv_c3-c5_mstrain_2x_coco", "20211210_213728-4a824142"
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
        Preset("tiny", 18, base_channels=32, channels=64, imgsz=(240, 320)),
    )
}


def get_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        ToodError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise ToodError(f"no preset is called {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


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
