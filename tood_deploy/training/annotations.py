"""COCO annotation files: read, checked, every doubtful entry counted. Knows no pixels and no torch.

Pictures and boxes that cannot be used are left out and named in the report; a file that is not COCO at all is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import InputError

SMALLEST_PICTURE = 32  # pixels of the shorter side; smaller ones are not trained on, as in the published recipes
EXAMPLES = 3  # named per problem


@dataclass(frozen=True, eq=False)
class Record:
    """One picture and its boxes.

    Attributes:
        image_id: as in the file.
        path: of the picture.
        size_hw: as the file says.
        boxes: (G, 4) float32 xyxy in pixels, clipped to the picture.
        labels: (G,) int64 class numbers.
    """

    image_id: int
    path: Path
    size_hw: tuple[int, int]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass
class Problems:
    """What was found wrong, by kind, with a few examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: object) -> None:
        """One more of a kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= EXAMPLES:
            self.examples.setdefault(kind, []).append(str(example))

    def lines(self) -> list[str]:
        """One line a kind: how many, and which for example."""
        return [
            f"{count} x {kind} ({', '.join(self.examples[kind])}{', ...' if count > EXAMPLES else ''})"
            for kind, count in self.counts.items()
        ]


@dataclass(frozen=True, eq=False)
class Annotations:
    """A COCO data set.

    Attributes:
        path: the JSON file.
        records: the pictures that can be used.
        class_names: in the order of the class numbers.
        category_ids: the file's id of every class.
        problems: what was left out, and why.
    """

    path: Path
    records: list[Record]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: Problems

    def for_training(self) -> list[Record]:
        """The pictures one can learn from: with boxes, and not tiny; the others are counted as problems."""
        kept = []
        for record in self.records:
            if not len(record.boxes):
                self.problems.add("picture without boxes, left out", record.path.name)
            elif min(record.size_hw) < SMALLEST_PICTURE:
                self.problems.add(f"picture under {SMALLEST_PICTURE} pixels, left out", record.path.name)
            else:
                kept.append(record)
        if not kept:
            raise InputError(f"{self.path}: no picture can be trained on; {'; '.join(self.problems.lines()) or 'it lists none'}")
        return kept


def read_annotations(path: Path, pictures: Path, class_names: Iterable[str] | None = None) -> Annotations:
    """Reads a COCO JSON.

    Args:
        path: the file.
        pictures: the folder that its file names are relative to.
        class_names: order of classes, by their names in the file; the file's own order where not given.

    Raises:
        InputError: not COCO, a class is missing, or the folder is not there.
    """
    content = _load(path)
    if not pictures.is_dir():
        raise InputError(f"{pictures}: no such folder; expected the pictures of {path}")
    categories = _categories(content, path)
    names = tuple(categories) if class_names is None else tuple(class_names)
    if missing := [name for name in names if name not in categories]:
        raise InputError(f"{path}: has no category {', '.join(missing)}; it has {', '.join(categories)}")
    ids = tuple(categories[name] for name in names)
    problems = Problems()
    images = _images(content["images"], pictures, path, problems)
    boxes = _boxes(content["annotations"], images, {category: label for label, category in enumerate(ids)}, problems, path)
    records = [
        Record(
            key,
            file,
            size,
            np.array([box for box, _ in boxes[key]], np.float32).reshape(-1, 4),
            np.array([c for _, c in boxes[key]], np.int64),
        )
        for key, (file, size) in images.items()
    ]
    return Annotations(path, records, names, ids, problems)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a COCO JSON file") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); expected a COCO file with images, annotations and categories") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        found = ", ".join(list(content)[:6]) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(f"{path}: not a COCO file: found {found or 'nothing'}; expected the lists images, annotations and categories")
    return content


def _categories(content: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The id of every category by its name, in the file's order."""
    try:
        pairs = [(str(entry["name"]), int(entry["id"])) for entry in content["categories"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: a category is without {error}; expected an id and a name in each") from error
    for column, what in ((0, "name"), (1, "id")):
        twice = [value for value, count in Counter(pair[column] for pair in pairs).items() if count > 1]
        if twice:
            raise InputError(f"{path}: two categories have the {what} {twice[0]}; expected each once")
    if not pairs:
        raise InputError(f"{path}: lists no categories; expected at least one")
    return dict(pairs)


def _images(entries: Iterable[Any], pictures: Path, path: Path, problems: Problems) -> dict[int, tuple[Path, tuple[int, int]]]:
    """File and (rows, columns) of every usable picture by its id."""
    images: dict[int, tuple[Path, tuple[int, int]]] = {}
    for entry in entries:
        try:
            key, file, size = int(entry["id"]), pictures / str(entry["file_name"]), (int(entry["height"]), int(entry["width"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: an image is without {error}; expected id, file_name, width and height in each") from error
        if key in images:
            problems.add("image id given twice, the first counts", key)
        elif not file.is_file():
            problems.add("picture missing, left out", file.name)
        elif min(size) < 1:
            problems.add("picture of no size, left out", file.name)
        else:
            images[key] = file, size
    return images


def _boxes(
    entries: Iterable[Any], images: Mapping[int, tuple[Path, tuple[int, int]]], labels: Mapping[int, int], problems: Problems, path: Path
) -> dict[int, list[tuple[list[float], int]]]:
    """Every usable box and its class number, by picture."""
    boxes: dict[int, list[tuple[list[float], int]]] = {key: [] for key in images}
    seen: set[Any] = set()
    for position, entry in enumerate(entries):
        try:
            name, image, category = entry.get("id", f"number {position}"), int(entry["image_id"]), int(entry["category_id"])
            x, y, width, height = (float(value) for value in entry["bbox"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: annotation {position} cannot be read ({error}); expected image_id, category_id and bbox") from error
        problem = _problem(entry, name, seen, image in images, category in labels)
        seen.add(name)
        box = None if problem else _clip((x, y, x + width, y + height), images[image][1])
        if problem is None and (width < 1 or height < 1 or not np.isfinite((x, y, width, height)).all()):
            problem = "box of zero size, left out"
        elif problem is None and box is None:
            problem = "box outside the picture, left out"
        if problem:
            problems.add(problem, name)
        elif box is not None:
            if box != [x, y, x + width, y + height]:
                problems.add("box reaching out of the picture, clipped", name)
            boxes[image].append((box, labels[category]))
    return boxes


def _problem(entry: Mapping[str, Any], name: Any, seen: set[Any], has_image: bool, has_category: bool) -> str | None:
    """Why an annotation cannot be used, whatever its box."""
    if name in seen:
        return "annotation id given twice, the first counts"
    if not has_image:
        return "annotation without a picture, left out"
    if not has_category:
        return "category not listed, left out"
    if entry.get("iscrowd"):
        return "crowd box, left out"
    return None


def _clip(box: tuple[float, float, float, float], size_hw: tuple[int, int]) -> list[float] | None:
    """The box inside the picture; None where nothing of it is."""
    height, width = size_hw
    x1, y1, x2, y2 = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
    return [x1, y1, x2, y2] if x2 > x1 and y2 > y1 else None
