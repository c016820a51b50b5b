"""Files that a command reads beside its data: class names, and what a model is made of.

Comes in: arguments as text. Goes out: names, and refusals to write over what is read.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from tood_deploy.errors import ToodError
from tood_deploy.files import absent_or, check_overwrites
from tood_deploy.graph_io import ARTEFACT_SUFFIXES

SHOWN_LETTERS = 80  # of a long argument, in errors


def class_names_from(text: str | None) -> list[str] | None:
    """Return the names of --classes; None where not given.

    Args:
        text: names separated by commas, or a text file with one name a line.

    Raises:
        ToodError: names are empty or stand twice.
    """
    if text is None:
        return None
    path = Path(text)
    parts = _lines_of(path) if absent_or(path.is_file) else text.split(",")
    names = [part.strip() for part in parts if part.strip()]
    if not names or len(set(names)) != len(names):
        shown = text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."
        raise ToodError(
            f"--classes {shown}: {len(names)} names, {len(set(names))} different; expected one "
            "different name for each class"
        )
    return names


def _lines_of(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8, with or without a byte-order mark.

    Raises:
        ToodError: it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ToodError(
            f"--classes {path}: not in UTF-8 ({error.reason} at byte {error.start}); expected text "
            "with one name a line: save it in UTF-8"
        ) from error
    except OSError as error:
        raise ToodError(
            f"--classes {path}: cannot be read ({error.strerror}); expected text with one name a "
            "line"
        ) from error


def check_written(
    classes: str | None,
    written: Iterable[Path],
    inputs: Mapping[str, Iterable[str | Path | None]] | None = None,
) -> None:
    """Refuse to write over a file that the command reads.

    Args:
        classes: what --classes was given.
        written: files that the command writes.
        inputs: files that it reads, by what they are; None where not given.

    Raises:
        OutputError: it would.
    """
    read = {what: [path for path in paths if path] for what, paths in (inputs or {}).items()}
    named = [classes] if classes and absent_or(Path(classes).is_file) else []
    check_overwrites({**read, "the file of --classes": named}, {"--output": list(written)})


def model_files(model: str, classes: str | None = None) -> list[Path]:
    """Return the files that a command reads to open a model; none where it names a preset.

    Args:
        model: as given to the command.
        classes: what --classes was given.
    """
    path = Path(model)
    files = [path]
    if path.suffix.lower() in ARTEFACT_SUFFIXES:  # OpenVINO has a file of weights
        files += [path.with_suffix(".json"), path.with_suffix(".bin"), Path(f"{path}.data")]
    if classes is not None:
        files.append(Path(classes))
    return [file for file in files if absent_or(file.is_file)]
