"""One worker of a batch job: its own engine, fed with chunks of images, giving a row for each.

Comes in: what a Ray dataset of `Chunk`s holds. Goes out: a table of `ROWS`. An image that cannot be
read is a row with its error. Knows no Ray: Ray Data makes workers, calls them, and calls them again
where one was killed.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import pyarrow as pa  # pyright: ignore[reportMissingImports]

from tood_deploy.batch.source import Chunk, read_chunk
from tood_deploy.data.image_file import ReadOptions, decode_file
from tood_deploy.data.image_header import check_header
from tood_deploy.detections import Detections
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.inference.frame import Frame, Source
from tood_deploy.inference.pipeline import detect_frames
from tood_deploy.manifest import artefact_files, manifest_path

ROWS = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),  # xyxy in pixels of the image
        ("scores", pa.list_(pa.float32())),
        ("class_ids", pa.list_(pa.int32())),
        ("class_names", pa.list_(pa.string())),
        ("notes", pa.list_(pa.string())),  # how the image was read, where that should be known
        ("error", pa.string()),  # null where there is none; then all above but path are null
    ]
)
# What a worker adds: who it is and what an image took; "" for path: it cannot work at all.
ANSWER = ROWS.append(pa.field("worker", pa.string())).append(pa.field("seconds", pa.float64()))


@dataclass(frozen=True)
class WorkerOptions:
    """How every worker opens its model and reads images.

    Attributes:
        model: file name of the artefact.
        detector: what `Detector` takes.
        reading: how image files are read.
        batch: the most images of one engine call.
    """

    model: str
    detector: Mapping[str, Any]
    reading: ReadOptions = field(default_factory=ReadOptions)
    batch: int = 1


def model_bytes(artefact: Path) -> dict[str, bytes]:
    """Return the files of an artefact, for workers on machines that do not have it."""
    return {
        path.name: path.read_bytes()
        for path in (*artefact_files(artefact), manifest_path(artefact))
    }


class ChunkSource(Source):
    """The images of one chunk; those that cannot be read are kept with the reason.

    Attributes:
        errors: by the image's name.
        image_notes: how images were read, by name.
    """

    kind = "images"

    def __init__(self, chunk: Chunk, reading: ReadOptions) -> None:
        super().__init__(chunk.names, len(chunk.names))
        self.chunk, self.reading = chunk, reading
        self.errors: dict[str, str] = {}
        self.image_notes: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[Frame]:
        """Yield the images that can be read."""
        for name, data in read_chunk(self.chunk):
            try:
                if isinstance(data, InputError):
                    raise data
                yield self._decode(name, data)
            except InputError as error:
                self.errors[name] = str(error)

    def _decode(self, name: str, data: bytes) -> Frame:
        header = check_header(data, name, self.reading.max_pixels)
        if len(header.positions) > 1 and not self.reading.first_page:
            raise InputError(
                f"{name}: holds {len(header.positions)} pages or frames, and there is one row an "
                "image; take the first with --first-page, or all with tood-infer"
            )
        decoded = decode_file(data, name, self.reading, self.fit)
        self.image_notes[name] = list(decoded.notes)
        return Frame(decoded.image_bgr, name, original_hw=decoded.original_hw)


class WorkerLink(Protocol):
    """What a worker asks of the job."""

    def model_files(self) -> dict[str, bytes]:
        """Return the bytes of the artefact's files, by their names."""
        ...

    def is_hopeless(self, chunk: Chunk) -> bool:
        """Say that a chunk is begun; return whether too many workers were lost at it."""
        ...


class Worker:
    """Runs one engine."""

    def __init__(self, link: WorkerLink, options: WorkerOptions) -> None:
        """Open the model; an error is kept for the first chunk's answer.

        Args:
            link: to the job.
            options: how to open the model and read images.
        """
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        self.link, self.options = link, options
        self.name = f"{platform.node()}:{os.getpid()}"
        self._refusal = ""
        folder = Path(tempfile.mkdtemp(prefix="tood-batch-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for name, data in link.model_files().items():
            (folder / name).write_bytes(data)
        try:
            self.detector = Detector(folder / options.model, **options.detector)
        except ToodError as error:
            self._refusal = str(error).replace(f"{folder}/", "")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return a row for each image of the chunks; none of those that are to be done alone."""
        rows = [row for values in table.to_pylist() for row in self._rows(Chunk.from_row(values))]
        return pa.Table.from_pylist(rows, schema=ANSWER)

    def _rows(self, chunk: Chunk) -> list[dict[str, Any]]:
        if self._refusal:
            return [{"path": "", "error": self._refusal, "worker": self.name}]
        started = time.perf_counter()
        if not self.link.is_hopeless(chunk):
            rows = self._detect(chunk)
        elif len(chunk.names) == 1:
            error = f"{chunk.names[0]}: workers were lost at this image, time and again"
            rows = [{"path": chunk.names[0], "error": error}]
        else:
            return []
        seconds = (time.perf_counter() - started) / len(rows)
        return [row | {"worker": self.name, "seconds": seconds} for row in rows]

    def _detect(self, chunk: Chunk) -> list[dict[str, Any]]:
        """Run a chunk as `tood-infer` runs images; image by image where one stops the engine."""
        source = ChunkSource(chunk, self.options.reading)
        rows: dict[str, dict[str, Any]] = {}
        try:
            for frame, detections in detect_frames(self.detector, source, self.options.batch):
                notes = source.image_notes[frame.name]
                rows[frame.name] = detection_row(frame, detections, notes)
        except Exception as error:  # runtimes raise types of their own, such as for want of memory
            if len(chunk.names) == 1:
                return [{"path": chunk.names[0], "error": _one_line(error)}]
            left = [i for i, name in enumerate(chunk.names) if name not in rows]
            alone = [row for i in left for row in self._detect(chunk.part([i]))]
            return [*rows.values(), *alone]
        failed = [{"path": name, "error": text} for name, text in source.errors.items()]
        return [*rows.values(), *failed]


def detection_row(
    frame: Frame, detections: Detections, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the row of an image that was read.

    Args:
        frame: the image.
        detections: in it.
        notes: how it was read.
    """
    return {
        "path": frame.name,
        "height": frame.size_hw[0],
        "width": frame.size_hw[1],
        "boxes": detections.boxes.tolist(),
        "scores": detections.scores.tolist(),
        "class_ids": detections.class_ids.tolist(),
        "class_names": detections.names(),
        "notes": list(notes),
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
