"""Stand-ins for the tests of inference.

An engine that finds red pixels, and small videos made on the spot.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from tood_deploy.detections import Detections
from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.sinks import Sink
from tood_deploy.manifest import Manifest
from tood_deploy.presets import PRESETS

MILLISECOND = Fraction(1, 1000)
CLASSES = ("red thing", "other/thing")


class RedEngine(Engine):
    """Finds one object per image: the box around its red pixels.

    Sleeps as long as an engine would work.
    """

    def __init__(
        self,
        seconds_per_image: float = 0.0,
        fail_at_call: int | None = None,
        path: Path | None = None,
    ) -> None:
        self.manifest = Manifest(replace(PRESETS["tiny"], class_names=CLASSES), max_det=4)
        self.device, self.name, self.path = "cpu", "red", path
        self.seconds_per_image, self.fail_at_call = seconds_per_image, fail_at_call
        self.batches: list[int] = []

    def _run(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        if len(self.batches) == self.fail_at_call:
            raise RuntimeError("the engine broke")
        self.batches.append(len(images))
        time.sleep(self.seconds_per_image * len(images))
        count = len(images)
        found = BatchDetections(
            np.zeros(count, np.int32),
            np.zeros((count, 4, 4), np.float32),
            np.zeros((count, 4), np.float32),
            np.zeros((count, 4), np.int32),
        )
        for i, image in enumerate(images):
            rows, columns = np.nonzero((image[..., 0] > 150) & (image[..., 1] < 100))
            if len(rows):
                found.num_dets[i] = 1
                found.boxes_net[i, 0] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                found.scores[i, 0] = 0.75
        return found


def red_image(
    height: int = 48, width: int = 64, left: int = 8, top: int = 8, side: int = 16
) -> NDArray[np.uint8]:
    """A grey image with a red square."""
    image = np.full((height, width, 3), 60, np.uint8)
    image[top : top + side, left : left + side] = (0, 0, 250)
    return image


def moving_images(count: int, height: int = 48, width: int = 64) -> list[NDArray[np.uint8]]:
    """Images in which the red square moves 2 pixels to the right each time."""
    return [red_image(height, width, left=2 * i % (width - 16)) for i in range(count)]


def write_video(
    path: Path,
    images: Sequence[NDArray[np.uint8]],
    times: Sequence[int] | None = None,
    rotation: int | None = None,
    matrix: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    b_frames: int = 0,
    color: tuple[int, int, int, int] | None = None,
    time_base: Fraction = MILLISECOND,
    **options: str,
) -> Path:
    """A video with these frames at these times, in milliseconds (every 40 where not given).

    `matrix`: of its display, nine numbers; `color`: range, primaries, transfer, matrix.
    """
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(
            "libx264", rate=25, options={"crf": "10", "bf": str(b_frames), "g": "10"}
        )
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = time_base
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        context = stream.codec_context
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        if color is not None:
            context.color_range, context.color_primaries = color[:2]
            context.color_trc, context.colorspace = color[2:]
        for i, image in enumerate(images):
            frame = VideoFrame.from_ndarray(image, format="bgr24")
            frame.pts, frame.time_base = (40 * i if times is None else times[i]), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def without_packets(path: Path, kept: Path, dropped: Collection[int], shift: int = 0) -> Path:
    """A copy of a video without some of its packets, its times shifted by so many units."""
    with av.open(str(path)) as source, av.open(str(kept), "w") as out:
        stream = source.streams.video[0]
        copied = out.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        for number, packet in enumerate(packets):
            if number not in dropped and packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = copied
                out.mux(packet)
    return kept


def write_image(path: Path, image: NDArray[np.uint8] | None = None) -> Path:
    """A image file; the red square where no image is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), red_image() if image is None else image)
    return path


def found(*boxes: tuple[float, float, float, float]) -> Detections:
    """Detections with these boxes, of the two classes in turn, with scores from 0.9 down to 0.5."""
    count = len(boxes)
    scores = np.linspace(0.9, 0.5, count).astype(np.float32)
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        scores,
        np.arange(count, dtype=np.int32) % 2,
        CLASSES,
    )


def video_frame(
    index: int, pts: int, image: NDArray[np.uint8] | None = None, name: str = "v.avi"
) -> Frame:
    """A frame of a video at `pts` milliseconds; the red square where no image is given."""
    return Frame(red_image() if image is None else image, name, index, pts, MILLISECOND)


def write_all(
    sink: Sink, *results: tuple[Frame, Detections], error: Exception | None = None
) -> None:
    """Gives a sink all of these and completes it, or leaves it with an error."""
    with sink:
        for frame, objects in results:
            sink.write(frame, objects)
        if error is not None:
            raise error


def read_video(path: Path) -> list[tuple[float, NDArray[Any]]]:
    """Time in seconds and BGR image of every frame of an H.264 video."""
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return [
            (frame.time or 0.0, np.asarray(frame.to_ndarray(format="bgr24")))
            for frame in container.decode(video=0)
        ]


def fill_disk(monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> None:
    """Makes a function fail as it does on a full disk."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(target, name, full)
