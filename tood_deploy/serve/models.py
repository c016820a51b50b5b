"""A model that is served: its detector, its batcher, and what requests may ask of it.

Encoded images or padded tensors come in, detections go out. Knows no HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.data.images import decode_image
from tood_deploy.detections import Detections
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Prepared
from tood_deploy.inference.slicing import Slicing, merge_windows, shift
from tood_deploy.inference.thresholds import class_scores, thresholds_from
from tood_deploy.manifest import Manifest
from tood_deploy.matching import NetDetections
from tood_deploy.preprocess import pad_size, padded_size, with_imgsz
from tood_deploy.presets import SIZE_DIVISOR
from tood_deploy.serve.batcher import Batcher, BatchObserver, PendingImage

WARM_UP_CALLS = 2  # the first of a size lays out memory, the second shows that it is done


@dataclass(frozen=True)
class ServeLimits:
    """What one request may ask for, and how requests are joined.

    Attributes:
        max_batch: the most images of a batch.
        batch_delay_s: how long the first image of a batch waits for others.
        queue: the most images of a model that may wait for the network.
        max_body: bytes of a request's body, unpacked.
        max_pixels: of an encoded image, by its header.
        timeout_s: from a request's first byte to its answer.
    """

    max_batch: int = 8
    batch_delay_s: float = 0.002
    queue: int = 64
    max_body: int = 64 * 2**20
    max_pixels: int = 50_000_000
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_batch", self.max_batch, 1),
            ("batch_delay_s", self.batch_delay_s, 0),
            ("queue", self.queue, 1),
            ("max_body", self.max_body, 1024),
            ("max_pixels", self.max_pixels, 1),
            ("timeout_s", self.timeout_s, 0.1),
        ):
            if not (math.isfinite(value) and value >= least):
                raise ToodError(f"{name} is {value}; expected {least} or more")


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a request wants to know of its images.

    Attributes:
        conf: the lowest score that counts for any class.
        iou: overlap above which the lower-scored of two boxes of a class goes.
        class_scores: (K,) the score that each class must exceed; None where `conf` is all.
        slicing: how images are searched in windows; None where they are not.
        drawn: whether the image is kept, to draw on it.
    """

    conf: float
    iou: float
    class_scores: NDArray[np.float32] | None = None
    slicing: Slicing | None = None
    drawn: bool = False


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An encoded image of a request, ready for the network.

    Attributes:
        name: of the file, "" where the request gives none.
        size_hw: rows and columns, upright.
        parts: the padded image, or its windows, and the whole after them where that is searched.
        windows: (N, 4) xyxy of every part, in pixels of the image.
        image_bgr: (H, W, 3) uint8; None where nothing will be drawn on it.
    """

    name: str
    size_hw: tuple[int, int]
    parts: Sequence[Prepared]
    windows: NDArray[np.int64]
    image_bgr: NDArray[np.uint8] | None = None


class ServedModel:
    """One model behind a name.

    Attributes:
        name: that it is served under.
        detector: opened, and proven by its self-test.
        batcher: runs its engine; nobody else does.
    """

    def __init__(
        self, name: str, detector: Detector, limits: ServeLimits, observe: BatchObserver
    ) -> None:
        """Take over an open detector.

        Args:
            name: that it is served under.
            detector: with the default thresholds; closed by `close`.
            limits: of a request.
            observe: gets every batch that was answered.
        """
        self.name, self.detector, self.limits = name, detector, limits
        self.batcher = Batcher(
            detector.engine,
            max_batch=limits.max_batch,
            delay_s=limits.batch_delay_s,
            capacity=limits.queue,
            observe=observe,
        )

    @property
    def manifest(self) -> Manifest:
        """What the artefact says of itself, with the image size that it is served with."""
        manifest, sizing = self.detector.engine.manifest, self.detector.sizing
        if manifest.preset.sizing == sizing:
            return manifest
        return replace(manifest, preset=with_imgsz(manifest.preset, sizing.imgsz))

    @property
    def platform(self) -> str:
        """The runtime, as the Open Inference Protocol names such things."""
        return self.detector.engine.name.rsplit(maxsplit=1)[0].lower().replace(" ", "") + "_onnx"

    def wanted(
        self,
        conf: str | None,
        iou: float,
        only: Sequence[str] | None = None,
        slicing: Slicing | None = None,
        *,
        drawn: bool = False,
    ) -> Wanted:
        """Return what a request wants, with what the server was started with for the rest.

        Args:
            conf: as in "0.3,person=0.5"; None where the request does not say.
            iou: of the suppression.
            only: names of classes to detect.
            slicing: how images are searched in windows.
            drawn: whether the image will be drawn on.

        Raises:
            InputError: a value out of range, or a class that the model does not have.
        """
        if conf is not None and conf.lower().endswith(".json"):  # a file of the server's
            raise InputError(f"conf is {conf[:40]!r}; expected such as 0.3 or 0.3,person=0.5")
        try:
            detector = self.detector
            thresholds = detector.thresholds if conf is None else thresholds_from(conf)
            classes = (only, None) if only is not None else (detector.only, detector.exclude)
            scores = class_scores(thresholds, detector.class_names, *classes)
        except ToodError as error:
            raise InputError(str(error)) from error
        lowest = thresholds.default if scores is None else float(scores.min())
        return Wanted(lowest, iou, scores, slicing, drawn)

    def decode(self, data: bytes, name: str, wanted: Wanted) -> DecodedImage:
        """Decode an image, cut it where it is sliced, scale and pad; in any thread.

        Args:
            data: a file's bytes.
            name: for errors and for the answer.
            wanted: of the request.

        Raises:
            InputError: not an image, damaged, too large, or of more windows than may wait.
        """
        image_bgr = decode_image(data, name or "the image", self.limits.max_pixels)
        height, width = image_bgr.shape[:2]
        whole = np.array([[0, 0, width, height]])
        windows = whole
        if wanted.slicing is not None:
            windows = wanted.slicing.windows((height, width))
            if wanted.slicing.whole and len(windows) > 1:
                windows = np.concatenate([windows, whole])
        if len(windows) > self.limits.queue:
            raise InputError(
                f"{name or 'the image'}: {len(windows)} windows, {self.limits.queue} may wait; "
                "slice larger"
            )
        parts = [
            self.detector.prepare(image_bgr[top:bottom, left:right], color="bgr")
            for left, top, right, bottom in windows.tolist()
        ]
        for part in parts:
            self.check_canvas(part.image.shape)
        kept = image_bgr if wanted.drawn else None
        return DecodedImage(name, (height, width), parts, windows, kept)

    def pending(self, decoded: DecodedImage, wanted: Wanted) -> list[PendingImage]:
        """Return the parts of an image as the batcher takes them."""
        return [
            PendingImage(part.image, part.transform.resized_hw, wanted.conf, wanted.iou)
            for part in decoded.parts
        ]

    def to_detections(
        self, decoded: DecodedImage, rows: Sequence[NetDetections], wanted: Wanted
    ) -> Detections:
        """Return detections with boxes in the image's own pixels.

        Args:
            decoded: the image.
            rows: of every part.
            wanted: of the request.
        """
        results = []
        for part, own, window in zip(decoded.parts, rows, decoded.windows, strict=True):
            kept = np.arange(len(own))
            if wanted.class_scores is not None:
                kept = np.flatnonzero(own.scores > wanted.class_scores[own.labels])
            kept = kept[: self.detector.max_det]
            boxes = part.transform.boxes_to_image(own.boxes[kept])
            names = self.detector.class_names
            detections = Detections(boxes, own.scores[kept], own.labels[kept], names)
            results.append(detections if len(rows) == 1 else shift(detections, window))
        return results[0] if wanted.slicing is None else merge_windows(results, wanted.slicing)

    def check_canvas(self, size_hw: tuple[int, ...]) -> None:
        """Refuse a padded size that is larger than the model's own ever are.

        The network's memory grows with it, and no limit on bodies bounds that well.

        Raises:
            InputError: it is.
        """
        sizing = self.detector.sizing
        largest = sizing.canvas_hw or pad_size((max(sizing.imgsz), max(sizing.imgsz)), SIZE_DIVISOR)
        bound = self.limits.max_pixels if sizing.scale_factor else largest[0] * largest[1]
        if size_hw[0] * size_hw[1] > bound:
            raise InputError(
                f"images are {size_hw[0]} x {size_hw[1]} padded, {size_hw[0] * size_hw[1]:,} "
                f"pixels; this model takes {bound:,}: scale them as its sizing says"
            )

    def warm_up(self) -> None:
        """Run the sizes that are to be expected, alone and in the largest batch.

        Raises:
            ToodError: the engine refuses one.
        """
        engine = self.detector.engine
        for net_hw in self._usual_shapes():
            smallest, largest = engine.batches_at(net_hw)
            most = min(self.limits.max_batch, largest or self.limits.max_batch)
            for batch in sorted({smallest, max(smallest, most)}):
                engine.settle(batch, net_hw)
                images = np.stack([synthetic_image(*net_hw, seed=0)] * batch)
                valid_hw = np.array([net_hw] * batch, np.int32)
                for _ in range(WARM_UP_CALLS):
                    engine.infer(images, valid_hw, self.detector.conf, self.detector.iou)

    def _usual_shapes(self) -> Sequence[tuple[int, int]]:
        """Return the padded sizes of landscape and portrait images, or all that the engine has."""
        if self.detector.engine.input_shapes_hw:
            return self.detector.engine.input_shapes_hw
        sizing = self.detector.sizing
        short, long = min(sizing.imgsz), max(sizing.imgsz)
        return sorted({padded_size(size_hw, sizing) for size_hw in ((short, long), (long, short))})

    def retry_after_s(self, seconds_per_image: float) -> int:
        """Return whole seconds after which the queue has probably been worked off."""
        return max(1, math.ceil(self.batcher.depth * seconds_per_image))

    def close(self) -> None:
        """Answer what waits, then free the engine."""
        self.batcher.close()
        self.detector.close()


def open_model(
    name: str, model: str, limits: ServeLimits, observe: BatchObserver, **options: Any
) -> ServedModel:
    """Open a model, prove it by its self-test, and warm it up.

    Args:
        name: that it will be served under.
        model: as `Detector` takes it.
        limits: of a request.
        observe: gets every batch that was answered.
        **options: of `Detector`.

    Raises:
        ToodError: it cannot be opened, or does not run.
    """
    served = ServedModel(name, Detector(model, **options), limits, observe)
    try:
        served.warm_up()
    except BaseException:
        served.close()
        raise
    return served
