"""The latency of images that are searched in slices: all windows of an image make one call.

A detector with `slicing` and a `Case` come in, as `worker.Bench` takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tood_deploy.benchmark.latency.worker import Bench, Case, Laps
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Frame, Prepared
from tood_deploy.inference.sliced_pipeline import frame_parts, part_inputs
from tood_deploy.inference.slicing import Slicing, merge_windows, shift


class SlicedBench(Bench):
    """Times whole images: a call cuts `batch` of them, and runs as many windows at a time."""

    def __init__(self, case: Case, detector: Detector, load_s: float) -> None:
        """Read the images, make the first call, and warm up; arguments as `Bench`."""
        assert detector.slicing is not None
        self.slicing: Slicing = detector.slicing
        super().__init__(case, detector, load_s)

    def _inputs(self, frame: Any) -> list[tuple[int, Prepared]]:
        """Return number and input of every part of an image, those of one padded size together."""
        parts = frame_parts(self.slicing, (frame.shape[0], frame.shape[1]))
        inputs = part_inputs(self.detector, Frame(frame, "image"), parts, self.slicing)
        return sorted(inputs, key=lambda item: (item[1].transform.net_hw, item[0]))

    def _batches(
        self, inputs: list[tuple[int, Prepared]]
    ) -> Iterator[tuple[list[int], list[Prepared]]]:
        """Yield numbers and inputs of the parts of every engine call."""
        start = 0
        while start < len(inputs):
            net_hw = inputs[start][1].transform.net_hw
            taken = inputs[start : start + self.case.batch]
            taken = [item for item in taken if item[1].transform.net_hw == net_hw]
            yield [number for number, _ in taken], [prepared for _, prepared in taken]
            start += len(taken)

    def _engine_call(self, laps: Laps) -> None:
        inputs = [self._inputs(self.frames[i]) for i in self._batch()]
        for of_frame in inputs:
            for _, prepared in self._batches(of_frame):
                self._run(prepared, laps)

    def _end_to_end_call(self, laps: Laps) -> int:
        count = 0
        for i in self._batch():
            frame = self.frames[i]
            laps.restart()
            parts = frame_parts(self.slicing, (frame.shape[0], frame.shape[1]))
            inputs = self._inputs(frame)
            laps.lap("pre")
            results = []
            for numbers, prepared in self._batches(inputs):
                batch = self._run(prepared, laps)
                detections = self.detector.to_detections(prepared, batch)
                pairs = zip(numbers, detections, strict=True)
                results += [shift(objects, parts[number]) for number, objects in pairs]
                laps.lap("post")
            count += len(merge_windows(results, self.slicing))
            laps.lap("post")
        return count

    def _run(self, prepared: list[Prepared], laps: Laps) -> Any:
        images = np.stack([item.image for item in prepared])
        valid_hw = np.array([item.transform.resized_hw for item in prepared], np.int32)
        laps.restart()
        return self.call(images, valid_hw, self.detector.conf, self.detector.iou, laps)
