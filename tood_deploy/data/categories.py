"""Which category of the annotations each class of a model stands for.

Class names and annotations in, category ids out: by equal names, or as a user's file maps them.
Knows no detections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tood_deploy.data.coco import Annotations, load_json
from tood_deploy.errors import InputError, ToodError

SHOWN_NAMES = 5  # of categories, in messages


def map_categories(
    class_names: Sequence[str], truth: Annotations, mapping: Path | None = None
) -> list[int | None]:
    """Return the category id of every class, None for a class that is left out.

    Without a mapping both sides must have the same names. With one, a class that the file does not
    name goes by its own name, and categories that no class stands for are left to the caller to
    leave out of the score.

    Args:
        class_names: of the model, in the order of its class numbers.
        truth: the annotations.
        mapping: a JSON object with the model's name as key and the category's name, or null, as
            value.

    Raises:
        InputError: the mapping cannot be read, or names what is not there.
        ToodError: the names of the two sides differ.
    """
    ids = {name: key for key, name in truth.categories.items()}
    renamed: Mapping[str, str | None] = (
        {} if mapping is None else _read_mapping(mapping, class_names, ids)
    )
    names = [renamed.get(name, name) for name in class_names]
    only_model = [name for name in names if name is not None and name not in ids]
    only_truth = [name for name in ids if name not in names] if mapping is None else []
    if only_model or only_truth:
        raise ToodError(_mismatch(class_names, truth, only_model, only_truth))
    if all(name is None for name in names):
        raise InputError(
            f"{mapping}: leaves out every class of the model; expected at least one that is scored"
        )
    return [None if name is None else ids[name] for name in names]


def _read_mapping(
    path: Path, class_names: Sequence[str], ids: Mapping[str, int]
) -> dict[str, str | None]:
    expected = (
        "a JSON object such as "
        '{"class of the model": "category of the annotations", "another": null}'
    )
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
    class_names: Sequence[str],
    truth: Annotations,
    only_model: Sequence[str],
    only_truth: Sequence[str],
) -> str:
    reasons = []
    if only_model:
        reasons.append(f"only the model has {_list(only_model)}")
    if only_truth:
        reasons.append(f"only the annotations have {_list(only_truth)}")
    return (
        f"{truth.path}: its {len(truth.categories)} categories are not the model's "
        f"{len(class_names)} classes: {'; '.join(reasons)}. "
        "Give the pairs with --mapping FILE, or a checkpoint's names with --classes"
    )


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
