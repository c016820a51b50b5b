"""Which category of the annotations each class of a model is: by name, or as a mapping file says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tood_deploy.benchmark.truth import Truth, load_json
from tood_deploy.errors import InputError, ToodError

SHOWN_NAMES = 5


def map_categories(class_names: Sequence[str], truth: Truth, mapping: Path | None = None) -> list[int | None]:
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
    renamed: Mapping[str, str | None] = {} if mapping is None else _read_mapping(mapping, class_names, ids)
    wanted = [renamed.get(name, name) for name in class_names]
    unknown = [name for name in wanted if name is not None and name not in ids]
    unmet = [name for name in ids if name not in wanted] if mapping is None else []
    if unknown or unmet:
        raise ToodError(_mismatch(class_names, truth, unknown, unmet))
    if all(name is None for name in wanted):
        raise InputError(f"{mapping}: leaves out every class of the model; expected at least one that is scored")
    return [None if name is None else ids[name] for name in wanted]


def _read_mapping(path: Path, class_names: Sequence[str], ids: Mapping[str, int]) -> dict[str, str | None]:
    expected = 'a JSON object such as {"class of the model": "category of the annotations", "another": null}'
    content = load_json(path, expected)
    if not isinstance(content, dict) or not all(value is None or isinstance(value, str) for value in content.values()):
        raise InputError(f"{path}: not a mapping of class names; expected {expected}")
    if wrong := [name for name in content if name not in class_names]:
        raise InputError(f"{path}: the model has no class {wrong[0]!r}; it has {_list(class_names)}")
    if wrong := [name for name in content.values() if name is not None and name not in ids]:
        raise InputError(f"{path}: the annotations have no category {wrong[0]!r}; they have {_list(list(ids))}")
    return content


def _mismatch(class_names: Sequence[str], truth: Truth, unknown: Sequence[str], unmet: Sequence[str]) -> str:
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
