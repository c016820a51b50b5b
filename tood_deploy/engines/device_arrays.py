"""Arrays of other libraries, on the CPU or on a GPU, read where they lie: DLPack and `__cuda_array_interface__`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tood_deploy.errors import DeviceError, InputError
from tood_deploy.extras import naming_extras

_DLPACK_CPU = 1  # kDLCPU of DLPack's device types
_UNREADABLE = (BufferError, NotImplementedError, RuntimeError, TypeError, ValueError)  # what exporters raise when they refuse


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A contiguous array in a GPU's memory; answers to the same names as a NumPy array where shape and type are checked.

    Attributes:
        address: of its first byte.
        shape: as in NumPy.
        dtype: as in NumPy.
        owner: keeps the memory alive.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]


def view_array(value: Any, name: str, *, gpu: int, stream: int) -> NDArray[Any] | DeviceArray:
    """A view of an array, without a copy.

    Args:
        value: a NumPy array, or anything with DLPack or `__cuda_array_interface__`.
        name: of the input, for errors.
        gpu: the GPU that the engine runs on, in whose context this is called.
        stream: the stream that will read it; waits for what its producer has still to write.

    Raises:
        InputError: it is no such array, lies on another GPU, or on the GPU with gaps.
    """
    if isinstance(value, np.ndarray):
        return value
    on_cpu = hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] == _DLPACK_CPU
    try:
        if on_cpu:
            return np.from_dlpack(value)
        view = _memory_view().from_any_interface(value, stream)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name}: a {type(value).__name__} cannot be read ({reason}); "
            "expected a NumPy array, or one with DLPack or __cuda_array_interface__"
        ) from error
    if view.device_id != gpu:
        raise InputError(f"{name}: lies on GPU {view.device_id}, the engine runs on GPU {gpu}; copy it there first")
    shape = tuple(view.shape)
    if view.strides is not None and not _is_contiguous(shape, tuple(view.strides)):
        raise InputError(
            f"{name}: strides {tuple(view.strides)} for shape {shape} on the GPU; expected rows without gaps, as contiguous() makes them"
        )
    return DeviceArray(view.ptr, shape, np.dtype(view.dtype), view)


def _memory_view() -> Any:
    """The class of cuda-core that reads both protocols; most users give NumPy arrays and need not have it."""
    try:
        with naming_extras():
            from cuda.core.utils import StridedMemoryView  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DeviceError(f"cuda-core is installed but does not load ({error}); reinstall the package cuda-core") from error
    return StridedMemoryView


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides, in values, are those of C order; axes of length 1 may have any."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
