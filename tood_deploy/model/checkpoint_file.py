"""Reads checkpoint files without ever running code from them. Knows nothing of the network.

A file becomes its tensors under MMDetection 3.x names, and the metadata that came with them. Layouts: reference/SPEC.md section 5.
"""

import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tood_deploy.errors import CheckpointError
from tood_deploy.presets import Convention

Form = Literal["safetensors", "zip", "pickle"]

LANDMARK = "backbone.conv1.weight"  # of every TOOD detector, behind whatever prefix
USUAL = (
    "state_dict"  # where MMDetection, the authors and our own training keep the weights to deploy
)
DEEPEST = 2  # levels of dictionaries that are searched

HEAD_BYTES = 4096
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
COPY_AGAIN = "copy or download it again"
EXPECTED = "expected a checkpoint (.pth, .pt or .safetensors)"

# Starts of files that are something else, and what to do then.
OTHER_STARTS = (
    (b"\x1f\x8b", "is compressed by gzip; unpack it, and give the checkpoint inside"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive; unpack it, and give the checkpoint inside"),
    (b"Rar!", "is a RAR archive; unpack it, and give the checkpoint inside"),
    (b"\x89HDF\r\n\x1a\n", f"is an HDF5 file, as Keras writes; {EXPECTED}"),
    (b"\x93NUMPY", f"is a NumPy array; {EXPECTED}"),
    (b"%PDF", f"is a PDF document; {EXPECTED}"),
    (b"\x89PNG", f"is a PNG image; {EXPECTED}"),
    (b"\xff\xd8\xff", f"is a JPEG image; {EXPECTED}"),
)


def check_content(path: Path) -> Form:
    """Look at the first bytes of a file.

    Returns:
        In which form its weights are stored.

    Raises:
        CheckpointError: no file, or one that is no checkpoint; says what it is instead.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder{_checkpoints_in(path)}; {EXPECTED}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {EXPECTED}")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {EXPECTED}") from error
    if problem := _problem(head, path):
        raise CheckpointError(f"{path}: {problem}")
    return _form(head, path)


def _problem(head: bytes, path: Path) -> str:
    """Say what a file is that holds no weights by its start; "" where it may hold some."""
    if not head:
        return f"is empty; {COPY_AGAIN}"
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", head)
        real = f" to {int(size[1]):,} bytes" if size else ""
        return f"is a git-LFS pointer{real}, not the file itself; fetch that with: git lfs pull"
    for start, problem in OTHER_STARTS:
        if head.startswith(start):
            return problem
    if _looks_like_onnx(head):
        return "is an ONNX model, not a checkpoint; run it under a name ending in .onnx, or give the checkpoint it was made from"
    return _text_problem(head, path)


def _text_problem(head: bytes, path: Path) -> str:
    text = _as_text(head)
    if text is None:
        return ""
    if re.match(
        r"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body|meta)\b",
        text,
        re.IGNORECASE | re.DOTALL,
    ):
        title = re.search(r"<title[^>]*>([^<]+)", text, re.IGNORECASE)
        named = f" ({' '.join(title[1].split())[:60]!r})" if title else ""
        return f"is a web page{named}, as file-sharing sites send in place of a file; download the file itself, in a browser if need be"
    if path.suffix.lower() == ".py" or re.search(
        r"^(model|_base_|import|from|dataset_type)\b", text, re.MULTILINE
    ):
        return "is Python text, such as a training configuration, and holds no weights; give the checkpoint (.pth) that was trained with it"
    return f"is text, starting {' '.join(text.split())[:40]!r}; {EXPECTED}"


def _as_text(head: bytes) -> str | None:
    """Decode the start of a text; None where it is none. The last character may be cut."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return None
        text = head[: error.start].decode("utf-8-sig")
    printable = sum(character.isprintable() or character.isspace() for character in text)
    return text if text and printable == len(text) else None


def _looks_like_onnx(head: bytes) -> bool:
    """Tell the start of an ONNX model: field 1, the version of its form, then a text field or the graph."""
    return len(head) > 3 and head[0] == 0x08 and head[1] < 0x20 and head[2] in (0x12, 0x3A, 0x42)


def _form(head: bytes, path: Path) -> Form:
    named_safetensors = path.suffix.lower() == ".safetensors"
    if _looks_like_safetensors(head, path):
        if not named_safetensors:
            raise CheckpointError(
                f"{path}: is a safetensors file under another name; rename it to {path.with_suffix('.safetensors').name}"
            )
        return "safetensors"
    if head.startswith(b"PK"):
        _check_zip(path)
    elif named_safetensors:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors, cut or not such a file; {COPY_AGAIN}"
        )
    if named_safetensors:
        raise CheckpointError(
            f"{path}: is a PyTorch file under the name of safetensors; rename it to {path.with_suffix('.pth').name}"
        )
    return "zip" if head.startswith(b"PK") else "pickle"


def _looks_like_safetensors(head: bytes, path: Path) -> bool:
    """Tell the start of a safetensors file: the length of a JSON header, and that header."""
    if len(head) < 10 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return length < 1 << 27 and (head[9:10] in b'"} ' or path.suffix.lower() == ".safetensors")


def _check_zip(path: Path) -> None:
    """Raise CheckpointError where a zip is cut, or not one that PyTorch writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{path}: is cut or damaged: the end of it is missing ({path.stat().st_size:,} bytes); {COPY_AGAIN}"
        ) from error
    inside = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in inside:
        raise CheckpointError(
            f"{path}: is a TorchScript program, which can only be run as it is; give the checkpoint it was made from"
        )
    if "data.pkl" not in inside:
        few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise CheckpointError(
            f"{path}: is a zip archive of {len(names)} files ({few}), not a checkpoint; unpack it, and give the checkpoint inside"
        )


def _checkpoints_in(folder: Path) -> str:
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix.lower() in CHECKPOINT_SUFFIXES
    )
    return (
        f", which holds {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: give one of these"
        if names
        else ""
    )


OWN_KEY = "tood_deploy"  # under which our own files hold the preset, as JSON

AUTHORS_NAMES = (
    ("_decomp.la_conv1.", "_decomp.layer_attention.0."),
    ("_decomp.la_conv2.", "_decomp.layer_attention.2."),
    ("bbox_head.cls_prob_conv1.", "bbox_head.cls_prob_module.0."),
    ("bbox_head.cls_prob_conv2.", "bbox_head.cls_prob_module.2."),
    ("bbox_head.reg_offset_conv1.", "bbox_head.reg_offset_module.0."),
    ("bbox_head.reg_offset_conv2.", "bbox_head.reg_offset_module.2."),
)

# Metadata classes that training frameworks leave in their files. None of it is needed: each is read as an empty object.
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


class Skipped(dict[Any, Any]):
    """Stands in for a metadata object whose class is not needed; takes whatever the file says of it and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


@dataclass(frozen=True)
class CheckpointFile:
    """What a file holds.

    Attributes:
        path: the file.
        state_dict: tensors under MMDetection 3.x names.
        meta: the framework's metadata; empty where there is none.
        own_preset: JSON of the preset, in our own files.
        origin: whose key names the file has.
    """

    path: Path
    state_dict: dict[str, Tensor]
    meta: Mapping[str, Any] = field(default_factory=dict)
    own_preset: str | None = None
    origin: Convention = "mmdet"


def read_checkpoint(path: Path, weights_key: str | None = None) -> CheckpointFile:
    """Read a checkpoint of MMDetection, of the authors, or of our own.

    Args:
        path: the file.
        weights_key: which weights to take where it holds several; see `choose_weights`.

    Raises:
        CheckpointError: no such file, no checkpoint, damaged, asks to run code, holds no weights, or those of several networks.
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
    return CheckpointFile(
        path,
        dict(_canonical(tensors)),
        meta if isinstance(meta, Mapping) else {},
        own_preset if isinstance(own_preset, str) else None,
        "authors" if any(old in key for key in tensors for old, _ in AUTHORS_NAMES) else "mmdet",
    )


def _read_safetensors(path: Path, weights_key: str | None) -> CheckpointFile:
    try:
        with safe_open(path, framework="pt") as file:
            own_preset = (file.metadata() or {}).get(OWN_KEY)
            tensors = {
                key: file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 - not a dictionary
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors, cut or not such a file ({error}); {COPY_AGAIN}"
        ) from error
    return CheckpointFile(
        path, dict(_canonical(choose_weights(tensors, path, weights_key))), own_preset=own_preset
    )


def load_content(path: Path) -> Any:
    """Return what PyTorch stored in a file that `check_content` takes for its own, without ever running code from it.

    Raises:
        CheckpointError: damaged, or asks to run code.
    """
    allowed: list[Any] = [(Skipped, name) for name in METADATA_CLASSES]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Detected pickle protocol", UserWarning
            )  # said below where it fails
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path}: {_reason(str(error), path)}") from error


def _reason(message: str, path: Path) -> str:
    """Say why PyTorch could not load a file; its own words advise to run whatever the file holds."""
    if refused := re.search(r"GLOBAL ([\w.]+)", message):
        return (
            f"refused, because loading it would run code of its own ({refused[1]}); "
            "expected weights and plain metadata only: save the state_dict alone in the environment that it comes from"
        )
    if "magic number" in message or "Unsupported operand" in message or "persistent" in message:
        return "is no file that torch.save wrote, or a damaged one; save the state_dict with torch.save, or copy or download it again"
    return f"cannot be read, cut or not a checkpoint ({path.stat().st_size:,} bytes); {COPY_AGAIN}"


def _canonical(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Go through the tensors under MMDetection 3.x names, without wrappers' prefixes and mmcv's averaged copies."""
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
        """What a user may call them, the full name first."""
        prefix = self.prefix.rstrip(".")
        full = ":".join(part for part in (self.key, prefix) if part)
        return tuple(dict.fromkeys(name for name in (full, self.key, prefix) if name))

    @property
    def words(self) -> set[str]:
        """The words in these names."""
        return set(re.split(r"[._:]", self.names[0])) if self.names else set()


def choose_weights(
    content: Mapping[Any, Any], path: Path, weights_key: str | None
) -> dict[str, Tensor]:
    """Return the tensors of one network.

    Args:
        content: what the file holds.
        path: the file, for errors.
        weights_key: a dictionary's key, a prefix, both as "key:prefix", or one word of them; None takes the only network,
            or that under "state_dict".

    Raises:
        CheckpointError: several networks and no key, a key that names none of them or several, or no weights at all.
    """
    candidates = [
        candidate
        for key, tensors in _dictionaries(content)
        for candidate in _candidates(key, tensors)
    ]
    if weights_key is not None:
        return _named(candidates, path, weights_key).tensors
    usual = next(
        (
            group
            for key in (USUAL, "")
            if (group := [each for each in candidates if each.key == key])
        ),
        candidates,
    )
    if len(usual) > 1:
        raise CheckpointError(
            f"{path}: holds the weights of {len(usual)} networks; say which with --weights-key (in Python, weights_key=): {_listed(usual)}"
        )
    return usual[0].tensors if usual else _other_weights(content, path)


def _dictionaries(
    content: Mapping[Any, Any], key: str = "", depth: int = 0
) -> list[tuple[str, dict[str, Tensor]]]:
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
    prefixes = [
        name.removesuffix(LANDMARK)
        for name in tensors
        if name == LANDMARK or name.endswith(f".{LANDMARK}")
    ]
    candidates = []
    for prefix in prefixes:
        others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        own = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        if others:
            own = {
                name: value
                for name, value in own.items()
                if not f"{prefix}{name}".startswith(others)
            }
        candidates.append(Candidate(key, prefix, own))
    return candidates


def _named(candidates: list[Candidate], path: Path, weights_key: str) -> Candidate:
    wanted = weights_key.rstrip(".")
    exact = [each for each in candidates if wanted in each.names[:1]] or [
        each for each in candidates if wanted in each.names
    ]
    matching = exact or [candidate for candidate in candidates if weights_key in candidate.words]
    if len(matching) == 1:
        return matching[0]
    listed = _listed(matching or candidates)
    if not listed:
        raise CheckpointError(
            f"{path}: holds one network that has no name of its own, or none; leave --weights-key {weights_key} out"
        )
    count = "several" if matching else "none"
    raise CheckpointError(
        f"{path}: --weights-key {weights_key} names {count} of the networks in it; give one of {listed}"
    )


def _listed(candidates: list[Candidate]) -> str:
    """Name candidates as shortly as tells them apart."""
    names = [each.names for each in candidates if each.names]
    taken = [name for options in names for name in options]
    return ", ".join(
        next((name for name in reversed(options) if taken.count(name) == 1), options[0])
        for options in names
    )


def _other_weights(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of what is no TOOD detector, such as a backbone's."""
    weights = content.get(USUAL, content)
    tensors = (
        {str(k): v for k, v in weights.items() if isinstance(v, Tensor)}
        if isinstance(weights, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no weights, only {few(map(str, content))}; expected a state_dict"
        )
    return tensors


def few(names: Iterable[str], most: int = 4) -> str:
    """List the first of some names, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:most]) + (
        f" and {len(listed) - most} more" if len(listed) > most else ""
    )
