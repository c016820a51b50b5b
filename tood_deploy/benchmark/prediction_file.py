"""Detections written as they come, a picture a line, so that an interrupted evaluation goes on where it stopped.

The file's name holds a hash of everything that the detections depend on: lines of another model, threshold, annotation file or
folder of pictures are in another file and never read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np

from tood_deploy.benchmark.results import Results, empty_results
from tood_deploy.detections import Detections
from tood_deploy.errors import InputError
from tood_deploy.inference.destinations import check_writable
from tood_deploy.inference.sink import output_errors

FORMAT = "tood-eval predictions 1"


@dataclass(frozen=True)
class Key:
    """What detections depend on.

    Attributes:
        values: names and values; any difference makes another key.
    """

    values: Mapping[str, Any]

    def header(self) -> str:
        """The first line of the file."""
        return json.dumps({"format": FORMAT, "key": self.values}, sort_keys=True, default=str)

    def file_in(self, folder: Path) -> Path:
        """Where detections of this key go."""
        return folder / f"predictions-{hashlib.sha256(self.header().encode()).hexdigest()[:16]}.jsonl"


class PredictionFile:
    """The lines of one key; a context manager while they are added to.

    Attributes:
        path: of the file.
        sizes_hw: rows and columns of every picture that has its line, by image id.
    """

    def __init__(self, path: Path, key: Key) -> None:
        """Reads what an earlier run has left; a line that was cut by its end is taken away.

        Raises:
            InputError: the file is damaged, or of another key.
            OutputError: the folder cannot be written.
        """
        check_writable(path.parent)
        self.path, self.key = path, key
        self.sizes_hw: dict[int, tuple[int, int]] = {}
        self._parts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._file: TextIO | None = None
        if path.exists():
            self._load()

    def __len__(self) -> int:
        return len(self.sizes_hw)

    def add(self, image_id: int, size_hw: tuple[int, int], found: Detections) -> None:
        """Writes a picture's line, at once.

        Raises:
            OutputError: it cannot be written.
        """
        values = {"image_id": image_id, "size_hw": size_hw, "boxes": found.boxes.tolist(), "scores": found.scores.tolist()}
        line = json.dumps(values | {"class_ids": found.class_ids.tolist()})
        with output_errors(self.path):
            assert self._file is not None, "used as a context manager"
            self._file.write(line + "\n")
            self._file.flush()
        self._keep(json.loads(line))

    def results(self, category_ids: Sequence[int | None]) -> Results:
        """All detections, ids of categories for class numbers; classes without one are left out."""
        ids = np.array([-1 if category is None else category for category in category_ids], np.int64)
        parts = [_as_results(image, ids, *self._parts[image]) for image in sorted(self._parts)]
        columns = zip(
            *((part.image_ids, part.category_ids, part.boxes_xywh, part.scores) for part in (empty_results(), *parts)), strict=True
        )
        return Results(*(np.concatenate(column) for column in columns))

    def _load(self) -> None:
        with self.path.open("rb") as file:
            lines = file.read().split(b"\n")
        if lines[-1]:  # cut in the middle of a line
            with output_errors(self.path), self.path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        if len(lines) > 1 and lines[0] != self.key.header().encode():
            raise InputError(f"{self.path}: is not what its name says; delete it and run again")
        try:
            for line in lines[1:-1]:
                self._keep(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: damaged ({error}); delete it and run again") from error

    def _keep(self, line: dict[str, Any]) -> None:
        boxes = np.array(line["boxes"], np.float32).reshape(-1, 4)
        self._parts[line["image_id"]] = boxes, np.array(line["scores"], np.float32), np.array(line["class_ids"], np.int32)
        self.sizes_hw[line["image_id"]] = (line["size_hw"][0], line["size_hw"][1])

    def __enter__(self) -> Self:
        with output_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            if not self._file.tell():
                self._file.write(self.key.header() + "\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _as_results(image_id: int, category_ids: np.ndarray, boxes: np.ndarray, scores: np.ndarray, class_ids: np.ndarray) -> Results:
    categories = category_ids[class_ids] if len(class_ids) else np.zeros(0, np.int64)
    xyxy = boxes.astype(np.float64)
    xywh = np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)
    rows = Results(np.full(len(scores), image_id, np.int64), categories, xywh, scores.astype(np.float64))
    return rows.pick(categories >= 0)
