"""Make a model's folder in a Triton model repository, whole or not at all.

Comes in: a repository and a model's name. Goes out: a folder to fill, which becomes the model's, or
its next version without disturbing a server. Knows nothing of what the files hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from tood_deploy.errors import OutputError
from tood_deploy.export.triton.config import OURS, read_config
from tood_deploy.files import remove_leftovers, temporary_folder

CONFIG_FILE = "config.pbtxt"


FIRST_VERSION = "1"


def next_version(repository: Path, config: Any) -> int:
    """Return the version that a model of this configuration gets in a repository.

    Raises:
        OutputError: the folder holds something else than a model repository, the model is not of
            tood-export, or its clients would break.
    """
    folder, present = repository / config.name, read_present(repository, config.name)
    if present is None:
        return int(FIRST_VERSION)
    if differing := [
        part
        for part in ("backend", "input", "output")
        if getattr(present, part) != getattr(config, part)
    ]:
        raise OutputError(
            f"{folder}: the model there has another {differing[0]}; give another --name, or "
            "delete the folder"
        )
    if present.parameters["class_names"] != config.parameters["class_names"]:
        raise OutputError(
            f"{folder}: the model there has other classes, which its clients count on; give "
            "another --name, or delete the folder"
        )
    return 1 + max(
        (int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0
    )


def read_present(repository: Path, name: str) -> Any:
    """Return the configuration of a model in a repository; None where there is none yet.

    Raises:
        OutputError: the folder holds something else than a model repository, or the model is not of
            tood-export.
    """
    if repository.exists() and not repository.is_dir():
        raise OutputError(f"{repository}: is a file; expected a folder, the model repository")
    if repository.is_dir():
        remove_leftovers(repository)  # else what a killed export left would be taken for files
    if (
        repository.is_dir()
        and any(repository.iterdir())
        and not any(repository.glob(f"*/{CONFIG_FILE}"))
    ):
        raise OutputError(
            f"{repository}: holds files, but no model with a {CONFIG_FILE}; give a new folder or "
            "a Triton model repository"
        )
    folder = repository / name
    return _read_ours(folder) if folder.exists() else None


def _read_ours(folder: Path) -> Any:
    try:
        config = read_config((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        reason = str(error).splitlines()[0]
        raise OutputError(
            f"{folder}: holds no {CONFIG_FILE} that can be read ({reason}); give another --name, "
            "or delete the folder"
        ) from error
    if OURS not in config.parameters:
        raise OutputError(
            f"{folder}: the model there was not written by tood-export; give another --name, or "
            "delete the folder"
        )
    return config


@contextmanager
def new_model_folder(folder: Path, version: int) -> Iterator[Path]:
    """Give a model's folder to fill; it becomes `folder`, or part of it, if the block succeeds.

    The files of its version go into `FIRST_VERSION`.

    Raises:
        OutputError: the place cannot be written, or the disk is full; nothing is left behind.
    """
    parent = folder if folder.exists() else folder.parent
    with temporary_folder(folder, parent) as staging:
        new = (
            staging / folder.name
        )  # unlike its parent readable for all: the server may be another user
        (new / FIRST_VERSION).mkdir(parents=True)
        yield new
        if folder.exists():
            _add_version(new, folder, version)
        else:
            new.rename(folder)


def _add_version(new: Path, folder: Path, version: int) -> None:
    """Move files in, the configuration last: it names the others."""
    (new / FIRST_VERSION).rename(folder / str(version))
    files = [path for path in new.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == CONFIG_FILE):
        place = folder / path.relative_to(new)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
