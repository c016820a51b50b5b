"""Annotated images as training takes them.

Annotations and a folder in; images with clipped boxes and class numbers out. What cannot be learnt
from (crowds, boxes outside their image, images that are not there) is left out and counted. Knows
no torch and no augmentation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.coco import (
    AnnotatedBoxes,
    AnnotatedImage,
    Annotations,
    Problems,
    read_annotations,
)
from tood_deploy.data.images import (
    find_image,
    missing_image_cure,
    read_image_of_size,
    read_image_size,
)
from tood_deploy.errors import InputError
from tood_deploy.windows import boxes_in_window, slice_windows

MAX_WHOLE_BYTES = 512 * 2**20  # of images that windows are cut from, in each loading process
MIN_IMAGE_SIDE = 32  # pixels of the shorter side; the published recipes leave out smaller ones too
MIN_BOX_SIDE = 1.0  # pixels


@dataclass(frozen=True)
class Window:
    """A part of an image.

    Attributes:
        xyxy: in pixels of the image.
        image_hw: rows and columns of the image.
    """

    xyxy: tuple[int, int, int, int]
    image_hw: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Record:
    """One image and its boxes.

    Attributes:
        image_id: as in the annotations.
        path: of the image.
        size_hw: as the annotations say, else as the image's header; of a window its own.
        boxes: (G, 4) float32 xyxy in pixels, clipped to the image.
        labels: (G,) int64 class numbers.
        window: the part of the image that is meant; None: all of it.
    """

    image_id: int
    path: Path
    size_hw: tuple[int, int]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    window: Window | None = None


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A data set to train on, or to evaluate a training by.

    Attributes:
        annotations: everything that was annotated.
        records: the images that can be used, in the order of the file.
        class_names: in the order of the class numbers.
        category_ids: the annotations' id of every class.
        problems: what was left out, and why.
    """

    annotations: Annotations
    records: list[Record]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: Problems

    @property
    def path(self) -> Path:
        """Return the annotation file."""
        return self.annotations.path

    def for_training(self) -> list[Record]:
        """Return the images to learn from: with boxes, and not tiny; the others are problems.

        Raises:
            InputError: there are none.
        """
        kept: list[Record] = []
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
            problems = "; ".join(self.problems.lines()) or "it lists none"
            raise InputError(f"{self.path}: no image can be trained on; {problems}")
        return kept


def read_labelled_images(
    path: Path, folder: Path, class_names: Iterable[str] | None = None
) -> LabelledImages:
    """Read COCO annotations and find their images.

    Args:
        path: the annotations.
        folder: that their file names are relative to.
        class_names: order of classes, by their names in the file; the file's own order where not
            given.

    Raises:
        InputError: not COCO, a class is missing, or the folder or all of its images are not there.
    """
    annotations = read_annotations(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected the images of {path}")
    ids = {name: key for key, name in annotations.categories.items()}
    names = annotations.class_names if class_names is None else tuple(class_names)
    if missing := [name for name in names if name not in ids]:
        raise InputError(f"{path}: has no category {', '.join(missing)}; it has {', '.join(ids)}")
    category_ids = tuple(ids[name] for name in names)
    problems = annotations.problems.copy()
    images = _find_images(annotations, folder, problems)
    records = _records(annotations, images, category_ids, problems)
    return LabelledImages(annotations, records, names, category_ids, problems)


def read_image(record: Record) -> NDArray[np.uint8] | None:
    """Read the image, (H, W, 3) uint8 BGR, as stored or upright, whichever has the annotated size.

    None if it cannot be read, or has another size than its annotations say.
    """
    try:
        if record.window is None:
            return read_image_of_size(record.path, record.size_hw)
        left, top, right, bottom = record.window.xyxy
        return _WHOLE.read(record.path, record.window.image_hw)[top:bottom, left:right]
    except InputError:
        return None


class _WholeImages:
    """Images that windows were cut from lately: the next window of each needs no decoding."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._images: OrderedDict[tuple[Path, tuple[int, int]], NDArray[np.uint8]] = OrderedDict()

    def read(self, path: Path, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the image, (H, W, 3) uint8 BGR.

        Raises:
            InputError: it cannot be read, or is not of that size.
        """
        image = self._images.pop((path, size_hw), None)
        if image is None:
            image = read_image_of_size(path, size_hw)
        self._images[path, size_hw] = image
        while len(self._images) > 1 and self._bytes() > self.max_bytes:
            self._images.popitem(last=False)
        return image

    def _bytes(self) -> int:
        return sum(image.nbytes for image in self._images.values())


_WHOLE = _WholeImages(MAX_WHOLE_BYTES)


def slice_images(
    labelled: LabelledImages, size_hw: tuple[int, int], overlap: float, min_visible: float
) -> LabelledImages:
    """Return the windows of all images as images of their own, cut when they are read.

    Boxes are cut at a window's border, and belong to every window that shows enough of them.

    Args:
        labelled: whole images.
        size_hw: rows and columns of a window.
        overlap: of neighbouring windows, as a share of their side.
        min_visible: smallest share of a box's area that a window must show.
    """
    cuts = [
        (record, window)
        for record in labelled.records
        for window in slice_windows(record.size_hw, size_hw, overlap)
    ]
    records = []
    for number, (record, window) in enumerate(cuts, 1):
        boxes, kept = boxes_in_window(record.boxes, window, min_visible)
        left, top, right, bottom = window.tolist()
        part = Window((left, top, right, bottom), record.size_hw)
        cut_hw = (bottom - top, right - left)
        records.append(Record(number, record.path, cut_hw, boxes, record.labels[kept], part))
    origins = [record.image_id for record, _ in cuts]
    annotations = _sliced_annotations(labelled.annotations, records, origins, min_visible)
    return replace(labelled, annotations=annotations, records=records)


def _sliced_annotations(
    annotations: Annotations, records: list[Record], origins: list[int], min_visible: float
) -> Annotations:
    """Return the annotations of windows, crowds and small objects with them.

    Args:
        annotations: of the whole images.
        records: the windows, with their own ids.
        origins: id of the image of every window.
        min_visible: smallest share of a box's area that a window must show.
    """
    parts = []
    for record, origin in zip(records, origins, strict=True):
        assert record.window is not None
        own = annotations.boxes.pick(annotations.boxes.span(origin, origin))
        corners = np.concatenate(
            [own.boxes_xywh[:, :2], own.boxes_xywh[:, :2] + own.boxes_xywh[:, 2:]], axis=1
        )
        cut, kept = boxes_in_window(
            corners.astype(np.float32), np.array(record.window.xyxy), min_visible
        )
        own, sides = own.pick(kept), (cut[:, 2:] - cut[:, :2]).astype(np.float64)
        shown = np.prod(sides, axis=1) / np.maximum(np.prod(own.boxes_xywh[:, 2:], axis=1), 1e-9)
        parts.append(
            replace(
                own,
                image_ids=np.full(len(own), record.image_id, np.int64),
                boxes_xywh=np.concatenate([cut[:, :2].astype(np.float64), sides], axis=1),
                areas=own.areas * shown,
            )
        )
    images = {
        record.image_id: AnnotatedImage(record.path.name, record.size_hw) for record in records
    }
    columns = {
        column.name: np.concatenate([getattr(part, column.name) for part in parts])
        for column in fields(AnnotatedBoxes)
    }
    return replace(
        annotations, images=images, boxes=AnnotatedBoxes(**columns), file_order=tuple(images)
    )


def _find_images(
    annotations: Annotations, folder: Path, problems: Problems
) -> dict[int, tuple[Path, tuple[int, int]]]:
    """Return file and (rows, columns) of every usable image by its id, in the file's order."""
    images: dict[int, tuple[Path, tuple[int, int]]] = {}
    missing: list[AnnotatedImage] = []
    for key in annotations.file_order:
        image = annotations.images[key]
        path = find_image(folder, image.file_name)
        if path is None:
            missing.append(image)
            problems.add("image missing, left out", image.file_name)
        elif (size_hw := image.size_hw or _size_of(path, problems)) is None:
            continue
        elif min(size_hw) < 1:
            problems.add("image of no size, left out", image.file_name)
        else:
            images[key] = path, size_hw
    if len(missing) == len(annotations.images):
        first = missing[0].file_name
        raise InputError(
            f"{folder}: none of the {len(missing)} images of {annotations.path} is there, "
            f"the first is {first}; {missing_image_cure(folder, first)}"
        )
    return images


def _size_of(path: Path, problems: Problems) -> tuple[int, int] | None:
    """Return rows and columns of an image that the annotations give none of."""
    try:
        return read_image_size(path)
    except InputError:
        problems.add("image unreadable, left out", path.name)
        return None


def _records(
    annotations: Annotations,
    images: Mapping[int, tuple[Path, tuple[int, int]]],
    category_ids: tuple[int, ...],
    problems: Problems,
) -> list[Record]:
    """Return a record for each image.

    Args:
        annotations: boxes of all images.
        images: file and (rows, columns) of the usable images, by id.
        category_ids: of the classes, in order of their numbers.
        problems: boxes that cannot be used are counted here.
    """
    sizes_hw = {key: size_hw for key, (_, size_hw) in images.items()}
    boxes, xyxy = _usable_boxes(annotations.boxes, sizes_hw, category_ids, problems)
    label_of = {category: label for label, category in enumerate(category_ids)}
    labels = np.array([label_of[key] for key in boxes.category_ids.tolist()], np.int64)
    records: list[Record] = []
    for key, (path, size_hw) in images.items():
        span = boxes.span(key, key)
        records.append(Record(key, path, size_hw, xyxy[span].astype(np.float32), labels[span]))
    return records


def _usable_boxes(
    boxes: AnnotatedBoxes,
    sizes_hw: Mapping[int, tuple[int, int]],
    category_ids: tuple[int, ...],
    problems: Problems,
) -> tuple[AnnotatedBoxes, NDArray[np.float64]]:
    """Return the boxes to learn from, and these (N, 4) xyxy in pixels, clipped to their images.

    Args:
        boxes: of all images.
        sizes_hw: rows and columns of the usable images, by id.
        category_ids: of the classes.
        problems: the others are counted here, but for those of images that are counted already.
    """
    boxes = boxes.pick(np.isin(boxes.image_ids, list(sizes_hw)))
    sizes_wh = np.array([sizes_hw[key][::-1] for key in boxes.image_ids.tolist()], np.float64)
    limits = np.tile(sizes_wh.reshape(-1, 2), 2)
    corners = np.concatenate(
        [boxes.boxes_xywh[:, :2], boxes.boxes_xywh[:, :2] + boxes.boxes_xywh[:, 2:]], axis=1
    )
    clipped = np.clip(corners, 0.0, limits)
    usable = np.ones(len(boxes), bool)
    for kind, mask in (
        ("category not listed, left out", ~np.isin(boxes.category_ids, category_ids)),
        ("crowd box, left out", boxes.crowd),
        ("box of zero size, left out", (boxes.boxes_xywh[:, 2:] < MIN_BOX_SIDE).any(axis=1)),
        ("box outside the image, left out", (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)),
    ):
        for name in boxes.ids[usable & mask].tolist():  # the first reason counts
            problems.add(kind, name)
        usable &= ~mask
    for name in boxes.ids[usable & (clipped != corners).any(axis=1)].tolist():
        problems.add("box reaching out of the image, clipped", name)
    return boxes.pick(usable), clipped[usable]
