"""Detections as text: COCO results, one JSON object a frame, one readable line a frame."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tood_deploy.detections import Detections
from tood_deploy.inference.destinations import check_writable
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.sink import Sink, output_errors
from tood_deploy.manifest import atomic_path

STDOUT = "-"


class CocoResults(Sink):
    """A COCO results file, written as the frames come and renamed when complete."""

    def __init__(self, path: Path, image_ids: Mapping[str, int] | None, category_ids: Sequence[int] | None) -> None:
        """Takes where to write and the ids.

        Args:
            path: of the JSON file.
            image_ids: id of every input by name; the frames' running number from 1 where not given.
            category_ids: of every class; class number plus one where not given.

        Raises:
            OutputError: the folder cannot be written.
        """
        check_writable(path.parent)
        self.path, self.image_ids, self.category_ids = path, image_ids, category_ids
        self._stack = ExitStack()
        self._file: TextIO | None = None
        self._frames = self._rows = 0

    def write(self, frame: Frame, found: Detections) -> None:
        """Adds a frame's rows."""
        with output_errors(self.path):
            file = self._file or self._open()
            self._frames += 1
            image_id = self._frames if self.image_ids is None else self.image_ids[frame.name]
            for row in found.to_coco(image_id, self.category_ids):
                file.write(("[\n" if not self._rows else ",\n") + json.dumps(row))
                self._rows += 1

    def _open(self) -> TextIO:
        temporary = self._stack.enter_context(atomic_path(self.path))
        self._file = self._stack.enter_context(temporary.open("w", encoding="utf-8"))
        return self._file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with output_errors(self.path):
            if self._file is not None and error is None:
                self._file.write("\n]\n" if self._rows else "[]\n")
            self._stack.__exit__(kind, error, trace)


class JsonLines(Sink):
    """One JSON object a frame, written the moment it is there, so that another program can follow."""

    def __init__(self, target: str, live: bool) -> None:
        """Takes a file's path, or "-" for stdout; `live`: also tell the age of each result.

        Raises:
            OutputError: the folder cannot be written.
        """
        self.target, self.live = target, live
        self._file: TextIO | None = sys.stdout if target == STDOUT else None
        if target != STDOUT:
            check_writable(Path(target).parent)

    def write(self, frame: Frame, found: Detections) -> None:
        """Writes one line."""
        with output_errors("stdout" if self.target == STDOUT else self.target):
            if self._file is None:
                path = Path(self.target)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("w", encoding="utf-8")
            self._file.write(json.dumps(frame_record(frame, found, self.live), ensure_ascii=False) + "\n")
            self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None and self.target != STDOUT:
            with output_errors(self.target):
                self._file.close()


def frame_record(frame: Frame, found: Detections, live: bool) -> dict[str, Any]:
    """A frame as plain values: where it is from, its size, and its objects with boxes xyxy in pixels."""
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.class_ids.tolist(), found.names(), strict=True)
    record: dict[str, Any] = {"source": frame.name, "index": frame.index, "timestamp_s": frame.timestamp_s}
    record |= {"age_ms": round(frame.age_s() * 1000, 1)} if live else {}
    record |= {"height": frame.size_hw[0], "width": frame.size_hw[1]}
    record["detections"] = [{"box": box, "score": score, "class_id": number, "class_name": name} for box, score, number, name in rows]
    return record


class TextLines(Sink):
    """One readable line a frame on stdout: "street.mp4 1.240 s: 3 car, 1 person"."""

    def write(self, frame: Frame, found: Detections) -> None:
        """Prints one line."""
        counts = ", ".join(f"{count} {name}" for name, count in Counter(found.names()).most_common())
        moment = "" if frame.timestamp_s is None else f" {frame.timestamp_s:.3f} s"
        with output_errors("stdout"):
            print(f"{frame.name}{moment}: {counts or 'nothing'}", flush=True)
