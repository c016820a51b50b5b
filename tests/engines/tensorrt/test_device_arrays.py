"""Arrays of other libraries are read where they lie, or refused by name."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from engines.fake_arrays import DlpackArray

from tood_deploy.engines.tensorrt import cuda as device_arrays
from tood_deploy.engines.tensorrt.cuda import DeviceArray, view_array
from tood_deploy.errors import DeviceError, InputError


def view(value: Any) -> Any:
    return view_array(value, "images", gpu=0, stream=77)


def test_numpy_stays_what_it_is() -> None:
    array = np.zeros((2, 3))
    assert view(array) is array


def test_arrays_on_the_cpu_are_not_copied() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros((2, 32, 32, 3), dtype=torch.uint8)
    found = view(tensor)
    tensor[0, 0, 0, 0] = 9
    assert found[0, 0, 0, 0] == 9


@pytest.mark.parametrize("strides", [None, (3072, 96, 3, 1), (9999, 96, 3, 1)])
def test_dlpack_on_a_gpu_that_is_claimed(strides: tuple[int, ...] | None) -> None:
    """An axis of length 1 may have any stride."""
    array = DlpackArray(0x7F00000000, (1, 32, 32, 3), np.uint8, strides=strides)
    found = view(array)
    assert (
        found.address,
        found.shape,
        found.dtype,
        found.ndim,
        found.size,
        found.nbytes,
        len(found),
    ) == (0x7F00000000, (1, 32, 32, 3), np.uint8, 4, 3072, 3072, 1)
    assert array.streams == [77], "its producer is not told who reads it"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            DlpackArray(4096, (1, 32, 32, 3), np.uint8, gpu=3),
            "images: lies on GPU 3, the engine runs on GPU 0; copy it there first",
        ),
        (
            DlpackArray(4096, (2, 32, 32, 3), np.uint8, strides=(1, 96, 3, 1)),
            r"images: strides \(1, 96, 3, 1\) for shape \(2, 32, 32, 3\) on",
        ),
        (
            DlpackArray(4096, (2, 32, 32, 3), np.uint8, strides=(6144, 192, 6, 2)),
            "expected rows without gaps, as contiguous",
        ),
        (
            [1, 2],
            "images: a list cannot be read .*; expected a NumPy array, or one with DLPack or "
            "__cuda_array_interface__",
        ),
        (None, "images: a NoneType cannot be read"),
    ],
)
def test_wrong_arrays_are_named(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        view(value)


def test_what_an_exporter_refuses_is_named() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(
        InputError,
        match=r"images: a Tensor cannot be read \(Can't export tensors that require gradient",
    ):
        view(torch.zeros(2, requires_grad=True))
    with pytest.raises(InputError, match=r"images: a Tensor cannot be read"):
        view(torch.zeros(2, dtype=torch.bfloat16))


def test_cuda_array_interface_with_a_fake_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real reader asks the driver whose memory it is, so another stands in its place."""
    asked: list[Any] = []

    class View:
        @staticmethod
        def from_any_interface(value: Any, stream: int) -> Any:
            asked.append((value, stream))
            described = value.__cuda_array_interface__
            return SimpleNamespace(
                ptr=described["data"][0],
                shape=described["shape"],
                strides=None,
                dtype=np.dtype("u1"),
                device_id=0,
            )

    monkeypatch.setattr(device_arrays, "_memory_view", lambda: View)
    array = SimpleNamespace(
        __cuda_array_interface__={
            "data": (4096, False),
            "shape": (1, 32, 32, 3),
            "typestr": "|u1",
            "version": 3,
        }
    )
    found = view(array)
    assert isinstance(found, DeviceArray)
    assert (found.address, found.shape) == (4096, (1, 32, 32, 3))
    assert asked == [(array, 77)]


def test_without_cuda_core_only_arrays_on_a_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("cuda.core", "cuda.core.utils"):
        monkeypatch.setitem(sys.modules, module, None)
    view(np.zeros(2))
    with pytest.raises(
        DeviceError, match=r"the package cuda-core is not installed; .*\[tensorrt\]"
    ):
        view(DlpackArray(4096, (1, 32, 32, 3), np.uint8))
