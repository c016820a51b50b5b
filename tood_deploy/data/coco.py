"""COCO JSON: the one reader of annotation files, and their writer.

A file in, checked arrays out. It may be compressed (gzip) and begin with a byte-order mark; ids may
be texts of digits; `area`, `iscrowd`, `width` and `height` may be absent or null. Entries that
cannot be used are left out and counted; a file that is not COCO at all is an error. Knows no
pixels: whether the images are there and what size they have is asked elsewhere.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import InputError
from tood_deploy.files import write_text

PARTS = ("images", "annotations", "categories")
GZIP_START = b"\x1f\x8b"
MIN_UNPACKED_BYTES, MAX_UNPACKED_SHARE = 1 << 28, 100  # JSON of boxes packs to a tenth
MAX_ID = 2**63  # arrays of ids are int64
EXAMPLES = 3  # named for each kind of problem


@dataclass
class Problems:
    """What cannot be used of a data set, by kind, with a few examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: object) -> None:
        """Count one more of a kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= EXAMPLES:
            self.examples.setdefault(kind, []).append(str(example))

    def copy(self) -> Problems:
        """Return the same, to count on."""
        return Problems(
            Counter(self.counts), {kind: list(names) for kind, names in self.examples.items()}
        )

    def lines(self) -> list[str]:
        """Return a line for each kind: how many, and which for example."""
        return [
            f"{count} x {kind} ({', '.join(self.examples[kind])}{', ...' * (count > EXAMPLES)})"
            for kind, count in self.counts.items()
        ]


@dataclass(frozen=True, eq=False)
class Boxes:
    """N boxes; those of one image stand together, in the order they came in.

    Attributes:
        image_ids: (N,) int64, ascending.
        category_ids: (N,) int64.
        boxes_xywh: (N, 4) float64, left, top, width, height in pixels of the image.
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.image_ids)

    def pick(self, chosen: NDArray[Any] | slice) -> Self:
        """Return those at these positions, or where a mask is true."""
        return type(self)(
            **{column.name: getattr(self, column.name)[chosen] for column in fields(self)}
        )

    def by_image(self) -> Self:
        """Return the same in ascending order of the image ids."""
        return self.pick(np.argsort(self.image_ids, kind="stable"))

    def span(self, first_id: int, last_id: int) -> slice:
        """Return where the boxes of images `first_id` to `last_id`, both included, stand."""
        start, stop = np.searchsorted(self.image_ids, [first_id, last_id + 1])
        return slice(int(start), int(stop))


@dataclass(frozen=True, eq=False)
class AnnotatedBoxes(Boxes):
    """Annotated boxes.

    Attributes:
        areas: (N,) float64 pixels of the object (of its mask, where the file says so): decides what
            is small, medium, large.
        crowd: (N,) bool, a group in one box: neither right nor missed.
        ids: (N,) texts, as in the file.
    """

    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    ids: NDArray[np.str_]


@dataclass(frozen=True)
class AnnotatedImage:
    """An image of the annotations: file name, and (rows, columns) where the file gives them."""

    file_name: str
    size_hw: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Annotations:
    """Everything that was annotated.

    Attributes:
        path: the annotation file.
        images: by id, ascending.
        categories: name by id, ascending.
        boxes: of all images.
        file_order: ids of the images as they stand in the file.
        class_names: names of the categories as they stand in the file.
        problems: what was left out, and why.
    """

    path: Path
    images: Mapping[int, AnnotatedImage]
    categories: Mapping[int, str]
    boxes: AnnotatedBoxes
    file_order: tuple[int, ...]
    class_names: tuple[str, ...]
    problems: Problems

    def only(self, category_ids: Collection[int]) -> Annotations:
        """Return the same images with these categories alone."""
        kept = {key: name for key, name in self.categories.items() if key in category_ids}
        boxes = self.boxes.pick(np.isin(self.boxes.category_ids, list(kept)))
        names = tuple(name for name in self.class_names if name in kept.values())
        return replace(self, categories=kept, boxes=boxes, class_names=names)

    def first(self, limit: int | None) -> Annotations:
        """Return the first images, in order of their ids, with what is annotated on them."""
        images = dict(list(self.images.items())[:limit])
        boxes = self.boxes.pick(np.isin(self.boxes.image_ids, list(images)))
        order = tuple(key for key in self.file_order if key in images)
        return replace(self, images=images, boxes=boxes, file_order=order)


def read_annotations(path: Path) -> Annotations:
    """Read COCO annotations.

    A box without `area` has width times height, one without `iscrowd` is no crowd.

    Raises:
        InputError: not such a file, nothing annotated, or nothing that can be used.
    """
    content = _read_lists(path, PARTS)
    if empty := [part for part in PARTS if not content[part]]:
        raise InputError(
            f"{path}: the list {empty[0]} is empty, there is nothing to learn or to compare with; "
            "expected at least one of each"
        )
    problems = Problems()
    images = _read_images(path, content["images"], problems)
    categories = _read_categories(path, content["categories"])
    boxes = _read_boxes(path, content["annotations"], images, categories, problems)
    if not len(boxes):
        raise InputError(
            f"{path}: none of its {len(content['annotations'])} annotations can be used: "
            f"{'; '.join(problems.lines())}; correct the file"
        )
    return Annotations(
        path,
        dict(sorted(images.items())),
        dict(sorted(categories.items())),
        boxes.by_image(),
        tuple(images),
        tuple(categories.values()),
        problems,
    )


def load_json(path: Path, expected: str) -> object:
    """Return what a JSON file holds.

    A file compressed by gzip is known by its first bytes, whatever its name.

    Args:
        path: of the file.
        expected: what it should be, for errors.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        data = path.read_bytes()
        return json.loads(_unpacked(data, path) if data.startswith(GZIP_START) else data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected {expected}") from error
    except (OSError, EOFError, zlib.error) as error:  # gzip's errors are of all three kinds
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); expected {expected}") from error


def _unpacked(data: bytes, path: Path) -> bytes:
    """Return what gzip compressed.

    Raises:
        InputError: it is more than JSON can be: 10 MB of zeros unpack to 10 GB.
    """
    limit = max(MIN_UNPACKED_BYTES, MAX_UNPACKED_SHARE * len(data))
    unpacked = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
    if len(unpacked) > limit:
        raise InputError(
            f"{path}: unpacks to more than {limit:,} bytes, {MAX_UNPACKED_SHARE} times its own "
            "size, which no JSON does; if you trust it, unpack it with gunzip"
        )
    return unpacked


def whole_number(value: object) -> int:
    """Return an id as a number: some tools write 7 as "7" or 7.0.

    Raises:
        ValueError: it is no whole number.
    """
    if isinstance(value, int | str) or (isinstance(value, float) and value.is_integer()):
        number = int(value)
        if not isinstance(value, bool) and abs(number) < MAX_ID:
            return number
    raise ValueError(f"{value!r} is no whole number")


def write_annotations(
    path: Path,
    images: Mapping[int, AnnotatedImage],
    boxes: Iterable[tuple[int, int, Sequence[float]]],
    class_names: Sequence[str],
) -> None:
    """Write COCO annotations, whole or not at all; ids of boxes and categories count from 1.

    Args:
        path: of the JSON file.
        images: by id.
        boxes: image id, class number and (x, y, width, height) in pixels of each.
        class_names: in order of the class numbers.

    Raises:
        OutputError: it cannot be written.
    """
    image_rows: list[dict[str, object]] = []
    for key, image in images.items():
        height, width = image.size_hw or (None, None)
        image_rows.append(
            {"id": key, "file_name": image.file_name, "height": height, "width": width}
        )
    rows = [
        {
            "id": number,
            "image_id": image,
            "category_id": label + 1,
            "iscrowd": 0,
            "bbox": list(box),
            "area": box[2] * box[3],
        }
        for number, (image, label, box) in enumerate(boxes, 1)
    ]
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names, 1)]
    content = {"images": image_rows, "annotations": rows, "categories": categories}
    write_text(path, json.dumps(content))


def _read_lists(path: Path, parts: Sequence[str]) -> dict[str, list[Any]]:
    """Read the file and see that it has the lists that make it one of COCO."""
    content = load_json(path, "COCO annotations")
    if isinstance(content, dict):
        if all(isinstance(content.get(part), list) for part in parts):
            return content
        given = f"an object with {', '.join(list(content)[:6]) or 'nothing'}"
    else:
        given = f"a {type(content).__name__}"
    raise InputError(
        f"{path}: not COCO annotations: found {given}; "
        f"expected an object with the lists {', '.join(parts)}"
    )


def _read_images(
    path: Path, entries: Sequence[Any], problems: Problems
) -> dict[int, AnnotatedImage]:
    """Return the images by id, in the file's order."""
    images: dict[int, AnnotatedImage] = {}
    for position, entry in enumerate(entries):
        try:
            key, name = whole_number(entry["id"]), str(entry["file_name"])
            size_hw = _size_hw(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: image number {position} cannot be read ({_reason(error)}); "
                "expected a whole-numbered id and a file_name in each"
            ) from error
        if key in images:
            problems.add("image id given twice, the first counts", key)
        else:
            images[key] = AnnotatedImage(name, size_hw)
    _check_unique(path, "images", "file_name", [image.file_name for image in images.values()])
    return images


def _size_hw(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return rows and columns; None where one of them is absent or null."""
    height, width = entry.get("height"), entry.get("width")
    if height is None or width is None:
        return None
    return whole_number(height), whole_number(width)


def _read_categories(path: Path, entries: Sequence[Any]) -> dict[int, str]:
    """Return the names by id, in the file's order."""
    pairs: list[tuple[int, str]] = []
    for position, entry in enumerate(entries):
        try:
            pairs.append((whole_number(entry["id"]), str(entry["name"])))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: category number {position} cannot be read ({_reason(error)}); "
                "expected a whole-numbered id and a name in each"
            ) from error
    _check_unique(path, "categories", "id", [key for key, _ in pairs])
    _check_unique(path, "categories", "name", [name for _, name in pairs])
    return dict(pairs)


def _check_unique(path: Path, what: str, key: str, values: Iterable[object]) -> None:
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{path}: {count} {what} have the {key} {value}; expected one of its own for each"
        )


def _read_boxes(
    path: Path,
    entries: Sequence[Any],
    images: Collection[int],
    categories: Collection[int],
    problems: Problems,
) -> AnnotatedBoxes:
    """Return the boxes that can be used, in the file's order.

    Args:
        path: of the file, for errors.
        entries: its annotations.
        images: ids of the images.
        categories: ids of the categories.
        problems: those that cannot be used are counted here.
    """
    rows: list[_Row] = []
    ids: set[str] = set()
    for position, entry in enumerate(entries):
        try:
            row = _read_row(entry, position)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(
                f"{path}: annotation number {position} cannot be read ({_reason(error)}); "
                "expected image_id, category_id and bbox (x, y, width, height)"
            ) from error
        if row.name in ids:
            problem = "annotation id given twice, the first counts"
        elif row.image_id not in images:
            problem = "annotation without an image, left out"
        elif row.category_id not in categories:
            problem = "category not listed, left out"
        else:
            problem = _box_problem(row)
        ids.add(row.name)
        if problem is not None:
            problems.add(problem, row.name)
        else:
            rows.append(row)
    return _boxes_from_rows(rows)


class _Row(NamedTuple):
    """One annotation."""

    image_id: int
    category_id: int
    box_xywh: tuple[float, float, float, float]
    area: float
    crowd: bool
    name: str


def _read_row(entry: Mapping[str, Any], position: int) -> _Row:
    x, y, width, height = (float(value) for value in entry["bbox"])
    area, name = entry.get("area"), entry.get("id")
    return _Row(
        whole_number(entry["image_id"]),
        whole_number(entry["category_id"]),
        (x, y, width, height),
        width * height if area is None else float(area),
        bool(int(entry.get("iscrowd") or 0)),
        f"number {position}" if name is None else str(name),
    )


def _box_problem(row: _Row) -> str | None:
    if not all(map(math.isfinite, (*row.box_xywh, row.area))):
        return "box or area that is not a number, left out"
    if min(row.box_xywh[2:]) < 0:
        return "box of negative size, left out"
    return None


def _boxes_from_rows(rows: Sequence[_Row]) -> AnnotatedBoxes:
    columns = list(zip(*rows, strict=True)) or [()] * len(_Row._fields)
    return AnnotatedBoxes(
        np.array(columns[0], np.int64),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.float64).reshape(-1, 4),
        np.array(columns[3], np.float64),
        np.array(columns[4], np.bool_),
        np.array(columns[5], np.str_),
    )


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def read_coco_ids(
    path: Path, names: Sequence[str], class_names: Sequence[str]
) -> tuple[dict[str, int], list[int]]:
    """Return the ids that a COCO file gives to these images and classes.

    A list of images suffices; nothing need be annotated.

    Args:
        path: COCO JSON with the lists images and categories.
        names: paths of the images; matched by the end of the path, as long as the file's
            `file_name`.
        class_names: of the detector, in the order of its class numbers.

    Returns:
        Image id of every name, and category id of every class.

    Raises:
        InputError: not such a file, or an image or class is not in it.
    """
    content = _read_lists(path, ("images", "categories"))
    if not content["images"] or not content["categories"]:
        raise InputError(f"{path}: lists no images or no categories; expected at least one of each")
    images = _read_images(path, content["images"], Problems())
    category_ids = {
        name: key for key, name in _read_categories(path, content["categories"]).items()
    }
    if unknown := [name for name in class_names if name not in category_ids]:
        raise InputError(
            f"{path}: has no category {unknown[0]!r}, one of {len(unknown)} missing; "
            f"it has {', '.join(category_ids)}"
        )
    image_ids: dict[PurePath, int] = {}
    for key, image in images.items():  # names written on Windows separate folders by backslashes
        image_ids[PurePath(image.file_name.replace("\\", "/"))] = key
        image_ids[PurePath(image.file_name)] = key
    return (
        {name: _image_id(path, image_ids, name) for name in names},
        [category_ids[name] for name in class_names],
    )


def _image_id(path: Path, image_ids: Mapping[PurePath, int], name: str) -> int:
    parts = PurePath(name).parts
    for start in range(len(parts)):
        if (key := image_ids.get(PurePath(*parts[start:]))) is not None:
            return key
    raise InputError(f"{path}: does not list the image {name}; expected one of its file names")
