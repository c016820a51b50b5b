"""The detector: an image in memory in, `Detections` out. Knows no files but the model's."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from tood_deploy.detections import Detections
from tood_deploy.engines import BatchDetections, Engine, open_engine
from tood_deploy.engines.base import ResizesFrames
from tood_deploy.errors import InputWarning, ToodError
from tood_deploy.inference.frame import Prepared
from tood_deploy.inference.image_input import Color, ImageInput, bgr_from, check_color
from tood_deploy.inference.slicing import Slicing
from tood_deploy.inference.thresholds import DEFAULT_CONF, Conf, class_scores, thresholds_from
from tood_deploy.preprocess import choose_canvas, fit_imgsz, plan_resize, resize_and_pad, with_imgsz

if TYPE_CHECKING:
    from tood_deploy.inference.file_list import Spec
    from tood_deploy.inference.frame import Frame, Selection, Source
    from tood_deploy.inference.live import Reconnection


class Detector:
    """Finds objects in images with any model that `open_engine` takes."""

    def __init__(
        self,
        model: str | PathLike[str] | Engine,
        *,
        conf: Conf = DEFAULT_CONF,
        iou: float | None = None,
        max_det: int | None = None,
        imgsz: Sequence[int] | None = None,
        device: str = "cpu",
        color: Color = "bgr",
        fast_decode: bool = False,
        device_resize: bool = False,
        slicing: Slicing | None = None,
        only: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        **engine_options: Any,
    ) -> None:
        """Open the model.

        Args:
            model: an artefact, a checkpoint, a preset's name, or an engine that is open already.
            conf: score that a detection must exceed, 0 to 1: a number, or one for each class, as
                "0.3,person=0.5", as a mapping of class names (the others: 0.3), or as a JSON file
                such as `tood-eval` writes.
            iou: overlap above which the lower-scored of two boxes of one class goes, 0 to 1; the
                model's own (0.6 in the published configurations) where not given.
            max_det: largest number of detections in an image, of a window where it is sliced; as
                many as the model gives (100) where not given.
            imgsz: (short side, long side) in pixels that images are scaled to fit, (rows, columns)
                for a model that stretches them; the model's own where not given.
            device: "cpu" or "cuda".
            color: order of the channels of the arrays that are given to the detector, "bgr" or
                "rgb"; a call may say otherwise. Frames of `stream` are BGR whatever it is.
            fast_decode: whether `stream` may decode JPEG images at 1/2, 1/4 or 1/8 of their size
                where `imgsz` needs no more. Results then differ a little; `Frame.image_bgr` is
                smaller, boxes stay in pixels of the whole image (`Frame.size_hw`).
            device_resize: whether images go to the device as they are, to be resized and padded
                there, in PyTorch's fast form; pixels differ by one grey level at most.
            slicing: search images in overlapping windows, and merge what is detected in them.
            only: names of the classes to detect; all where not given.
            exclude: names of classes to leave out.
            **engine_options: passed on to `open_engine`.

        Raises:
            ToodError: a value out of range, or a model that cannot be opened.
        """
        thresholds = thresholds_from(conf)
        if iou is not None and not 0 <= iou <= 1:
            raise ToodError(f"iou is {iou}; expected a number from 0 to 1")
        if slicing is not None and fast_decode:
            raise ToodError(
                "fast_decode reads images smaller than they are, slices need all of their pixels; "
                "leave one out"
            )
        check_color(color)
        self.engine = (
            model
            if isinstance(model, Engine)
            else open_engine(model, device=device, **engine_options)
        )
        if device_resize and not isinstance(self.engine, ResizesFrames):
            raise ToodError(
                f"device_resize is for PyTorch's fast form (runtime torch, or a .pt2), and the "
                f"model runs in {self.engine.name}; leave it out, or choose that runtime"
            )
        self.device_resize = device_resize
        given = self.engine.manifest.max_det
        if max_det is not None and not 1 <= max_det <= given:
            raise ToodError(f"max_det is {max_det}; expected 1 to {given}, what this model gives")
        self.color, self.fast_decode = color, fast_decode
        preset = with_imgsz(self.engine.manifest.preset, imgsz)
        self.iou = preset.iou_threshold if iou is None else iou
        self.max_det, self.slicing = max_det or given, slicing
        self.only, self.exclude = only, exclude
        self.slice_notes: list[str] = []  # remarks on slicing, for the user
        self.set_conf(thresholds)
        self.sizing, self.imgsz = preset.sizing, preset.imgsz

    def set_conf(self, conf: Conf) -> None:
        """Change the scores that detections must exceed.

        Args:
            conf: as the detector is made with it.

        Raises:
            ToodError: a value outside 0 to 1, or a class that the model does not have.
        """
        self.thresholds = thresholds_from(conf)
        self.class_scores = class_scores(self.thresholds, self.class_names, self.only, self.exclude)
        # The graph takes one threshold, the lowest; the others apply to what it gives.
        self.conf = self.thresholds.default
        if self.class_scores is not None:
            self.conf = float(self.class_scores.min())

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of every class, in the order of the class numbers."""
        return self.engine.manifest.preset.class_names

    def __call__(
        self, image: ImageInput, *, color: Color | None = None, batch: int = 1
    ) -> Detections:
        """Find the objects in one image, with boxes in its own pixels.

        Args:
            image: (H, W, 3) uint8, as OpenCV reads it; or (H, W, 4) with alpha, which is left out;
                or grey, (H, W) or (H, W, 1); or an image of Pillow, in modes 1, L, LA, P, PA, RGB,
                RGBA, CMYK and YCbCr. Pillow does not turn an image by the orientation in its EXIF
                data, and nor does this: `PIL.ImageOps.exif_transpose` does. `cv2.imread` has turned
                it already.
            color: order of an array's channels, "bgr" or "rgb"; what the detector was made with
                where not given. Of no effect on Pillow's images and on grey ones.
            batch: the most windows of one engine call, where the image is sliced; results do not
                depend on it.

        Raises:
            InputError: not such an image.
        """
        if self.slicing is not None:
            from tood_deploy.inference.sliced_pipeline import detect_sliced

            image_bgr = bgr_from(image, self.color if color is None else color)
            return detect_sliced(self, image_bgr, batch)
        return self.infer([self.prepare(image, color=color)])[0]

    def prepare(
        self,
        image: ImageInput,
        image_hw: tuple[int, int] | None = None,
        *,
        color: Color | None = None,
    ) -> Prepared:
        """Scale and pad an image, the first half of a call; may run in another thread than `infer`.

        Args:
            image: as a call takes it.
            image_hw: rows and columns of the original, where `image` was decoded smaller; boxes
                will be in its pixels.
            color: as a call takes it.

        Raises:
            InputError: not such an image.
        """
        image_bgr = bgr_from(image, self.color if color is None else color)
        canvases, size_hw = self.engine.input_shapes_hw, image_hw or image_bgr.shape
        sizing, net_hw = self.sizing, None
        if canvases:
            net_hw = choose_canvas(size_hw, self.sizing, canvases)
            sizing = fit_imgsz(size_hw, self.sizing, net_hw)
        if self.device_resize:
            return Prepared(image_bgr, plan_resize(image_bgr, sizing, net_hw, image_hw))
        return Prepared(*resize_and_pad(image_bgr, sizing, net_hw, image_hw))

    def infer(self, batch: Sequence[Prepared]) -> list[Detections]:
        """Return the second half: the network and the way back, for images of one padded size.

        The head pools over the whole padded input (reference/SPEC.md section 2), so an image that
        is padded further for the sake of its neighbours gives other results: batch images of the
        same `transform.net_hw` only.

        Raises:
            ToodError: the padded sizes differ.
        """
        return self.to_detections(batch, self.run_engine(batch))

    def submit(self, batch: Sequence[Prepared]) -> Any:
        """Start the network on images of one padded size; `collect` takes what comes back.

        See `Engine.submit`.

        Raises:
            ToodError: the padded sizes differ.
        """
        if self.device_resize and isinstance(self.engine, ResizesFrames):
            self._check_sizes(batch)
            frames = [prepared.image for prepared in batch]
            transforms = [prepared.transform for prepared in batch]
            return self.engine.submit_frames(frames, transforms, self.conf, self.iou)
        return self.engine.submit(*self._inputs(batch), self.conf, self.iou)

    def collect(self, ticket: Any) -> BatchDetections:
        """Wait for what was submitted."""
        return self.engine.collect(ticket)

    def run_engine(self, batch: Sequence[Prepared]) -> BatchDetections:
        """Return the network alone, for images of one padded size.

        Raises:
            ToodError: the padded sizes differ.
        """
        if self.device_resize:
            return self.collect(self.submit(batch))
        return self.engine.infer(*self._inputs(batch), self.conf, self.iou)

    @staticmethod
    def _check_sizes(batch: Sequence[Prepared]) -> None:
        if len({prepared.transform.net_hw for prepared in batch}) != 1:
            raise ToodError(
                f"a batch of {len(batch)} images of different padded sizes; expected one size "
                "(group by transform.net_hw)"
            )

    def _inputs(self, batch: Sequence[Prepared]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        self._check_sizes(batch)
        images = (
            batch[0].image[None]
            if len(batch) == 1
            else np.stack([prepared.image for prepared in batch])
        )
        valid_hw = np.array([prepared.transform.resized_hw for prepared in batch], np.int32)
        return images, valid_hw

    def to_detections(
        self, batch: Sequence[Prepared], detections: BatchDetections
    ) -> list[Detections]:
        """Return the detections of each image, with boxes in its own pixels."""
        if self.class_scores is not None:
            return self._filtered_by_class(batch, detections, self.class_scores)
        results = []
        for i, prepared in enumerate(batch):
            count = min(int(detections.num_dets[i]), self.max_det)
            boxes = prepared.transform.boxes_to_image(detections.boxes_net[i, :count])
            results.append(
                Detections(
                    boxes,
                    detections.scores[i, :count],
                    detections.labels[i, :count],
                    self.class_names,
                )
            )
        return results

    def _filtered_by_class(
        self,
        batch: Sequence[Prepared],
        detections: BatchDetections,
        class_scores: NDArray[np.float32],
    ) -> list[Detections]:
        """Return the detections of each image that exceed the score of their class.

        Args:
            batch: the images.
            detections: of the images, above the lowest of the scores.
            class_scores: (K,).
        """
        results = []
        for i, prepared in enumerate(batch):
            count = int(detections.num_dets[i])
            labels, scores = detections.labels[i, :count], detections.scores[i, :count]
            kept = np.flatnonzero(scores > class_scores[labels])[: self.max_det]
            boxes = prepared.transform.boxes_to_image(detections.boxes_net[i, kept])
            results.append(Detections(boxes, scores[kept], labels[kept], self.class_names))
        return results

    def stream(
        self,
        source: Spec | Sequence[Spec],
        batch: int = 1,
        max_pixels: int | None = None,
        *,
        first_page: bool = False,
        bit_depth: int | None = None,
        selection: Selection | None = None,
        reconnection: Reconnection | None = None,
    ) -> Generator[tuple[Frame, Detections], None, None]:
        """Yield every frame of what is named, with its detections, in order.

        Images, folders, videos, a camera or a stream. What cannot be read, frames that are missing
        and connections that were lost are told by an `InputWarning` each, and the rest goes on.

        Reading, scaling and inference run at the same time, in bounded queues. Close the iterator
        to stop early.

        Args:
            source: one or several of what `open_source` takes.
            batch: the most frames, or windows of them, of one engine call; results do not depend
                on it.
            max_pixels: refuse larger images, or read them by window where they are sliced; 200
                million where not given.
            first_page: of image files with several pages or frames, take the first alone.
            bit_depth: how many bits of 16-bit images hold data, where their files do not say.
            selection: which frames of videos and streams to give; all where not given.
            reconnection: what to do when the connection to a stream is lost; for rtsp and http it
                is made again where not given.

        Raises:
            ToodError: the source cannot be opened; later, while iterating: cannot be read at all.
        """
        from tood_deploy.data.image_header import MAX_PIXELS
        from tood_deploy.inference.frame import ALL_FRAMES
        from tood_deploy.inference.live import Reconnection
        from tood_deploy.inference.pipeline import detect_frames
        from tood_deploy.inference.source import open_source

        opened = open_source(
            source,
            MAX_PIXELS if max_pixels is None else max_pixels,
            first_page=first_page,
            bit_depth=bit_depth,
            selection=selection or ALL_FRAMES,
            reconnection=reconnection or Reconnection(),
        )
        return _warning_of_problems(detect_frames(self, opened, batch), opened)

    def close(self) -> None:
        """Free what the runtime holds."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _warning_of_problems(
    results: Generator[tuple[Frame, Detections], None, None], source: Source
) -> Generator[tuple[Frame, Detections], None, None]:
    """Yield the results of a source, and warn of what was lost."""
    warned = 0

    def warn() -> None:
        nonlocal warned
        for problem in source.problems[warned:]:
            warned += 1
            warnings.warn(problem, InputWarning, stacklevel=3)

    with closing(results):
        for pair in results:
            warn()
            yield pair
    warn()
