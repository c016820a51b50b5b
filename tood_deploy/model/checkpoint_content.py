"""What a file is by its first bytes, whatever its name, before it is read as a checkpoint.

Comes in: a path. Goes out: the format of the checkpoint in it, or an error that says what the file
is instead. Loads nothing.
"""

import re
import struct
import zipfile
from pathlib import Path
from typing import Literal

from tood_deploy.errors import CheckpointError

FileFormat = Literal["safetensors", "zip", "pickle"]

HEAD_BYTES = 4096
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
COPY_AGAIN = "copy or download it again"
EXPECTED = "expected a checkpoint (.pth, .pt or .safetensors)"

# First bytes of files that are something else, and what to do then.
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


def check_content(path: Path) -> FileFormat:
    """Return the format of a file by its first bytes.

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
    return _file_format(head, path)


def _problem(head: bytes, path: Path) -> str:
    """Return what a file is that, by its first bytes, holds no weights; "" where it may."""
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
        return (
            "is an ONNX model, not a checkpoint; run it under a name ending in .onnx, "
            "or give the checkpoint it was made from"
        )
    text = _as_text(head)
    return "" if text is None else _text_problem(text, path)


def _text_problem(text: str, path: Path) -> str:
    """Return what a text is."""
    page = r"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body|meta)\b"
    if re.match(page, text, re.IGNORECASE | re.DOTALL):
        title = re.search(r"<title[^>]*>([^<]+)", text, re.IGNORECASE)
        named = f" ({' '.join(title[1].split())[:60]!r})" if title else ""
        return (
            f"is a web page{named}, as file-sharing sites send in place of a file; "
            "download the file itself, in a browser if need be"
        )
    python = r"^(model|_base_|import|from|dataset_type)\b"
    if path.suffix.lower() == ".py" or re.search(python, text, re.MULTILINE):
        return (
            "is Python text, such as a training configuration, and holds no weights; "
            "give the checkpoint (.pth) that was trained with it"
        )
    return f"is text, starting {' '.join(text.split())[:40]!r}; {EXPECTED}"


def _as_text(head: bytes) -> str | None:
    """Decode the start of a text, whose last character may be cut; None where it is no text."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return None
        text = head[: error.start].decode("utf-8-sig")
    printable = all(character.isprintable() or character.isspace() for character in text)
    return text if text and printable else None


def _looks_like_onnx(head: bytes) -> bool:
    """Return whether these are the first bytes of an ONNX model.

    That is field 1, the version of its format, and then a text field or the graph.
    """
    return len(head) > 3 and head[0] == 0x08 and head[1] < 0x20 and head[2] in (0x12, 0x3A, 0x42)


def _file_format(head: bytes, path: Path) -> FileFormat:
    named_safetensors = path.suffix.lower() == ".safetensors"
    if _looks_like_safetensors(head, path):
        if not named_safetensors:
            name = path.with_suffix(".safetensors").name
            raise CheckpointError(
                f"{path}: is a safetensors file under another name; rename it to {name}"
            )
        return "safetensors"
    if head.startswith(b"PK"):
        _check_zip(path)
    elif named_safetensors:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors, cut or not such a file; {COPY_AGAIN}"
        )
    if named_safetensors:
        name = path.with_suffix(".pth").name
        raise CheckpointError(
            f"{path}: is a PyTorch file under the name of safetensors; rename it to {name}"
        )
    return "zip" if head.startswith(b"PK") else "pickle"


def _looks_like_safetensors(head: bytes, path: Path) -> bool:
    """Return whether a file starts with the length of a JSON header, and that header."""
    if len(head) < 10 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return length < 1 << 27 and (head[9:10] in b'"} ' or path.suffix.lower() == ".safetensors")


def _check_zip(path: Path) -> None:
    """Raise CheckpointError where a zip is cut, or not one that PyTorch writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        size = f"{path.stat().st_size:,} bytes"
        raise CheckpointError(
            f"{path}: is cut or damaged: the end of it is missing ({size}); {COPY_AGAIN}"
        ) from error
    names = [member.filename for member in members]
    inside = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in inside:
        raise CheckpointError(
            f"{path}: is a TorchScript program, which can only be run as it is; "
            "give the checkpoint it was made from"
        )
    if "data.pkl" not in inside:
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise CheckpointError(
            f"{path}: is a zip archive of {len(names)} files ({listed}), not a checkpoint; "
            "unpack it, and give the checkpoint inside"
        )
    _check_members(members, path)


def _check_members(members: list[zipfile.ZipInfo], path: Path) -> None:
    """Refuse what would grow when it is read: PyTorch stores everything as it is.

    Raises:
        CheckpointError: a member is compressed, or all of them are larger than the file.
    """
    size, stored = path.stat().st_size, sum(member.file_size for member in members)
    compressed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    if not compressed and stored <= size:
        return
    name = compressed[0].filename if compressed else "its content"
    raise CheckpointError(
        f"{path}: holds {name} compressed or overlapping, {stored:,} bytes in a file of {size:,}, "
        "which PyTorch never writes; load it where it comes from, and save the state_dict again"
    )


def _checkpoints_in(folder: Path) -> str:
    """Name some checkpoints in a folder, as a part of a message; "" where there are none."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in CHECKPOINT_SUFFIXES]
    names = sorted(path.name for path in files)
    if not names:
        return ""
    more = ", ..." if len(names) > 3 else ""
    return f", which holds {', '.join(names[:3])}{more}: give one of these"
