"""Score thresholds: one for all classes, one for each class, and classes that are left out.

What a user gives comes in (a number, text, a mapping, a JSON file); the score that detections of
each class must exceed goes out. The one home of the file's format, which `tood-eval` writes. Knows
no detector.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.coco import load_json
from tood_deploy.errors import InputError, ToodError

DEFAULT_CONF = 0.3
EXPECTED = (
    "a number from 0 to 1, such as 0.3, with thresholds of classes after it, such as "
    "0.3,person=0.5,car=0.2, or a JSON file of them"
)
EXPECTED_FILE = '{"default": 0.3, "classes": {"person": 0.5}}'


@dataclass(frozen=True)
class ClassThresholds:
    """Scores that detections must exceed.

    Attributes:
        default: of classes that are not named, 0 to 1.
        classes: by class name, 0 to 1.
    """

    default: float = DEFAULT_CONF
    classes: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("conf", self.default), *self.classes.items()):
            if not 0 <= value <= 1:
                of_class = "" if name == "conf" else f"conf of {name!r} is "
                raise ToodError(f"{of_class or 'conf is '}{value}; expected a number from 0 to 1")

    def by_class(self, class_names: Sequence[str]) -> NDArray[np.float32]:
        """Return (K,) the threshold of every class.

        Raises:
            ToodError: a class that the model does not have.
        """
        check_classes(list(self.classes), class_names, "conf")
        values = [self.classes.get(name, self.default) for name in class_names]
        return np.array(values, np.float32)

    def values(self) -> dict[str, object]:
        """Return what a file of thresholds holds of it."""
        return asdict(self)

    def __str__(self) -> str:
        named = [f"{name}={value:g}" for name, value in self.classes.items()]
        return ",".join([f"{self.default:g}", *named])


Conf = float | str | PathLike[str] | Mapping[str, float] | ClassThresholds


def thresholds_from(conf: Conf) -> ClassThresholds:
    """Return the thresholds that a user gives.

    Args:
        conf: a number for all classes; text such as "0.3,person=0.5"; a mapping of class names,
            with 0.3 for the others; a JSON file.

    Raises:
        InputError: the file cannot be read or is none of thresholds.
        ToodError: a value outside 0 to 1, or text that is none of these.
    """
    if isinstance(conf, ClassThresholds):
        return conf
    if isinstance(conf, Mapping):
        return ClassThresholds(classes=dict(conf))
    if isinstance(conf, int | float | np.number):
        return ClassThresholds(float(conf))
    text = str(conf)
    if isinstance(conf, PathLike) or Path(text).suffix.lower() == ".json":
        return read_thresholds(Path(text))
    return _parse(text)


def _parse(text: str) -> ClassThresholds:
    """Return thresholds from text such as 0.3,person=0.5."""
    default: float | None = None
    classes: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            raise ToodError(f"conf has {part.strip()!r}; expected {EXPECTED}") from None
        name = name.strip()
        if name in classes or (not name and default is not None):
            raise ToodError(f"conf is {text!r}: {name or 'the number for all'} stands twice")
        if name:
            classes[name] = number
        else:
            default = number
    return ClassThresholds(DEFAULT_CONF if default is None else default, classes)


def read_thresholds(path: Path) -> ClassThresholds:
    """Read a file of thresholds, such as `tood-eval` writes; other keys of it are for people.

    Raises:
        InputError: it cannot be read, or does not hold thresholds.
    """
    expected = f"a JSON object of thresholds such as {EXPECTED_FILE}"
    content = load_json(path, expected)
    classes = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(classes, dict):
        raise InputError(f"{path}: no thresholds in it; expected {expected}")
    values = {"default": content.get("default", DEFAULT_CONF), **classes}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path}: the threshold of {name!r} is {value!r}; expected {expected}")
    try:
        return ClassThresholds(float(values["default"]), {k: float(v) for k, v in classes.items()})
    except ToodError as error:
        raise InputError(f"{path}: {error}") from error


def check_classes(names: Sequence[str], class_names: Sequence[str], what: str) -> None:
    """Raise ToodError where a name is no class of the model; the nearest name is offered.

    Args:
        names: as the user gave them.
        class_names: of the model.
        what: they were given as.
    """
    for name in names:
        if name not in class_names:
            near = difflib.get_close_matches(name, class_names, 1, 0.5)
            shown = ", ".join(class_names[:5]) + (", ..." if len(class_names) > 5 else "")
            cure = f"did you mean {near[0]!r}?" if near else f"it has {shown}"
            raise ToodError(
                f"{what} names the class {name!r}, which the model does not have; {cure}"
            )


def class_scores(
    thresholds: ClassThresholds,
    class_names: Sequence[str],
    only: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> NDArray[np.float32] | None:
    """Return (K,) the score that each class must exceed, infinite for classes that are left out.

    None where one number serves all.

    Args:
        thresholds: of the classes.
        class_names: of the model.
        only: names of the classes to keep.
        exclude: names of the classes to leave out.

    Raises:
        ToodError: a class that the model does not have, or no class is left.
    """
    scores = thresholds.by_class(class_names)
    if only is not None and exclude is not None:
        raise ToodError("classes to keep and classes to leave out are given; expected one of them")
    check_classes(only or (), class_names, "only")
    check_classes(exclude or (), class_names, "except")
    left_out = [
        (only is not None and name not in only) or (exclude is not None and name in exclude)
        for name in class_names
    ]
    if all(left_out):
        raise ToodError("no class of the model is left; expected at least one to detect")
    if not thresholds.classes and not any(left_out):
        return None
    return np.where(left_out, np.float32(np.inf), scores)
