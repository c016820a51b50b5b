"""Which images a batch job reads, wherever they lie, dealt out in chunks that workers take.

Comes in: folders, globs, lists, addresses of other file systems (S3 and those that pyarrow knows),
Parquet tables of paths or of encoded images. Goes out: `Chunk`s of names; no image is read here.
Knows no detector and no Ray.
"""

from __future__ import annotations

import functools
import glob
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa  # pyright: ignore[reportMissingImports]
import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
from pyarrow import fs  # pyright: ignore[reportMissingImports]

from tood_deploy.data.image_header import IMAGE_SUFFIXES
from tood_deploy.errors import InputError
from tood_deploy.files import absolute_path
from tood_deploy.inference.address import redacted, scheme_of, without_secrets

TABLE_SUFFIX, LIST_SUFFIX = ".parquet", ".txt"
PATHS, BYTES = "path", "bytes"  # usual columns of a table, as Ray's own readers name them
GOOGLE_SCHEMES, RETRY_LIMIT = ("gs", "gcs"), "retry_limit_seconds"
RETRY_S = 20  # of Google's client, which by itself asks a quarter of an hour; S3's ends by itself
READERS = 8  # that wait for images at a time; most of the time of reading from afar is waiting


@dataclass(frozen=True)
class Location:
    """A place on a file system.

    Attributes:
        path: as the file system has it.
        prefix: what goes before `path` in names, such as "s3://"; "" for this machine's own.
        address: an address on the file system, from which it is opened; "" for this machine's own.
    """

    path: str
    prefix: str = ""
    address: str = ""

    @property
    def name(self) -> str:
        """The path with what goes before it."""
        return self.prefix + self.path


@dataclass(frozen=True)
class Chunk:
    """Images that one worker takes at a time.

    Attributes:
        names: of the images; their paths, where they are files.
        prefix, address: of the file system, as in `Location`.
        table: the Parquet file that holds the encoded images; "" where they are files.
        column: of the table.
        row_group: of the table.
        rows: of the row group, one for each name.
    """

    names: tuple[str, ...]
    prefix: str = ""
    address: str = ""
    table: str = ""
    column: str = ""
    row_group: int = 0
    rows: tuple[int, ...] = ()

    def to_row(self) -> dict[str, Any]:
        """Return plain values, a row of a Ray dataset."""
        return asdict(self) | {"names": list(self.names), "rows": list(self.rows)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        """Return what `to_row` wrote."""
        plain: dict[str, Any] = {**row, "names": tuple(row["names"]), "rows": tuple(row["rows"])}
        return cls(**plain)

    def part(self, positions: Sequence[int]) -> Chunk:
        """Return the images at these positions."""
        names = tuple(self.names[i] for i in positions)
        return replace(self, names=names, rows=tuple(self.rows[i] for i in positions if self.rows))


def locate(spec: str) -> Location:
    """Return where something lies: a path of this machine, or an address such as s3://bucket/key.

    Raises:
        InputError: pyarrow has no such file system.
    """
    if "://" not in spec:
        return Location(str(absolute_path(spec)))
    address = _with_retry_limit(spec)
    try:
        _, path = fs.FileSystem.from_uri(address)
    except (pa.ArrowException, ValueError, OSError) as error:
        reason = without_secrets(_first_line(error), spec)
        raise InputError(
            f"{redacted(spec)}: no file system that can be read ({reason}); expected a path, or an "
            "address such as s3://bucket/folder, gs:// or hdfs://"
        ) from error
    scheme, _, rest = spec.partition("?")[0].partition("://")
    before = rest[: rest.rindex(path)] if path and path in rest else ""
    host = before.rpartition("@")[2]  # names are written down, and a login is nobody's business
    return Location(path, f"{scheme}://{host}", address)


def _with_retry_limit(spec: str) -> str:
    """Return an address whose store is not asked for ever where it does not answer."""
    if scheme_of(spec) not in GOOGLE_SCHEMES or f"{RETRY_LIMIT}=" in spec:
        return spec
    return f"{spec}{'&' if '?' in spec else '?'}{RETRY_LIMIT}={RETRY_S}"


@functools.lru_cache(maxsize=16)
def open_filesystem(address: str) -> fs.FileSystem:
    """Return the file system that a `Location` or `Chunk` lies on."""
    return fs.FileSystem.from_uri(address)[0] if address else fs.LocalFileSystem()


def list_images(specs: Sequence[str], column: str | None = None) -> list[Chunk]:
    """List all images that a user named, each once.

    Args:
        specs: images, folders, globs, text files with one path a line, Parquet tables or folders of
            them.
        column: of tables, that holds paths or encoded images; "bytes" or "path" where not given.

    Returns:
        Chunks of any size, for `deal_out`.

    Raises:
        InputError: nothing there, or nothing that can be read.
    """
    chunks: list[Chunk] = []
    any_table = False
    for spec in specs:
        located = _files_without_secrets(spec)
        tables = [file for file in located if file.path.endswith(TABLE_SUFFIX)]
        images = [file for file in located if not file.path.endswith(TABLE_SUFFIX)]
        any_table |= bool(tables)
        chunks += [chunk for table in tables for chunk in _chunks_of_table(table, column)]
        chunks += _chunks_of_files(images)
    if column is not None and not any_table:
        raise InputError(f"--column {column} names a column, and no Parquet table is given")
    return _each_once(chunks)


def deal_out(chunks: Iterable[Chunk], size: int, done: Collection[str] = ()) -> list[Chunk]:
    """Return chunks of at most `size` images that are not done yet."""
    parts = []
    for chunk in chunks:
        left = [i for i, name in enumerate(chunk.names) if name not in done]
        parts += [chunk.part(left[i : i + size]) for i in range(0, len(left), size)]
    return parts


def read_chunk(chunk: Chunk) -> Iterator[tuple[str, bytes | InputError]]:
    """Yield every image's name and file, or why it cannot be read; some are read ahead."""
    if chunk.table:
        yield from zip(chunk.names, _read_rows(chunk), strict=True)
        return
    with ThreadPoolExecutor(READERS, "read") as pool:
        names = iter(chunk.names)
        waiting = [pool.submit(_read, chunk, name) for name in itertools.islice(names, READERS)]
        for name in chunk.names:
            data = waiting.pop(0).result()
            waiting += [pool.submit(_read, chunk, later) for later in itertools.islice(names, 1)]
            yield name, data


def _read(chunk: Chunk, name: str) -> bytes | InputError:
    path = name.removeprefix(chunk.prefix)
    try:
        if not chunk.address:
            return Path(path).read_bytes()
        with open_filesystem(chunk.address).open_input_stream(path) as stream:
            return stream.read()
    except (OSError, pa.ArrowException) as error:
        return InputError(f"{name}: cannot be read ({reason_of(error)}); expected an image")


def _read_rows(chunk: Chunk) -> Iterator[bytes | InputError]:
    try:
        group = _row_group(chunk.address, chunk.table, chunk.row_group, chunk.column)
    except (OSError, pa.ArrowException) as error:
        problem = InputError(f"{chunk.prefix}{chunk.table}: cannot be read ({reason_of(error)})")
        yield from itertools.repeat(problem, len(chunk.rows))
        return
    for name, row in zip(chunk.names, chunk.rows, strict=True):
        data = group[row].as_py()
        yield InputError(f"{name}: no data in its row of the table") if data is None else data


@functools.lru_cache(maxsize=1)
def _row_group(address: str, table: str, row_group: int, column: str) -> pa.ChunkedArray:
    """Return a column of a row group, kept for the next chunk, which is likely of the same."""
    with open_filesystem(address).open_input_file(table) as file:
        return pq.ParquetFile(file).read_row_group(row_group, columns=[column]).column(0)


def _files_of_list(spec: str) -> list[Location]:
    """Return the files that a text names; one that is not there is its row's error later."""
    where = locate(spec)
    data = _read(Chunk((where.name,), where.prefix, where.address), where.name)
    if isinstance(data, InputError):
        raise InputError(f"{spec}: cannot be read as a list of images: {data}")
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{spec}: no list ({error}); expected text, one path a line") from error
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise InputError(f"{spec}: names no file; expected text, one path a line")
    return [_beside(where, line) for line in named]


def _split_query(spec: str) -> tuple[str, str]:
    """Return an address without and with nothing but its query, in which ? is no wildcard."""
    query = re.search(r"\?\w+=.*$", spec) if "://" in spec else None
    return (spec[: query.start()], query.group()) if query else (spec, "")


def _files_without_secrets(spec: str) -> list[Location]:
    """Return the files that one argument stands for; no message shows a password in it."""
    is_list = _split_query(spec)[0].lower().endswith(LIST_SUFFIX)
    try:
        return _files_of_list(spec) if is_list else _files(spec)
    except InputError as error:
        raise InputError(without_secrets(str(error), spec)) from error


def _files(spec: str) -> list[Location]:
    """Return the files that one argument stands for, in order of their names."""
    if glob.has_magic(_split_query(spec)[0]):
        return _files_of_glob(spec)
    where = locate(spec)
    try:
        info = open_filesystem(where.address).get_file_info(where.path)
        if info.type == fs.FileType.File:
            return [where]
        if info.type == fs.FileType.Directory:
            return _files_of_folder(spec, where)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{spec}: cannot be read ({reason_of(error)})") from error
    raise InputError(
        f"{spec}: no such file or folder; expected images, a folder, a glob, a list or a Parquet "
        "table"
    )


def _files_of_folder(spec: str, where: Location) -> list[Location]:
    listed = _walk(where, recursive=False)
    kept = [file for file in listed if _is_readable(file.path)]
    if not kept:
        bare, query = _split_query(spec)
        raise InputError(
            f"{spec}: holds {len(listed)} files, but no image and no Parquet table; subfolders are "
            f"searched only by a glob, such as '{bare.rstrip('/')}/**/*.jpg{query}'"
        )
    return kept


def _files_of_glob(spec: str) -> list[Location]:
    """Match as a shell does: ** stands for any folders, * and ? for no slash."""
    bare, query = _split_query(spec)
    start = re.split(r"[*?\[]", bare, maxsplit=1)[0].rpartition("/")[0]
    base = locate(f"{start}{query}" if start else ("/" if spec.startswith("/") else "."))
    rest = bare[len(start) :].lstrip("/") if start else bare.lstrip("/")
    pattern = re.compile(_regex(f"{glob.escape(base.path.rstrip('/'))}/{rest}"))
    files = [file for file in _walk(base, recursive=True) if pattern.fullmatch(file.path)]
    if not files:
        raise InputError(f"{spec}: no file has such a name; expected a glob that matches images")
    return files


def _regex(pattern: str) -> str:
    """Return the regular expression of a glob."""
    tokens = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    return "".join(
        tokens.get(part) or (_bracket(part) if part[:1] == "[" else re.escape(part))
        for part in parts
    )


def _bracket(part: str) -> str:
    inside = part[1:-1].replace("\\", "\\\\")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"


def _walk(where: Location, *, recursive: bool) -> list[Location]:
    """Return the files below a folder that are not hidden, in order of their names."""
    selector = fs.FileSelector(where.path, recursive=recursive)
    try:
        infos = open_filesystem(where.address).get_file_info(selector)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{where.name}: cannot be listed ({reason_of(error)})") from error
    paths = [info.path for info in infos if info.type == fs.FileType.File]
    shown = sorted(path for path in paths if not path.rpartition("/")[2].startswith("."))
    return [replace(where, path=path) for path in shown]


def _is_readable(path: str) -> bool:
    return Path(path).suffix.lower() in IMAGE_SUFFIXES | {TABLE_SUFFIX}


def _chunks_of_files(files: Sequence[Location]) -> list[Chunk]:
    groups = itertools.groupby(files, lambda file: (file.prefix, file.address))
    return [
        Chunk(tuple(file.name for file in group), prefix, address)
        for (prefix, address), group in groups
    ]


def _chunks_of_table(table: Location, column: str | None) -> list[Chunk]:
    """Return the images of a Parquet file: the files it names, or one chunk for each row group."""
    try:
        with open_filesystem(table.address).open_input_file(table.path) as opened:
            file = pq.ParquetFile(opened)
            chosen = _choose_column(table, file.schema_arrow, column)
            kind = file.schema_arrow.field(chosen).type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                paths = file.read(columns=[chosen]).column(0).drop_null().to_pylist()
                return _chunks_of_files([_beside(table, path) for path in paths])
            named = PATHS in file.schema_arrow.names
            return [
                _chunk_of_row_group(table, chosen, number, file, named)
                for number in range(file.num_row_groups)
            ]
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{table.name}: cannot be read as a Parquet table ({reason_of(error)})"
        ) from error


def _beside(table: Location, path: str) -> Location:
    """Return where a path of a table or list leads: relative ones start from its folder."""
    if "://" in path:
        return _located_once(path)
    if table.address:
        folder = table.path.rpartition("/")[0]
        return replace(table, path=path if path.startswith("/") else f"{folder}/{path}")
    return Location(str(absolute_path(Path(table.path).parent / path)))


def _located_once(path: str) -> Location:
    """Locate a file by its folder's file system, which is opened once for all of a folder."""
    bare, query = _split_query(path)
    folder, _, name = bare.rpartition("/")
    where = _locate_cached(f"{folder}{query}")
    return replace(where, path=f"{where.path.rstrip('/')}/{name}")


_locate_cached = functools.lru_cache(maxsize=1024)(locate)


def _choose_column(table: Location, schema: pa.Schema, column: str | None) -> str:
    wished = [BYTES, PATHS] if column is None else [column]
    for name in wished:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                return name
            if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                return name
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise InputError(
        f"{table.name}: no column {' or '.join(wished)} of paths (string) or of encoded images "
        f"(binary); it has {columns}: name one with --column"
    )


def _chunk_of_row_group(
    table: Location, column: str, number: int, file: pq.ParquetFile, named: bool
) -> Chunk:
    """Return the images of a row group: named by the column of paths, else by their row.

    Args:
        table: where the file is.
        column: that holds the images.
        number: of the row group.
        file: opened.
        named: whether there is a column of paths.
    """
    count = file.metadata.row_group(number).num_rows
    before = sum(file.metadata.row_group(i).num_rows for i in range(number))
    names: list[str | None] = [None] * count
    if named:
        names = file.read_row_group(number, columns=[PATHS]).column(0).to_pylist()
    complete = tuple(
        f"{table.name}#{before + i}" if name is None else str(name) for i, name in enumerate(names)
    )
    return Chunk(
        complete, table.prefix, table.address, table.path, column, number, tuple(range(count))
    )


def _each_once(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Leave out what was named before.

    Raises:
        InputError: two encoded images have one name: results could not be told apart.
    """
    seen: set[str] = set()
    kept = []
    for chunk in chunks:
        first = []
        for i, name in enumerate(chunk.names):
            if name not in seen:
                first.append(i)
            elif chunk.table:
                raise InputError(
                    f"{name}: names two images in the tables' column {PATHS}; expected different "
                    "names"
                )
            seen.add(name)
        kept += [chunk.part(first)] if first else []
    return kept


def reason_of(error: BaseException) -> str:
    """Return the system's own words where there are some, else the first line."""
    return getattr(error, "strerror", None) or _first_line(error)


def _first_line(error: BaseException) -> str:
    """Return the first line, without what Google's client adds to say it all once more."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(" error_info=")[0]
