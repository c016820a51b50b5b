"""Ground truth from a COCO annotation file, with all that the metrics and the report need, and nothing more."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.boxes import Boxes
from tood_deploy.errors import InputError

PARTS = ("images", "annotations", "categories")


@dataclass(frozen=True, eq=False)
class TruthBoxes(Boxes):
    """Annotated boxes.

    Attributes:
        areas: (N,) float64 pixels of the object (of its mask, where the file says so): decides what is small, medium and large.
        crowd: (N,) bool, a group in one box: neither found nor missed.
    """

    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]


@dataclass(frozen=True)
class TruthImage:
    """A picture of the annotations: file name, and (rows, columns) where the file tells them."""

    file_name: str
    size_hw: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Truth:
    """Everything that was annotated.

    Attributes:
        path: the annotation file.
        images: by id, ascending.
        categories: name by id, ascending.
        boxes: of all pictures.
    """

    path: Path
    images: Mapping[int, TruthImage]
    categories: Mapping[int, str]
    boxes: TruthBoxes

    def only(self, category_ids: Collection[int]) -> Truth:
        """The same pictures with these categories alone."""
        kept = {key: name for key, name in self.categories.items() if key in category_ids}
        return replace(self, categories=kept, boxes=self.boxes.pick(np.isin(self.boxes.category_ids, list(kept))))


def read_truth(path: Path) -> Truth:
    """Reads COCO annotations. Where a box has no `area`, it is width times height, where no `iscrowd`, it is none.

    Raises:
        InputError: not such a file, an id twice or unknown, a box that is none, or nothing annotated.
    """
    content = _load(path)
    images = _by_id(path, "image", content["images"], "file_name")
    categories = _by_id(path, "category", content["categories"], "name")
    pictures = {key: TruthImage(str(image["file_name"]), _size_hw(image)) for key, image in images.items()}
    _once(path, "pictures", (picture.file_name for picture in pictures.values()))
    names = {key: str(category["name"]) for key, category in categories.items()}
    _once(path, "categories", names.values())
    return Truth(path, pictures, names, _boxes(path, content["annotations"], pictures, names).by_image())


def load_json(path: Path, expected: str) -> Any:
    """What a JSON file holds; `expected` says for errors what it should be.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected {expected}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected {expected}") from error


def _load(path: Path) -> dict[str, list[Any]]:
    content = load_json(path, "COCO annotations")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in PARTS):
        found = (
            f"an object with {', '.join(list(content)[:6]) or 'nothing'}" if isinstance(content, dict) else f"a {type(content).__name__}"
        )
        raise InputError(f"{path}: not COCO annotations: found {found}; expected an object with the lists {', '.join(PARTS)}")
    if empty := [part for part in PARTS if not content[part]]:
        raise InputError(f"{path}: the list {empty[0]} is empty, there is nothing to compare with; expected at least one of each")
    return content


def _by_id(path: Path, what: str, entries: Sequence[Any], needed: str) -> dict[int, dict[str, Any]]:
    """The entries by id, ascending."""
    by_id: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or needed not in entry:
            raise InputError(f"{path}: {what} number {position} has no whole-numbered id or no {needed}; expected both in each")
        if entry["id"] in by_id:
            raise InputError(f"{path}: {what} id {entry['id']} stands twice; expected each once")
        by_id[entry["id"]] = entry
    return dict(sorted(by_id.items()))


def _once(path: Path, what: str, names: Iterable[str]) -> None:
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: {count} {what} are called {name}; expected a name of its own for each")


def _size_hw(image: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _boxes(path: Path, entries: Sequence[Any], images: Collection[int], categories: Collection[int]) -> TruthBoxes:
    rows = []
    for position, entry in enumerate(entries):
        try:
            image, category, box = entry["image_id"], entry["category_id"], [float(value) for value in entry["bbox"]]
            area, crowd = float(entry.get("area", box[2] * box[3])), bool(entry.get("iscrowd", 0))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(
                f"{path}: annotation number {position} cannot be read ({error}); expected image_id, category_id, bbox"
            ) from error
        if image not in images or category not in categories:
            unknown = f"image id {image}" if image not in images else f"category id {category}"
            raise InputError(f"{path}: annotation number {position} is of {unknown}, which the file does not list; add it or drop the box")
        if len(box) != 4 or not np.isfinite([*box, area]).all():
            raise InputError(f"{path}: annotation number {position} has the bbox {box}, area {area}; expected x, y, width, height")
        rows.append((image, category, box, area, crowd))
    image_ids, category_ids, boxes, areas, crowd = (list(column) for column in zip(*rows, strict=True))
    return TruthBoxes(
        np.array(image_ids, np.int64), np.array(category_ids, np.int64), np.array(boxes, np.float64), np.array(areas), np.array(crowd)
    )
