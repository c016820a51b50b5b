"""Say what an error means for a row.

It is not installed, refused by the runtime or the GPU, or a fault of ours that makes the run fail.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.gpu.settings import Row, Status
from benchmarks.gpu.torch_variants import is_out_of_memory
from tood_deploy.errors import ArtefactError, DeviceError

MAX_NOTE = 400


@contextmanager
def row_errors(row: Row) -> Iterator[None]:
    """Run a block whose errors go into the row, so that the run goes on."""
    try:
        yield
    except Exception as error:
        row.status, row.note = status_of(error), note_of(error)
        error.__traceback__ = None  # it keeps memory that is to be freed
        gc.collect()


def status_of(error: Exception) -> Status:
    """Return the status of a row by its error.

    A runtime may be absent, or refuse a GPU, a file or a size; all else is a fault.
    """
    if isinstance(error, ImportError):
        return "absent"
    if isinstance(error, DeviceError | ArtefactError) or is_out_of_memory(error):
        return "refused"
    return "failed"


def note_of(error: Exception) -> str:
    """Return an error's message in one line, after its type where it is not written for users."""
    text = " ".join(str(error).split())
    ours = isinstance(error, DeviceError | ArtefactError)
    return (text if ours else f"{type(error).__name__}: {text}")[:MAX_NOTE]
