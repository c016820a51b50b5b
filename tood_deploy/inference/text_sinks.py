"""Results as text: COCO results, GeoJSON, one JSON object a frame, one readable line a frame.

Comes in: frames with their detections. What cannot be written as text is escaped; numbers that are
not finite, which JSON does not have, are left out and reported. rasterio (extra `large`) reads
where georeferenced images lie, and projects.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from tood_deploy.detections import Detections
from tood_deploy.errors import InputError
from tood_deploy.files import atomic_path, check_writable, is_of_system
from tood_deploy.inference.frame import Frame, Part
from tood_deploy.inference.sinks import FrameOutputError, Sink, output_errors
from tood_deploy.inference.windowed import GeoReference, read_georeference
from tood_deploy.reporter import Reporter, printable, stdout_errors

STDOUT = "-"


class JsonArrayFile(Sink):
    """A file of one JSON array, written as the frames come and renamed when complete.

    Attributes:
        start, end: what stands before and behind the array's items.
    """

    start, end = "[", "]\n"

    def __init__(self, path: Path) -> None:
        """Take where to write.

        Raises:
            OutputError: the folder cannot be written.
        """
        check_writable(path.parent)
        self.path = path
        self._stack = ExitStack()
        self._file: TextIO | None = None
        self._items = 0

    def add(self, items: Iterable[Mapping[str, Any]]) -> None:
        """Add a frame's items, none of them where it has none.

        Raises:
            OutputError: the file cannot be written.
        """
        with output_errors(self.path):
            file = self._file or self._open()
            for item in items:
                file.write(("," if self._items else "") + "\n" + json_text(item))
                self._items += 1

    def _open(self) -> TextIO:
        temporary = self._stack.enter_context(atomic_path(self.path))
        self._file = self._stack.enter_context(temporary.open("w", encoding="utf-8"))
        self._file.write(self.start)
        return self._file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with output_errors(self.path):
            if self._file is not None and error is None:
                self._file.write(("\n" if self._items else "") + self.end)
            self._stack.__exit__(kind, error, trace)


class CocoResults(JsonArrayFile):
    """A COCO results file."""

    def __init__(
        self, path: Path, image_ids: Mapping[Part, int] | None, category_ids: Sequence[int] | None
    ) -> None:
        """Take where to write and the ids.

        Args:
            path: of the JSON file.
            image_ids: id of every input, or page of one; the frames' running number from 1 where
                not given.
            category_ids: of every class; class number plus one where not given.

        Raises:
            OutputError: the folder cannot be written.
        """
        super().__init__(path)
        self.image_ids, self.category_ids = image_ids, category_ids
        self._frames = 0

    def write(self, frame: Frame, detections: Detections) -> None:
        """Add a frame's rows."""
        self._frames += 1
        image_id = self._frames if self.image_ids is None else self.image_ids[frame.part]
        finite = finite_detections(detections)
        self.add(finite.to_coco(image_id, self.category_ids))
        check_all_finite(finite, detections, frame.name)


class JsonLines(Sink):
    """One JSON object a frame, written at once, so that another program can follow."""

    def __init__(self, target: str, live: bool) -> None:
        """Take a file's path, or "-" for stdout; `live`: also tell the age of each result.

        Raises:
            OutputError: the folder cannot be written.
        """
        self.target, self.live = target, live
        self._file: TextIO | None = sys.stdout if target == STDOUT else None
        if target != STDOUT:
            check_writable(Path(target).parent)

    def write(self, frame: Frame, detections: Detections) -> None:
        """Write one line."""
        finite = finite_detections(detections)
        record = frame_record(frame, finite, self.live)
        to_stdout = self.target == STDOUT
        with stdout_errors() if to_stdout else output_errors(self.target):
            file = self._file or self._open()
            file.write(json_text(record, file.encoding or "utf-8") + "\n")
            file.flush()
        check_all_finite(finite, detections, frame.name)

    def _open(self) -> TextIO:
        path = Path(self.target)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() and not is_of_system(path):
            path.unlink()  # replaced, as other outputs do; what it points to stays
        self._file = path.open("w", encoding="utf-8")
        return self._file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None and self.target != STDOUT:
            with output_errors(self.target):
                self._file.close()


def json_text(value: object, encoding: str = "utf-8") -> str:
    """Return JSON of one line; what cannot be written as it is, is escaped.

    A file's name need not be text: its bytes that are none become escapes of lone surrogates, from
    which Python makes the same name again.

    Args:
        value: to write; finite numbers.
        encoding: of the file; in another than UTF-8 only ASCII is written.
    """
    is_utf8 = encoding.lower().replace("_", "-") in ("utf-8", "utf8")
    text = json.dumps(value, ensure_ascii=not is_utf8, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def finite_detections(detections: Detections) -> Detections:
    """Return the detections whose numbers are finite: JSON has no others."""
    return detections[np.isfinite(detections.boxes).all(axis=1) & np.isfinite(detections.scores)]


def check_all_finite(finite: Detections, detections: Detections, name: str) -> None:
    """Raise FrameOutputError where some detections were left out."""
    if left_out := len(detections) - len(finite):
        raise FrameOutputError(
            f"{name}: {left_out} detections have numbers that are not finite, and are left out of "
            "the JSON; export the model again, with its self-test"
        )


def frame_record(frame: Frame, detections: Detections, live: bool) -> dict[str, Any]:
    """Return a frame as plain values: where it is from, its size, and its objects.

    Args:
        frame: the image.
        detections: in it, boxes xyxy in pixels.
        live: whether to state the age of the result, too.
    """
    rows = zip(
        detections.boxes.tolist(),
        detections.scores.tolist(),
        detections.class_ids.tolist(),
        detections.names(),
        strict=True,
    )
    record: dict[str, Any] = {
        "source": frame.name,
        "index": frame.index,
        "timestamp_s": frame.timestamp_s,
    }
    record |= {} if frame.page is None else {"page": frame.page}
    record |= {"age_ms": round(frame.age_s() * 1000, 1)} if live else {}
    record |= {"height": frame.size_hw[0], "width": frame.size_hw[1]}
    record["detections"] = [
        {"box": box, "score": score, "class_id": number, "class_name": name}
        for box, score, number, name in rows
    ]
    return record


class TextLines(Sink):
    """One readable line a frame on stdout: "street.mp4 1.240 s: 3 car, 1 person"."""

    def __init__(self, reporter: Reporter) -> None:
        """Take what prints the lines."""
        self.reporter = reporter

    def write(self, frame: Frame, detections: Detections) -> None:
        """Print one line."""
        counts = ", ".join(
            f"{count} {printable(name)}"
            for name, count in Counter(detections.names()).most_common()
        )
        moment = "" if frame.timestamp_s is None else f" {frame.timestamp_s:.3f} s"
        page = "" if frame.page is None else f" page {frame.page}"
        line = f"{printable(frame.name)}{page}{moment}: {counts or 'nothing'}"
        self.reporter.result(line)


class GeoJson(JsonArrayFile):
    """One file of GeoJSON: a polygon in WGS 84 for every object of georeferenced images."""

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
