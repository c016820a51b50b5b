"""GeoJSON of what was detected in georeferenced images: a feature for every object.

Frames with detections in; one file of polygons in WGS 84 out. rasterio (extra `large`) reads where
the images lie, and projects. Knows no detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tood_deploy.detections import Detections
from tood_deploy.errors import InputError
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.text_sinks import JsonArrayFile, check_all_finite, finite_detections
from tood_deploy.inference.windowed import GeoReference, read_georeference


class GeoJson(JsonArrayFile):
    """One file of features."""

    start, end = '{"type": "FeatureCollection", "features": [', "]}\n"

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
        super().__init__(path)
        self.places: dict[str, GeoReference] = {}
        for name in names:
            self.places[name] = read_georeference(name, crs)

    def write(self, frame: Frame, detections: Detections) -> None:
        """Add a frame's features."""
        if frame.page is not None:
            raise InputError(
                f"{frame.name}: has several pages, of which one is georeferenced; take the first "
                "alone (--first-page)"
            )
        finite = finite_detections(detections)
        columns = zip(
            self.places[frame.name].polygons(finite.boxes),
            finite.names(),
            finite.scores.tolist(),
            finite.boxes.tolist(),
            strict=True,
        )
        self.add(
            {
                "type": "Feature",
                "geometry": polygon,
                "properties": {"class": name, "score": score, "image": frame.name, "box": box},
            }
            for polygon, name, score, box in columns
        )
        check_all_finite(finite, detections, frame.name)
