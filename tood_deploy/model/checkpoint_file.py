"""Read checkpoint files without ever running code from them.

A file in; its tensors under MMDetection 3.x names, and the metadata that came with them, out. First
its content is checked (`checkpoint_content`), then it is loaded, then one network of those in it is
chosen. Knows nothing of the network but one key. Layouts: reference/SPEC.md section 5.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tood_deploy.errors import CheckpointError
from tood_deploy.model.checkpoint_content import COPY_AGAIN, check_content
from tood_deploy.presets import Convention

LANDMARK = "backbone.conv1.weight"  # of every TOOD detector, behind whatever prefix
# Where MMDetection, the authors and our own training keep the weights to deploy.
USUAL_KEY = "state_dict"
MAX_DEPTH = 2  # of dictionaries in dictionaries that are searched for weights
OWN_KEY = "tood_deploy"  # under which our own files hold the preset, as JSON

# Parts of the authors' key names, and those of MMDetection 3.x in their place.
AUTHORS_NAMES = (
    ("_decomp.la_conv1.", "_decomp.layer_attention.0."),
    ("_decomp.la_conv2.", "_decomp.layer_attention.2."),
    ("bbox_head.cls_prob_conv1.", "bbox_head.cls_prob_module.0."),
    ("bbox_head.cls_prob_conv2.", "bbox_head.cls_prob_module.2."),
    ("bbox_head.reg_offset_conv1.", "bbox_head.reg_offset_module.0."),
    ("bbox_head.reg_offset_conv2.", "bbox_head.reg_offset_module.2."),
)

# Classes of metadata that training frameworks leave in their files. None of it is needed: an object
# of any of them is read as an empty one.
METADATA_CLASSES = (
    "builtins.getattr",  # mmengine's HistoryBuffer names its own methods by it
    "collections.defaultdict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
)


class Skipped(dict[object, object]):
    """An object of metadata whose class is not needed: takes what it is given, keeps nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


@dataclass(frozen=True)
class CheckpointFile:
    """The content of a file.

    Attributes:
        path: the file.
        state_dict: one network's tensors under MMDetection 3.x names.
        meta: the framework's metadata; empty where there is none.
        own_preset: JSON of the preset, in our own files.
        origin: whose key names the file has.
    """

    path: Path
    state_dict: dict[str, Tensor]
    meta: Mapping[str, object] = field(default_factory=dict)
    own_preset: str | None = None
    origin: Convention = "mmdet"


def read_checkpoint(path: Path, weights_key: str | None = None) -> CheckpointFile:
    """Read a checkpoint of MMDetection, of the authors, or of our own.

    Args:
        path: the file.
        weights_key: the weights to take where it holds several networks; see `choose_weights`.

    Raises:
        CheckpointError: no such file, no checkpoint, damaged, asks to run code, holds no weights,
            or those of several networks.
    """
    if check_content(path) == "safetensors":
        return _read_safetensors(path, weights_key)
    content = load_content(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}; expected a dictionary of weights"
        )
    tensors = choose_weights(content, path, weights_key)
    meta, own_preset = content.get("meta"), content.get(OWN_KEY)
    from_authors = any(old in key for key in tensors for old, _ in AUTHORS_NAMES)
    return CheckpointFile(
        path,
        dict(_canonical(tensors)),
        meta=meta if isinstance(meta, Mapping) else {},
        own_preset=own_preset if isinstance(own_preset, str) else None,
        origin="authors" if from_authors else "mmdet",
    )


def _read_safetensors(path: Path, weights_key: str | None) -> CheckpointFile:
    try:
        with safe_open(path, framework="pt") as file:
            own_preset = (file.metadata() or {}).get(OWN_KEY)
            keys = file.keys()
            tensors = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors, cut or not such a file ({error}); {COPY_AGAIN}"
        ) from error
    tensors = choose_weights(tensors, path, weights_key)
    return CheckpointFile(path, dict(_canonical(tensors)), own_preset=own_preset)


def load_content(path: Path) -> object:
    """Return what PyTorch stored in a file, without ever running code from it.

    Args:
        path: a file of which `check_content` says that PyTorch wrote it.

    Raises:
        CheckpointError: damaged, or asks to run code.
    """
    allowed: list[Callable[..., object] | tuple[Callable[..., object], str]]
    allowed = [(Skipped, name) for name in METADATA_CLASSES]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            # It precedes a failure, which says it below.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path}: {_load_problem(str(error), path)}") from error


def _load_problem(message: str, path: Path) -> str:
    """Return why PyTorch could not load a file.

    Its own message advises to run whatever the file holds, and is not passed on.
    """
    if refused := re.search(r"GLOBAL ([\w.]+)", message):
        return (
            f"refused, because loading it would run code of its own ({refused[1]}); expected "
            "weights and plain metadata only: save the state_dict alone where it comes from"
        )
    if "magic number" in message or "Unsupported operand" in message or "persistent" in message:
        return (
            "is no file that torch.save wrote, or a damaged one; "
            f"save the state_dict with torch.save, or {COPY_AGAIN}"
        )
    return f"cannot be read, cut or not a checkpoint ({path.stat().st_size:,} bytes); {COPY_AGAIN}"


def _canonical(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under MMDetection 3.x names.

    Wrappers' prefixes are taken off, and mmcv's copies of other weights left out.
    """
    for key, tensor in tensors.items():
        key = key.removeprefix("module.")
        if key.startswith("ema_"):
            continue  # mmcv 1.x: the raw weights, the main names hold the average
        for old, new in AUTHORS_NAMES:
            key = key.replace(old, new)
        yield key.replace("conv2_offset.", "conv2.conv_offset."), tensor


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
        """Return the names that a user may call them by, the full one first."""
        prefix = self.prefix.rstrip(".")
        full = ":".join(part for part in (self.key, prefix) if part)
        return tuple(dict.fromkeys(name for name in (full, self.key, prefix) if name))

    @property
    def words(self) -> set[str]:
        """Return the words in these names."""
        return set(re.split(r"[._:]", self.names[0])) if self.names else set()


def choose_weights(
    content: Mapping[object, object], path: Path, weights_key: str | None
) -> dict[str, Tensor]:
    """Return the tensors of one network.

    Args:
        content: of the file.
        path: the file, for errors.
        weights_key: a dictionary's key, a prefix, both as "key:prefix", or one word of them; None
            takes the only network, or the only one under "state_dict".

    Raises:
        CheckpointError: several networks and no key, a key that names none of them or several, or
            no weights at all.
    """
    candidates: list[Candidate] = []
    for key, tensors in _dictionaries(content):
        candidates += _candidates(key, tensors)
    if weights_key is not None:
        return _candidate_named(weights_key, candidates, path).tensors
    for key in (USUAL_KEY, ""):
        if at_key := [candidate for candidate in candidates if candidate.key == key]:
            candidates = at_key
            break
    if len(candidates) > 1:
        raise CheckpointError(
            f"{path}: holds the weights of {len(candidates)} networks; "
            f"say which with --weights-key (in Python, weights_key=): {_listed(candidates)}"
        )
    return candidates[0].tensors if candidates else _other_weights(content, path)


def _dictionaries(
    content: Mapping[object, object], key: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors of all dictionaries that hold some, each after its dotted key.

    Args:
        content: the dictionary to search.
        key: its own dotted key.
        depth: how many dictionaries it lies in.
    """
    if tensors := _tensors_of(content):
        yield key, tensors
    if depth < MAX_DEPTH:
        for name, value in content.items():
            if isinstance(value, Mapping):
                inner_key = f"{key}.{name}" if key else str(name)
                yield from _dictionaries(value, inner_key, depth + 1)


def _tensors_of(content: Mapping[object, object]) -> dict[str, Tensor]:
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _candidates(key: str, tensors: dict[str, Tensor]) -> Iterator[Candidate]:
    """Yield the networks in one dictionary, which differ in the prefix of their tensors' names."""
    prefixes = [
        name.removesuffix(LANDMARK)
        for name in tensors
        if name == LANDMARK or name.endswith(f".{LANDMARK}")
    ]
    for prefix in prefixes:
        # A prefix may begin another one, as "" does: tensors belong to the longest that fits.
        others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        names = [name for name in tensors if name.startswith(prefix)]
        own = [name for name in names if not (others and name.startswith(others))]
        yield Candidate(key, prefix, {name.removeprefix(prefix): tensors[name] for name in own})


def _candidate_named(weights_key: str, candidates: list[Candidate], path: Path) -> Candidate:
    """Return the one candidate of that name: of its full name, else any name, else a word.

    Args:
        weights_key: the user's.
        candidates: of the file.
        path: the file, for errors.
    """
    key = weights_key.rstrip(".")
    full = [candidate for candidate in candidates if key in candidate.names[:1]]
    short = [candidate for candidate in candidates if key in candidate.names]
    by_word = [candidate for candidate in candidates if weights_key in candidate.words]
    matching = full or short or by_word
    if len(matching) == 1:
        return matching[0]
    listed = _listed(matching or candidates)
    if not listed:
        raise CheckpointError(
            f"{path}: holds one network that has no name of its own, or none; "
            f"leave --weights-key {weights_key} out"
        )
    count = "several" if matching else "none"
    raise CheckpointError(
        f"{path}: --weights-key {weights_key} names {count} of the networks in it; "
        f"give one of {listed}"
    )


def _listed(candidates: list[Candidate]) -> str:
    """Return names of candidates, each the shortest that no other candidate has."""
    names = [candidate.names for candidate in candidates if candidate.names]
    taken = [name for options in names for name in options]
    return ", ".join(
        next((name for name in reversed(options) if taken.count(name) == 1), options[0])
        for options in names
    )


def _other_weights(content: Mapping[object, object], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that holds no TOOD detector, such as a backbone's."""
    weights = content.get(USUAL_KEY, content)
    tensors = _tensors_of(weights) if isinstance(weights, Mapping) else {}
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no weights, only {list_some(map(str, content))}; expected a state_dict"
        )
    return tensors


def list_some(names: Iterable[str], count: int = 4) -> str:
    """Return the first `count` names, and how many more there are, for a message."""
    listed = list(names)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more
