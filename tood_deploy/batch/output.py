"""What a batch job leaves: Parquet files of one row an image, and which run they belong to.

Comes in: tables of `ROWS`, in any order. Goes out: a folder, on this machine or elsewhere, in which
every file is whole whenever the job is stopped; at the end, on request, the same as JSON lines or
as COCO results. Knows no Ray and no detector.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingImports]
import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
from pyarrow import fs  # pyright: ignore[reportMissingImports]

from tood_deploy.batch.source import Location, locate, open_filesystem, reason_of
from tood_deploy.batch.worker import ROWS
from tood_deploy.detections import Detections
from tood_deploy.errors import OutputError
from tood_deploy.files import check_writable
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.text_sinks import finite_detections, frame_record, json_text

Format = Literal["parquet", "jsonl", "coco"]
FORMATS: tuple[Format, ...] = ("parquet", "jsonl", "coco")
RUN_FILE, PART, SUFFIX, TEMPORARY = "run.json", "part-", ".parquet", ".tmp-"
BUCKET_CREATION = "allow_bucket_creation=true"  # in an address of pyarrow
RESULTS = {"jsonl": "results.jsonl", "coco": "results.json"}
ROWS_OF_FILE = 10_000
SECONDS_OF_FILE = 60.0  # what has waited longer is written, so that a stop loses little


@dataclass(frozen=True)
class RunDescription:
    """What the rows of one output have in common.

    Attributes:
        model_sha256: of the artefact.
        source: what the user named.
        options: that results depend on.
    """

    model_sha256: str
    source: tuple[str, ...]
    options: Mapping[str, str]

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Return what is different in the run that wrote `other`, in words."""
        own = json.loads(json.dumps(asdict(self)))
        differing = [
            f"{key} {other.get(key)}"
            for key in ("model_sha256", "source")
            if own[key] != other.get(key)
        ]
        before = other.get("options") or {}
        names = sorted({*own["options"], *before})
        return differing + [
            f"{name} {before.get(name, 'not given')}"
            for name in names
            if own["options"].get(name) != before.get(name)
        ]


class BatchOutput:
    """The folder of one run.

    Attributes:
        done: names of the images that have their row.
        failed: how many of the rows are errors.
    """

    def __init__(self, folder: str, run: RunDescription, *, resume: bool) -> None:
        """Look whether a run can begin in the folder, or go on; nothing is written yet.

        Args:
            folder: a path, or an address as `locate` takes it.
            run: what is to be written.
            resume: whether there may be rows of the same run; their images are not done again.

        Raises:
            OutputError: the folder belongs to another run or holds other files, cannot be written,
                or would lie in a bucket that is not there.
        """
        self.where = locate(folder)
        self.done: set[str] = set()
        self.failed = 0
        self._waiting: list[pa.Table] = []
        self._since_s = time.monotonic()
        self._files = open_filesystem(self.where.address)
        names = self._list()
        self._check_bucket()
        with self._errors():
            self._check(names, run, resume)
        self._run, self._begun = run, RUN_FILE in names
        self._left_over = [name for name in names if name.startswith(TEMPORARY)]
        self.parts = [name for name in names if name.startswith(PART)]
        self._read_done()

    def begin(self) -> None:
        """Write whose folder it is; what a run that was killed has left half-written goes.

        Raises:
            OutputError: it cannot be written.
        """
        with self._errors():
            if not self._begun:
                self._files.create_dir(self.where.path, recursive=True)
                text = json.dumps({"format": 1, **asdict(self._run)}, indent=2)
                self._write(RUN_FILE, lambda stream: stream.write(text.encode()))
            for name in self._left_over:
                self._files.delete_file(self._path(name))

    def write(self, table: pa.Table) -> None:
        """Take rows, but of images that have theirs; they are written with others.

        Raises:
            OutputError: they cannot be written.
        """
        new = [path not in self.done for path in table.column("path").to_pylist()]
        rows = table.select(ROWS.names).cast(ROWS).filter(pa.array(new, pa.bool_()))
        self.done.update(rows.column("path").to_pylist())
        self.failed += len(rows) - rows.column("error").null_count
        self._waiting.append(rows)
        count = sum(map(len, self._waiting))
        if count >= ROWS_OF_FILE or time.monotonic() - self._since_s >= SECONDS_OF_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OutputError: it cannot be written.
        """
        self._since_s = time.monotonic()
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting)
        number = max((int(name[len(PART) : -len(SUFFIX)]) for name in self.parts), default=-1) + 1
        name = f"{PART}{number:06}{SUFFIX}"
        with self._errors():
            self._write(name, lambda stream: pq.write_table(table, stream, compression="zstd"))
        self.parts.append(name)
        self._waiting.clear()

    def check_complete(self, names: Sequence[str]) -> None:
        """Make sure that the files hold one row for each image, and no other.

        Raises:
            OutputError: they do not, as where two runs have written into one folder.
        """
        counted = sum(len(self._read(name, ["path"])) for name in self.parts)
        foreign = {name for name in self._list() if name.startswith(PART)} - set(self.parts)
        missing = [name for name in names if name not in self.done]
        if foreign or missing or counted != len(self.done):
            first = f"; {missing[0]} has no row" if missing else ""
            raise OutputError(
                f"{self.where.name}: {counted} rows for {len(names)} images, and {len(foreign)} "
                f"files of another run that wrote at the same time{first}; choose another --output"
            )

    def export(
        self, form: Format, image_ids: Mapping[str, int], category_ids: Sequence[int] | None
    ) -> str:
        """Write all rows once more, in another form; the Parquet files stay.

        Args:
            form: "jsonl" or "coco".
            image_ids: of COCO results, by image.
            category_ids: of COCO results, by class; class number plus one where None.

        Returns:
            The file's name.

        Raises:
            OutputError: it cannot be written.
        """
        name = RESULTS[form]

        def write(stream: fs.NativeFile) -> None:
            if form == "jsonl":
                for row in self.rows():
                    stream.write(f"{json_text(record_of(row))}\n".encode())
                return
            before = "["
            for row in self.rows():
                for result in detections_of(row).to_coco(image_ids[row["path"]], category_ids):
                    stream.write(f"{before}\n{json_text(result)}".encode())
                    before = ","
            stream.write(b"\n]\n" if before == "," else b"[]\n")

        with self._errors():
            self._write(name, write)
        return self._location(name).name

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of all files."""
        for name in self.parts:
            yield from self._read(name).to_pylist()

    def _check(self, names: Sequence[str], run: RunDescription, resume: bool) -> None:
        if RUN_FILE not in names:
            if not self.where.address:
                check_writable(Path(self.where.path))
            if names:
                raise OutputError(
                    f"{self.where.name}: holds {len(names)} files, but no run of tood-batch "
                    f"({names[0]}); expected a new or empty folder"
                )
            return
        if not resume:
            raise OutputError(
                f"{self.where.name}: holds a run of tood-batch; add --resume to go on with it, or "
                "choose another --output"
            )
        with self._files.open_input_stream(self._path(RUN_FILE)) as stream:
            try:
                before = json.loads(stream.read())
                differences = run.differences(before)
            except (ValueError, AttributeError) as error:
                raise OutputError(f"{self.where.name}/{RUN_FILE}: damaged ({error})") from error
        if differences:
            raise OutputError(
                f"{self.where.name}: belongs to another run, which had {', '.join(differences)}; "
                "go on with the same model, source and options, or choose another --output"
            )

    def _check_bucket(self) -> None:
        """Make sure that what holds the folder in an object store is there: it is not created."""
        bucket = self.where.path.partition("/")[0]  # "" where paths begin at a root
        if not (self.where.address and bucket) or BUCKET_CREATION in self.where.address:
            return
        try:
            info = self._files.get_file_info(bucket)
        except OSError:  # some may write files and not look at buckets: the first file tells
            return
        if info.type == fs.FileType.NotFound:
            raise OutputError(
                f"{self.where.name}: there is no bucket {bucket}; create it, or choose another "
                "--output"
            )

    def _read_done(self) -> None:
        for name in self.parts:
            table = self._read(name, ["path", "error"])
            self.done.update(table.column("path").to_pylist())
            self.failed += len(table) - table.column("error").null_count

    def _read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        path = self._path(name)
        try:
            with self._files.open_input_file(path) as file:
                return pq.ParquetFile(file).read(columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise OutputError(
                f"{self._location(name).name}: cannot be read ({error}); delete it, and --resume "
                "does its images again"
            ) from error

    def _write(self, name: str, write: Callable[[fs.NativeFile], object]) -> None:
        """Write a file under a name that nobody reads, and rename it when it is whole."""
        temporary = self._path(f"{TEMPORARY}{secrets.token_hex(6)}")
        try:
            with self._files.open_output_stream(temporary) as stream:
                write(stream)
            self._files.move(temporary, self._path(name))
        except BaseException:
            if self._files.get_file_info(temporary).type == fs.FileType.File:
                self._files.delete_file(temporary)
            raise

    def _list(self) -> list[str]:
        with self._errors():
            selector = fs.FileSelector(self.where.path, allow_not_found=True)
            return sorted(info.base_name for info in self._files.get_file_info(selector))

    def _path(self, name: str) -> str:
        return f"{self.where.path.rstrip('/')}/{name}"

    def _location(self, name: str) -> Location:
        return Location(self._path(name), self.where.prefix, self.where.address)

    def _errors(self) -> _OutputErrors:
        return _OutputErrors(self.where.name)


class _OutputErrors:
    """A block whose errors of the file system become an OutputError."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None and isinstance(error, OSError | pa.ArrowException):
            raise OutputError(
                f"{self.name}: cannot be written ({reason_of(error)}); choose another --output"
            ) from error


def detections_of(row: Mapping[str, Any]) -> Detections:
    """Return the detections of a row; none of an image that could not be read.

    Numbers that are not finite are left out, as JSON has none.
    """
    if row["error"] is not None:
        return Detections.empty()
    detections = Detections(
        np.array(row["boxes"], np.float32).reshape(-1, 4),
        np.array(row["scores"], np.float32),
        np.array(row["class_ids"], np.int32),
    )
    return finite_detections(detections)


def record_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as a line of `tood-infer --jsonl`; source and error of what was not read."""
    if row["error"] is not None:
        return {"source": row["path"], "error": row["error"]}
    no_pixels = np.zeros((0, 0, 3), np.uint8)
    frame = Frame(no_pixels, row["path"], original_hw=(row["height"], row["width"]))
    record = frame_record(frame, detections_of(row), False)
    names = dict(zip(row["class_ids"], row["class_names"], strict=True))
    for one in record["detections"]:
        one["class_name"] = names[one["class_id"]]
    return record
