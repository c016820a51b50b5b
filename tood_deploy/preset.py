"""Define what a detector is in plain values. Knows nothing of torch.

A `Preset` says everything that building, loading and running a detector needs: the network's
dimensions, the classes, the test-time convention and the input statistics. Derive variants with
`dataclasses.replace`. Sources: reference/SPEC.md sections 1, 2 and 4; reference/SPEC_FAMILY.md.
"""

from dataclasses import asdict, dataclass, fields
from math import isfinite
from typing import Any, Literal

from tood_deploy.errors import ToodError

DetectorName = Literal["tood", "atss", "gfl", "paa", "fcos", "vfnet", "retinanet"]
BackboneStyle = Literal["pytorch", "caffe"]
ExtraLevels = Literal["output", "input"]
Anchor = Literal["free", "based"]
Convention = Literal["mmdet", "authors"]
ChannelOrder = Literal["rgb", "bgr"]
Resize = Literal["fit", "stretch"]

STRIDES = (8, 16, 32, 64, 128)
SIZE_DIVISOR = 32
MAX_IMGSZ = 16384  # pixels of a side of the network's input
MAX_CANDIDATES = 3840  # of all levels together: the most that TensorRT's TopK takes
# Of score voting: overlap below which a candidate has no vote, the width of the weights, and the
# sum of weights below which nobody has voted.
MIN_VOTING_IOU, VOTING_SIGMA, MIN_VOTES = 0.01, 0.025, 1e-30

ALLOWED = {
    "detector": ("tood", "atss", "gfl", "paa", "fcos", "vfnet", "retinanet"),
    "backbone_style": ("pytorch", "caffe"),
    "extra_levels": ("output", "input"),
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
    "bins": (2, 1024),
    "anchor_octaves": (1, 64),
}

POSITIVE = (
    "norm_eps",
    "batch_norm_eps",
    "anchor_side",
    "anchor_ratios",
    "std",
    "delta_stds",
    "scale_factor",
)
FINITE = ("mean", "pad_value", "anchor_offset", "delta_means")

# Fields that only some detectors have, and the value that all others hold.
OWN_FIELDS: tuple[tuple[str, object, tuple[DetectorName, ...]], ...] = (
    ("convention", "mmdet", ("tood",)),
    ("deform_tower", 0, ("tood",)),
    ("tower_bias", False, ("fcos",)),
    ("anchor_octaves", 1, ("retinanet",)),
    ("anchor_ratios", (1.0,), ("retinanet",)),
    ("score_voting", False, ("paa",)),
)

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
    """One detector.

    Attributes:
        name: the preset's name, or "custom" for a network that no preset describes.
        detector: whose head, decoding, score and order of post-processing it has.
        depth: ResNet depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        groups, base_width: ResNeXt's cardinality and width per group; a plain ResNet has one group,
            and its width counts for nothing.
        base_channels: channels of the stem; the stages hold 1, 2, 4, 8 times as many (times 4 for
            bottlenecks).
        deform_stages: backbone stages (1 to 4) whose 3x3 convolutions are deformable (DCNv2, one
            offset group).
        channels: channels of pyramid and head.
        backbone_style: where a bottleneck that halves its map has its stride, on its 3x3
            convolution ("pytorch") or its first 1x1 convolution ("caffe"); weights do not show it.
        extra_levels: what P6 is made from, P5 ("output") or C5 ("input").
        relu_before_p7: apply a ReLU to what P7's convolution reads.
        tower_stages: convolutions of the head's tower, or of each of its two towers.
        tower_bias: whether these have biases (FCOS; RetinaNet always).
        deform_tower: how many of these, from the first, are deformable (DCNv2,
            `TOWER_OFFSET_GROUPS` offset groups).
        anchor: "free" decodes distances, "based" decodes deltas against anchors. Of TOOD either;
            of the others a property of the detector.
        bins: of the distribution of every distance (GFL).
        anchor_octaves, anchor_ratios: scales of an octave, and ratios of height to width, that the
            anchors of a cell have (RetinaNet); one square anchor elsewhere.
        score_voting: whether the boxes that suppression keeps are averaged with those around them
            (PAA).
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
    detector: DetectorName = "tood"
    backbone_style: BackboneStyle = "pytorch"
    extra_levels: ExtraLevels = "output"
    relu_before_p7: bool = False
    tower_bias: bool = False
    bins: int = 17
    anchor_octaves: int = 1
    anchor_ratios: tuple[float, ...] = (1.0,)
    score_voting: bool = False
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
        self._check_network()
        self._check_detector()
        self._check_input()
        for field in POSITIVE:
            right = all(0 < value < float("inf") for value in _numbers(getattr(self, field)))
            self._check(field, right, "positive numbers")
        for field in FINITE:
            right = all(isfinite(value) for value in _numbers(getattr(self, field)))
            self._check(field, right, "finite numbers")
        for field in ("score_threshold", "iou_threshold"):
            self._check(field, 0 <= getattr(self, field) <= 1, "a number from 0 to 1")
        for field in ("max_det", "candidates_per_level"):
            self._check(
                field, 1 <= getattr(self, field) <= MAX_CANDIDATES, f"1 to {MAX_CANDIDATES}"
            )

    def _check_network(self) -> None:
        """Raise ToodError for dimensions that no network has."""
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

    def _check_input(self) -> None:
        """Raise ToodError for sizes that no input has."""
        self._check(
            "imgsz",
            len(self.imgsz) == 2 and 1 <= min(self.imgsz) <= max(self.imgsz) <= MAX_IMGSZ,
            f"short and long side, 1 to {MAX_IMGSZ} pixels",
        )
        for field in ("pad_divisor", "canvas_hw"):
            multiples = all(
                0 < value <= MAX_IMGSZ and value % SIZE_DIVISOR == 0
                for value in _numbers(getattr(self, field))
            )
            self._check(field, multiples, f"multiples of {SIZE_DIVISOR} up to {MAX_IMGSZ}")

    def _check_detector(self) -> None:
        """Raise ToodError for a field that this detector does not have."""
        who = self.detector
        for field, default, owners in OWN_FIELDS:
            right = who in owners or getattr(self, field) == default
            self._check(field, right, f"{default!r}, as {who} has no other")

    def _check(self, field: str, right: bool, expected: str) -> None:
        if not right:
            raise ToodError(
                f"preset {self.name}: {field} is {getattr(self, field)!r}; expected {expected}"
            )

    @property
    def c5_channels(self) -> int:
        """Channels of the backbone's last map."""
        return self.base_channels * (8 if self.depth < 50 else 32)

    @property
    def is_deformable(self) -> bool:
        """Whether any of its convolutions reads at offset places."""
        return bool(self.deform_stages or self.deform_tower) or self.detector == "vfnet"

    @property
    def ranks_by_class_score(self) -> bool:
        """Whether thresholds and limits look at the class score alone, before the centre-ness."""
        return self.detector in ("atss", "fcos")

    @property
    def anchors_per_cell(self) -> int:
        """How many boxes every cell of a level predicts."""
        return self.anchor_octaves * len(self.anchor_ratios)

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
