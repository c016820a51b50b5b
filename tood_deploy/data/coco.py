"""COCO annotation files: read, checked, every doubtful entry counted. Knows no pixels and no torch.

Images and boxes that cannot be used are left out and named in the report; a file that is not COCO at all is an error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import InputError, ToodError

MIN_IMAGE_SIDE = (
    32  # pixels of the shorter side; smaller ones are not trained on, as in the published recipes
)
EXAMPLES = 3  # named per problem


@dataclass(frozen=True, eq=False)
class Record:
    """One image and its boxes.

    Attributes:
        image_id: as in the file.
        path: of the image.
        size_hw: as the file says.
        boxes: (G, 4) float32 xyxy in pixels, clipped to the image.
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
        records: the images that can be used.
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
        """The images one can learn from: with boxes, and not tiny; the others are counted as problems."""
        kept = []
        for record in self.records:
            if not len(record.boxes):
                self.problems.add("image without boxes, left out", record.path.name)
            elif min(record.size_hw) < MIN_IMAGE_SIDE:
                self.problems.add(
                    f"image under {MIN_IMAGE_SIDE} pixels, left out", record.path.name
                )
            else:
                kept.append(record)
        if not kept:
            raise InputError(
                f"{self.path}: no image can be trained on; {'; '.join(self.problems.lines()) or 'it lists none'}"
            )
        return kept


def read_annotations(
    path: Path, source_images: Path, class_names: Iterable[str] | None = None
) -> Annotations:
    """Reads a COCO JSON.

    Args:
        path: the file.
        images: the folder that its file names are relative to.
        class_names: order of classes, by their names in the file; the file's own order where not given.

    Raises:
        InputError: not COCO, a class is missing, or the folder is not there.
    """
    content = _load(path)
    if not source_images.is_dir():
        raise InputError(f"{source_images}: no such folder; expected the images of {path}")
    categories = _categories(content, path)
    names = tuple(categories) if class_names is None else tuple(class_names)
    if missing := [name for name in names if name not in categories]:
        raise InputError(
            f"{path}: has no category {', '.join(missing)}; it has {', '.join(categories)}"
        )
    ids = tuple(categories[name] for name in names)
    problems = Problems()
    images = _images(content["images"], source_images, path, problems)
    boxes = _boxes(
        content["annotations"],
        images,
        {category: label for label, category in enumerate(ids)},
        problems,
        path,
    )
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
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected a COCO JSON file"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{path}: not JSON ({error}); expected a COCO file with images, annotations and categories"
        ) from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        found = (
            ", ".join(list(content)[:6])
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise InputError(
            f"{path}: not a COCO file: found {found or 'nothing'}; expected the lists images, annotations and categories"
        )
    return content


def _categories(content: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The id of every category by its name, in the file's order."""
    try:
        pairs = [(str(entry["name"]), int(entry["id"])) for entry in content["categories"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: a category is without {error}; expected an id and a name in each"
        ) from error
    for column, what in ((0, "name"), (1, "id")):
        twice = [
            value for value, count in Counter(pair[column] for pair in pairs).items() if count > 1
        ]
        if twice:
            raise InputError(
                f"{path}: two categories have the {what} {twice[0]}; expected each once"
            )
    if not pairs:
        raise InputError(f"{path}: lists no categories; expected at least one")
    return dict(pairs)


def _images(
    entries: Iterable[Any], source_images: Path, path: Path, problems: Problems
) -> dict[int, tuple[Path, tuple[int, int]]]:
    """File and (rows, columns) of every usable image by its id."""
    images: dict[int, tuple[Path, tuple[int, int]]] = {}
    for entry in entries:
        try:
            key, file, size = (
                int(entry["id"]),
                source_images / str(entry["file_name"]),
                (int(entry["height"]), int(entry["width"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: an image is without {error}; expected id, file_name, width and height in each"
            ) from error
        if key in images:
            problems.add("image id given twice, the first counts", key)
        elif not file.is_file():
            problems.add("image missing, left out", file.name)
        elif min(size) < 1:
            problems.add("image of no size, left out", file.name)
        else:
            images[key] = file, size
    return images


def _boxes(
    entries: Iterable[Any],
    images: Mapping[int, tuple[Path, tuple[int, int]]],
    labels: Mapping[int, int],
    problems: Problems,
    path: Path,
) -> dict[int, list[tuple[list[float], int]]]:
    """Every usable box and its class number, by image."""
    boxes: dict[int, list[tuple[list[float], int]]] = {key: [] for key in images}
    seen: set[Any] = set()
    for position, entry in enumerate(entries):
        try:
            name, image, category = (
                entry.get("id", f"number {position}"),
                int(entry["image_id"]),
                int(entry["category_id"]),
            )
            x, y, width, height = (float(value) for value in entry["bbox"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path}: annotation {position} cannot be read ({error}); expected image_id, category_id and bbox"
            ) from error
        problem = _problem(entry, name, seen, image in images, category in labels)
        seen.add(name)
        box = None if problem else _clip((x, y, x + width, y + height), images[image][1])
        if problem is None and (
            width < 1 or height < 1 or not np.isfinite((x, y, width, height)).all()
        ):
            problem = "box of zero size, left out"
        elif problem is None and box is None:
            problem = "box outside the image, left out"
        if problem:
            problems.add(problem, name)
        elif box is not None:
            if box != [x, y, x + width, y + height]:
                problems.add("box reaching out of the image, clipped", name)
            boxes[image].append((box, labels[category]))
    return boxes


def _problem(
    entry: Mapping[str, Any], name: Any, seen: set[Any], has_image: bool, has_category: bool
) -> str | None:
    """Why an annotation cannot be used, whatever its box."""
    if name in seen:
        return "annotation id given twice, the first counts"
    if not has_image:
        return "annotation without a image, left out"
    if not has_category:
        return "category not listed, left out"
    if entry.get("iscrowd"):
        return "crowd box, left out"
    return None


def _clip(box: tuple[float, float, float, float], size_hw: tuple[int, int]) -> list[float] | None:
    """The box inside the image; None where nothing of it is."""
    height, width = size_hw
    x1, y1, x2, y2 = (
        max(box[0], 0.0),
        max(box[1], 0.0),
        min(box[2], float(width)),
        min(box[3], float(height)),
    )
    return [x1, y1, x2, y2] if x2 > x1 and y2 > y1 else None


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
        """Those at these positions, or where a mask is true."""
        return type(self)(
            **{field.name: getattr(self, field.name)[chosen] for field in fields(self)}
        )

    def by_image(self) -> Self:
        """The same in ascending order of the image ids."""
        return self.pick(np.argsort(self.image_ids, kind="stable"))

    def span(self, first_id: int, last_id: int) -> slice:
        """Where the boxes of the images from `first_id` to `last_id`, both included, stand."""
        start, stop = np.searchsorted(self.image_ids, [first_id, last_id + 1])
        return slice(int(start), int(stop))


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
    """A image of the annotations: file name, and (rows, columns) where the file tells them."""

    file_name: str
    size_hw: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Truth:
    """Everything that was annotated.

    Attributes:
        path: the annotation file.
        images: by id, ascending.
        categories: name by id, ascending.
        boxes: of all images.
    """

    path: Path
    images: Mapping[int, TruthImage]
    categories: Mapping[int, str]
    boxes: TruthBoxes

    def only(self, category_ids: Collection[int]) -> Truth:
        """The same images with these categories alone."""
        kept = {key: name for key, name in self.categories.items() if key in category_ids}
        return replace(
            self,
            categories=kept,
            boxes=self.boxes.pick(np.isin(self.boxes.category_ids, list(kept))),
        )


def read_truth(path: Path) -> Truth:
    """Reads COCO annotations. Where a box has no `area`, it is width times height, where no `iscrowd`, it is none.

    Raises:
        InputError: not such a file, an id twice or unknown, a box that is none, or nothing annotated.
    """
    content = _load_of_truth(path)
    images = _by_id(path, "image", content["images"], "file_name")
    categories = _by_id(path, "category", content["categories"], "name")
    source_images = {
        key: TruthImage(str(image["file_name"]), _size_hw(image)) for key, image in images.items()
    }
    _once(path, "images", (source_image.file_name for source_image in source_images.values()))
    names = {key: str(category["name"]) for key, category in categories.items()}
    _once(path, "categories", names.values())
    return Truth(
        path,
        source_images,
        names,
        _boxes_of_truth(path, content["annotations"], source_images, names).by_image(),
    )


def load_json(path: Path, expected: str) -> Any:
    """What a JSON file holds; `expected` says for errors what it should be.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected {expected}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected {expected}") from error


def _load_of_truth(path: Path) -> dict[str, list[Any]]:
    content = load_json(path, "COCO annotations")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), list) for part in PARTS
    ):
        found = (
            f"an object with {', '.join(list(content)[:6]) or 'nothing'}"
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise InputError(
            f"{path}: not COCO annotations: found {found}; expected an object with the lists {', '.join(PARTS)}"
        )
    if empty := [part for part in PARTS if not content[part]]:
        raise InputError(
            f"{path}: the list {empty[0]} is empty, there is nothing to compare with; expected at least one of each"
        )
    return content


def _by_id(path: Path, what: str, entries: Sequence[Any], needed: str) -> dict[int, dict[str, Any]]:
    """The entries by id, ascending."""
    by_id: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("id"), int)
            or needed not in entry
        ):
            raise InputError(
                f"{path}: {what} number {position} has no whole-numbered id or no {needed}; expected both in each"
            )
        if entry["id"] in by_id:
            raise InputError(f"{path}: {what} id {entry['id']} stands twice; expected each once")
        by_id[entry["id"]] = entry
    return dict(sorted(by_id.items()))


def _once(path: Path, what: str, names: Iterable[str]) -> None:
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{path}: {count} {what} are called {name}; expected a name of its own for each"
        )


def _size_hw(image: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _boxes_of_truth(
    path: Path, entries: Sequence[Any], images: Collection[int], categories: Collection[int]
) -> TruthBoxes:
    rows = []
    for position, entry in enumerate(entries):
        try:
            image, category, box = (
                entry["image_id"],
                entry["category_id"],
                [float(value) for value in entry["bbox"]],
            )
            area, crowd = float(entry.get("area", box[2] * box[3])), bool(entry.get("iscrowd", 0))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(
                f"{path}: annotation number {position} cannot be read ({error}); expected image_id, category_id, bbox"
            ) from error
        if image not in images or category not in categories:
            unknown = f"image id {image}" if image not in images else f"category id {category}"
            raise InputError(
                f"{path}: annotation number {position} is of {unknown}, which the file does not list; add it or drop the box"
            )
        if len(box) != 4 or not np.isfinite([*box, area]).all():
            raise InputError(
                f"{path}: annotation number {position} has the bbox {box}, area {area}; expected x, y, width, height"
            )
        rows.append((image, category, box, area, crowd))
    image_ids, category_ids, boxes, areas, crowd = (
        list(column) for column in zip(*rows, strict=True)
    )
    return TruthBoxes(
        np.array(image_ids, np.int64),
        np.array(category_ids, np.int64),
        np.array(boxes, np.float64),
        np.array(areas),
        np.array(crowd),
    )


SHOWN_NAMES = 5


def map_categories(
    class_names: Sequence[str], truth: Truth, mapping: Path | None = None
) -> list[int | None]:
    """The category id of every class, None for a class that is left out.

    Without a mapping both sides must have the same names. With one, a class that the file does not name goes by its own name, and
    categories that no class stands for are left to the caller to leave out of the score.

    Args:
        class_names: of the model, in the order of its class numbers.
        truth: the annotations.
        mapping: a JSON object with the model's name as key and the category's name, or null, as value.

    Raises:
        InputError: the mapping cannot be read, or names what is not there.
        ToodError: the names of the two sides differ.
    """
    ids = {name: key for key, name in truth.categories.items()}
    renamed: Mapping[str, str | None] = (
        {} if mapping is None else _read_mapping(mapping, class_names, ids)
    )
    wanted = [renamed.get(name, name) for name in class_names]
    unknown = [name for name in wanted if name is not None and name not in ids]
    unmet = [name for name in ids if name not in wanted] if mapping is None else []
    if unknown or unmet:
        raise ToodError(_mismatch(class_names, truth, unknown, unmet))
    if all(name is None for name in wanted):
        raise InputError(
            f"{mapping}: leaves out every class of the model; expected at least one that is scored"
        )
    return [None if name is None else ids[name] for name in wanted]


def _read_mapping(
    path: Path, class_names: Sequence[str], ids: Mapping[str, int]
) -> dict[str, str | None]:
    expected = 'a JSON object such as {"class of the model": "category of the annotations", "another": null}'
    content = load_json(path, expected)
    if not isinstance(content, dict) or not all(
        value is None or isinstance(value, str) for value in content.values()
    ):
        raise InputError(f"{path}: not a mapping of class names; expected {expected}")
    if wrong := [name for name in content if name not in class_names]:
        raise InputError(
            f"{path}: the model has no class {wrong[0]!r}; it has {_list(class_names)}"
        )
    if wrong := [name for name in content.values() if name is not None and name not in ids]:
        raise InputError(
            f"{path}: the annotations have no category {wrong[0]!r}; they have {_list(list(ids))}"
        )
    return content


def _mismatch(
    class_names: Sequence[str], truth: Truth, unknown: Sequence[str], unmet: Sequence[str]
) -> str:
    reasons = []
    if unknown:
        reasons.append(f"only the model has {_list(unknown)}")
    if unmet:
        reasons.append(f"only the annotations have {_list(unmet)}")
    return (
        f"{truth.path}: its {len(truth.categories)} categories are not the model's {len(class_names)} classes: {'; '.join(reasons)}. "
        "Give the pairs with --mapping FILE, or a checkpoint's names with --classes"
    )


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def read_coco_ids(
    path: Path, names: Sequence[str], class_names: Sequence[str]
) -> tuple[dict[str, int], list[int]]:
    """The ids that an annotation file gives to these images and classes.

    Args:
        path: COCO annotations, JSON.
        names: paths of the images; matched by the end of the path, as long as the file's `file_name`.
        class_names: of the detector, in the order of its class numbers.

    Returns:
        Image id of every name, and category id of every class.

    Raises:
        InputError: not such a file, or a image or class is not in it.
    """
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))
        image_ids = {
            PurePath(image["file_name"]): int(image["id"]) for image in annotations["images"]
        }
        category_ids = {
            str(category["name"]): int(category["id"]) for category in annotations["categories"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read as COCO annotations ({_reason(error)}); expected images and categories"
        ) from error
    if unknown := [name for name in class_names if name not in category_ids]:
        raise InputError(
            f"{path}: has no category {unknown[0]!r}, one of {len(unknown)} missing; it has {', '.join(category_ids)}"
        )
    return {name: _image_id(path, image_ids, name) for name in names}, [
        category_ids[name] for name in class_names
    ]


def _image_id(path: Path, image_ids: dict[PurePath, int], name: str) -> int:
    parts = PurePath(name).parts
    for start in range(len(parts)):
        if (found := image_ids.get(PurePath(*parts[start:]))) is not None:
            return found
    raise InputError(
        f"{path}: does not list the image {name}; expected one of its {len(image_ids)} file names"
    )


def _reason(error: Any) -> str:
    return (
        f"no {error}"
        if isinstance(error, KeyError)
        else str(getattr(error, "strerror", None) or error)
    )
