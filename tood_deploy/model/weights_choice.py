"""Which of the networks in a checkpoint file is meant: the one asked for, else the only one there is."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from tood_deploy.errors import CheckpointError

LANDMARK = "backbone.conv1.weight"  # of every TOOD detector, behind whatever prefix
USUAL = "state_dict"  # where MMDetection, the authors and our own training keep the weights to deploy
DEEPEST = 2  # levels of dictionaries that are searched


class Candidate(NamedTuple):
    """The weights of one network in a file.

    Attributes:
        key: of the dictionary that holds them, with dots; "" for the file itself.
        prefix: of their names in it, with its final dot.
        tensors: under their names without the prefix.
    """

    key: str
    prefix: str
    tensors: dict[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """What a user may call them, the full name first."""
        prefix = self.prefix.rstrip(".")
        full = ":".join(part for part in (self.key, prefix) if part)
        return tuple(dict.fromkeys(name for name in (full, self.key, prefix) if name))

    @property
    def words(self) -> set[str]:
        """The words in these names."""
        return set(re.split(r"[._:]", self.names[0])) if self.names else set()


def choose_weights(content: Mapping[Any, Any], path: Path, weights_key: str | None) -> dict[str, Tensor]:
    """Return the tensors of one network.

    Args:
        content: what the file holds.
        path: the file, for errors.
        weights_key: a dictionary's key, a prefix, both as "key:prefix", or one word of them; None takes the only network,
            or that under "state_dict".

    Raises:
        CheckpointError: several networks and no key, a key that names none of them or several, or no weights at all.
    """
    candidates = [candidate for key, tensors in _dictionaries(content) for candidate in _candidates(key, tensors)]
    if weights_key is not None:
        return _named(candidates, path, weights_key).tensors
    usual = next((group for key in (USUAL, "") if (group := [each for each in candidates if each.key == key])), candidates)
    if len(usual) > 1:
        raise CheckpointError(
            f"{path}: holds the weights of {len(usual)} networks; say which with --weights-key (in Python, weights_key=): {_listed(usual)}"
        )
    return usual[0].tensors if usual else _other_weights(content, path)


def _dictionaries(content: Mapping[Any, Any], key: str = "", depth: int = 0) -> list[tuple[str, dict[str, Tensor]]]:
    """List all dictionaries that hold tensors, by dotted key."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    found = [(key, tensors)] if tensors else []
    if depth < DEEPEST:
        for name, value in content.items():
            if isinstance(value, Mapping):
                found += _dictionaries(value, f"{key}.{name}" if key else str(name), depth + 1)
    return found


def _candidates(key: str, tensors: dict[str, Tensor]) -> list[Candidate]:
    """List the networks in one dictionary, told apart by their prefixes."""
    prefixes = [name.removesuffix(LANDMARK) for name in tensors if name == LANDMARK or name.endswith(f".{LANDMARK}")]
    candidates = []
    for prefix in prefixes:
        others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if others:
            own = {name: value for name, value in own.items() if not f"{prefix}{name}".startswith(others)}
        candidates.append(Candidate(key, prefix, own))
    return candidates


def _named(candidates: list[Candidate], path: Path, weights_key: str) -> Candidate:
    wanted = weights_key.rstrip(".")
    exact = [each for each in candidates if wanted in each.names[:1]] or [each for each in candidates if wanted in each.names]
    matching = exact or [candidate for candidate in candidates if weights_key in candidate.words]
    if len(matching) == 1:
        return matching[0]
    listed = _listed(matching or candidates)
    if not listed:
        raise CheckpointError(f"{path}: holds one network that has no name of its own, or none; leave --weights-key {weights_key} out")
    count = "several" if matching else "none"
    raise CheckpointError(f"{path}: --weights-key {weights_key} names {count} of the networks in it; give one of {listed}")


def _listed(candidates: list[Candidate]) -> str:
    """Name candidates as shortly as tells them apart."""
    names = [each.names for each in candidates if each.names]
    taken = [name for options in names for name in options]
    return ", ".join(next((name for name in reversed(options) if taken.count(name) == 1), options[0]) for options in names)


def _other_weights(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of what is no TOOD detector, such as a backbone's."""
    weights = content.get(USUAL, content)
    tensors = {str(k): v for k, v in weights.items() if isinstance(v, Tensor)} if isinstance(weights, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no weights, only {few(map(str, content))}; expected a state_dict")
    return tensors


def few(names: Iterable[str], most: int = 4) -> str:
    """List the first of some names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
