"""Arrays that claim to lie on a GPU, offered in both ways that libraries offer them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

CUDA, CPU = 2, 1
CODES = {"i": 0, "u": 1, "f": 2}


class DLDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class DlpackArray:
    """An array of a library that speaks DLPack.

    Attributes:
        streams: for which streams it was asked.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: Any,
        *,
        strides: tuple[int, ...] | None = None,
        gpu: int = 0,
    ) -> None:
        kind = np.dtype(dtype)
        integers = ctypes.c_int64 * len(shape)
        self._shape, self._strides = integers(*shape), integers(*strides) if strides else None
        pointer = (
            ctypes.cast(self._strides, ctypes.POINTER(ctypes.c_int64)) if self._strides else None
        )
        data_type = DLDataType(CODES[kind.kind], 8 * kind.itemsize, 1)
        tensor = DLTensor(
            address, DLDevice(CUDA, gpu), len(shape), data_type, self._shape, pointer, 0
        )
        self._managed = DLManagedTensor(tensor, None, None)
        self._gpu = gpu
        self.streams: list[int | None] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._gpu

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return new(ctypes.addressof(self._managed), b"dltensor", None)
