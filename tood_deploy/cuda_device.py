"""One NVIDIA GPU through the CUDA driver: whether it is there, whether the driver is new enough, its context for the calling thread.

All that talks to CUDA does so through `call`, which turns a status into an error. Knows no TensorRT and no arrays.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tood_deploy.errors import DeviceError
from tood_deploy.extras import naming_extras

try:
    with naming_extras():
        bindings_version: str = importlib.import_module("cuda.bindings").__version__
        driver: Any = importlib.import_module("cuda.bindings.driver")
except ImportError as error:
    raise DeviceError(f"cuda-bindings is installed but does not load ({error}); reinstall the package cuda-bindings") from error


class CudaError(DeviceError):
    """A call to the CUDA driver that failed."""


class OutOfDeviceMemory(CudaError):  # noqa: N818 - what is out, not that it is an error
    """An allocation that found no room, on the GPU or in pinned host memory."""


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Calls a function of the CUDA driver.

    Returns:
        What it gives beside its status: an empty tuple, a value, or a tuple of values.

    Raises:
        OutOfDeviceMemory: CUDA has no memory left.
        CudaError: any other status but success.
    """
    status, *values = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        kind = OutOfDeviceMemory if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY else CudaError
        raise kind(f"{function.__name__} failed with {_describe(status)}; look at nvidia-smi, and start the program again")
    return values[0] if len(values) == 1 else tuple(values)


def release(function: Callable[..., tuple[Any, ...]], handle: Any) -> None:
    """Gives something back to CUDA.

    Its status is not looked at: giving back fails only where an earlier call failed, which raised, and broke the context for good.
    """
    function(handle)


def _describe(status: Any) -> str:
    _, text = driver.cuGetErrorString(status)
    return f"{status.name}, {text.decode() if text else 'no description'}"


def check_driver() -> None:
    """Raises DeviceError unless there is a GPU, and a driver that is new enough for the CUDA bindings."""
    try:
        status, *_ = driver.cuInit(0)
    except RuntimeError as error:  # libcuda was not found
        raise DeviceError("no NVIDIA driver found; run this on a machine with an NVIDIA GPU, and install its driver") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"no NVIDIA GPU that CUDA can use ({status.name}); look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    version = call(driver.cuDriverGetVersion)
    needed = int(bindings_version.split(".")[0])
    if version // 1000 < needed:
        raise DeviceError(
            f"the NVIDIA driver runs CUDA up to {version // 1000}.{version % 1000 // 10}, "
            f"cuda-bindings {bindings_version} needs one for CUDA {needed}.0; "
            f"update the driver, or install cuda-bindings and TensorRT for CUDA {version // 1000}"
        )


class Gpu:
    """A GPU and its primary context, which every CUDA library in the process shares.

    Attributes:
        ordinal: which of the visible GPUs.
        name: what the driver calls it.
        compute_capability: such as "8.9".
    """

    def __init__(self, ordinal: int = 0) -> None:
        """Retains the primary context; `close` gives it back.

        Raises:
            DeviceError: no such GPU, or no driver that can use it.
        """
        check_driver()
        count = call(driver.cuDeviceGetCount)
        if not 0 <= ordinal < count:
            raise DeviceError(f"gpu is {ordinal}, this machine has {count} that CUDA can see; expected 0 to {count - 1}")
        device = call(driver.cuDeviceGet, ordinal)
        attributes = driver.CUdevice_attribute
        major = call(driver.cuDeviceGetAttribute, attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = call(driver.cuDeviceGetAttribute, attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.ordinal = ordinal
        self.name = call(driver.cuDeviceGetName, 256, device).decode().strip("\0 ")
        self.compute_capability = f"{major}.{minor}"
        self._device = device
        self._context = call(driver.cuDevicePrimaryCtxRetain, device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the context current in the calling thread for the block, and leaves the thread as it was."""
        call(driver.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            call(driver.cuCtxPopCurrent)

    def free_bytes(self) -> tuple[int, int]:
        """Free and total bytes of the GPU's memory; in a block of `current`."""
        free, total = call(driver.cuMemGetInfo)
        return free, total

    def close(self) -> None:
        """Gives the context back; once."""
        release(driver.cuDevicePrimaryCtxRelease, self._device)
