"""GeoJSON of what was detected in georeferenced images: a feature for every object.

Frames with detections in; one file of polygons in WGS 84 out. rasterio (extra `large`) reads where
the images lie, and projects. Knows no detector.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tood_deploy.detections import Detections
from tood_deploy.errors import InputError
from tood_deploy.files import atomic_path
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.output_paths import check_writable
from tood_deploy.inference.sinks import Sink, output_errors
from tood_deploy.inference.windowed import GeoReference, read_georeference

START, END = '{"type": "FeatureCollection", "features": [', "\n]}\n"


class GeoJson(Sink):
    """One file of features, written as the frames come and renamed when complete."""

    def __init__(self, path: Path, names: Sequence[str], crs: str | None = None) -> None:
        """Look where every image lies, before anything is detected.

        Args:
            path: of the file.
            names: of all images.
            crs: coordinate system of images whose files name none.

        Raises:
            InputError: an image is not georeferenced.
            OutputError: the folder cannot be written.
        """
        check_writable(path.parent)
        self.path = path
        self.places: dict[str, GeoReference] = {}
        for name in names:
            self.places[name] = read_georeference(name, crs)
        self._stack = ExitStack()
        self._file: TextIO | None = None
        self._features = 0

    def write(self, frame: Frame, detections: Detections) -> None:
        """Add a frame's features."""
        if frame.page is not None:
            raise InputError(
                f"{frame.name}: has several pages, of which one is georeferenced; take the first "
                "alone (--first-page)"
            )
        polygons = self.places[frame.name].polygons(detections.boxes)
        with output_errors(self.path):
            file = self._file or self._open()
            columns = zip(
                polygons,
                detections.names(),
                detections.scores.tolist(),
                detections.boxes.tolist(),
                strict=True,
            )
            for polygon, name, score, box in columns:
                properties = {"class": name, "score": score, "image": frame.name, "box": box}
                feature = {"type": "Feature", "geometry": polygon, "properties": properties}
                file.write(("," if self._features else "") + "\n" + json.dumps(feature))
                self._features += 1

    def _open(self) -> TextIO:
        temporary = self._stack.enter_context(atomic_path(self.path))
        self._file = self._stack.enter_context(temporary.open("w", encoding="utf-8"))
        self._file.write(START)
        return self._file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with output_errors(self.path):
            if self._file is not None and error is None:
                self._file.write(END)
            self._stack.__exit__(kind, error, trace)
