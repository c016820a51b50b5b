"""Image and category ids from a COCO annotation file, so that results can be scored against it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from tood_deploy.errors import InputError


def read_coco_ids(path: Path, names: Sequence[str], class_names: Sequence[str]) -> tuple[dict[str, int], list[int]]:
    """The ids that an annotation file gives to these pictures and classes.

    Args:
        path: COCO annotations, JSON.
        names: paths of the pictures; matched by the end of the path, as long as the file's `file_name`.
        class_names: of the detector, in the order of its class numbers.

    Returns:
        Image id of every name, and category id of every class.

    Raises:
        InputError: not such a file, or a picture or class is not in it.
    """
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))
        image_ids = {PurePath(image["file_name"]): int(image["id"]) for image in annotations["images"]}
        category_ids = {str(category["name"]): int(category["id"]) for category in annotations["categories"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as COCO annotations ({_reason(error)}); expected images and categories") from error
    if unknown := [name for name in class_names if name not in category_ids]:
        raise InputError(f"{path}: has no category {unknown[0]!r}, one of {len(unknown)} missing; it has {', '.join(category_ids)}")
    return {name: _image_id(path, image_ids, name) for name in names}, [category_ids[name] for name in class_names]


def _image_id(path: Path, image_ids: dict[PurePath, int], name: str) -> int:
    parts = PurePath(name).parts
    for start in range(len(parts)):
        if (found := image_ids.get(PurePath(*parts[start:]))) is not None:
            return found
    raise InputError(f"{path}: does not list the picture {name}; expected one of its {len(image_ids)} file names")


def _reason(error: Any) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(getattr(error, "strerror", None) or error)
