"""Arrays of other libraries in the TensorRT engine, on a GPU made of Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

trt = pytest.importorskip("tensorrt_rtx")
real_driver = pytest.importorskip("cuda.bindings.driver")


from engines.fake_arrays import DlpackArray
from engines.tensorrt_bench import Bench, assert_answers, make_images

from tood_deploy.errors import DeviceError, InputError


class TestArraysOnTheGpu:
    def device_copy(
        self, bench: Bench, array: np.ndarray, shift: int = 0
    ) -> tuple[int, Callable[[], None]]:
        """The array in the fake GPU's memory, `shift` bytes off alignment, and how to free it."""
        address = bench.driver._allocate(array.nbytes + shift)
        bench.driver.array(address + shift, array.shape, array.dtype)[...] = array
        return address + shift, lambda: bench.driver._free(address)

    @pytest.mark.parametrize("cuda_graph", ["auto", False])
    @pytest.mark.parametrize("shift", [0, 16])
    def test_dlpack_with_a_fake_gpu(self, bench: Bench, cuda_graph: Any, shift: int) -> None:
        """Read where they lie if that is aligned and nothing is replayed.

        Otherwise copied within the GPU. Never through the host.
        """
        images, valid_hw = make_images(2)
        address, free = self.device_copy(bench, images, shift)
        array = DlpackArray(address, images.shape, np.uint8)
        with bench.open(cuda_graph=cuda_graph) as engine:
            for _ in range(3):
                assert_answers(engine.infer(array, valid_hw, 0.25, 0.5), images, valid_hw)
            handles = [int(entry.split()[-1], 16) for entry in bench.driver.history]
            assert set(array.streams) == set(handles)
            copies = sum(entry.startswith("within") for entry in bench.driver.history)
            assert copies == (0 if cuda_graph is False and shift == 0 else 3)
            assert_answers(engine.infer(images, valid_hw, 0.25, 0.5), images, valid_hw)
        free()

    def test_a_failed_batch_lets_go_of_them_with_a_fake_gpu(self, bench: Bench) -> None:
        """Their owner may free them once the error is out.

        Nothing that still waits on the GPU may read them.
        """
        images, valid_hw = make_images(1)
        address, free = self.device_copy(bench, images)
        with bench.open() as engine:
            bench.plan.failures["execute"] = "something odd"
            with pytest.raises(DeviceError, match="something odd"):
                engine.infer(DlpackArray(address, images.shape, np.uint8), valid_hw, 0.25, 0.5)
            free()
            assert_answers(engine.infer(images, valid_hw, 0.25, 0.5), images, valid_hw)

    def test_sizes_on_the_gpu_too_with_a_fake_gpu(self, bench: Bench) -> None:
        images, valid_hw = make_images(2)
        address, free = self.device_copy(bench, valid_hw)
        with bench.open() as engine:
            assert_answers(
                engine.infer(images, DlpackArray(address, valid_hw.shape, np.int32), 0.25, 0.5),
                images,
                valid_hw,
            )
        free()

    def test_arrays_of_other_libraries_on_the_cpu_with_a_fake_gpu(self, bench: Bench) -> None:
        torch = pytest.importorskip("torch")
        images, valid_hw = make_images(2)
        with bench.open() as engine:
            found = engine.infer(torch.from_numpy(images), torch.from_numpy(valid_hw), 0.25, 0.5)
        assert_answers(found, images, valid_hw)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (
                DlpackArray(4096, (1, 64, 96, 3), np.float32),
                r"images are float32 \(1, 64, 96, 3\); expected uint8",
            ),
            (
                DlpackArray(4096, (1, 3, 64, 96), np.uint8),
                r"images are uint8 \(1, 3, 64, 96\); expected uint8 \(B, H, W, 3\)",
            ),
            (
                DlpackArray(4096, (1, 64, 96, 3), np.uint8, gpu=1),
                "images: lies on GPU 1, the engine runs on GPU 0; copy it there first",
            ),
            (
                DlpackArray(4096, (2, 64, 96, 3), np.uint8, strides=(36864, 576, 6, 1)),
                "images: strides .* expected rows without gaps",
            ),
            (
                DlpackArray(4096, (1, 64, 64, 3), np.uint8),
                "images are 64 x 64, this model takes 64 x 96, 96 x 32",
            ),
            ([[1]], "images: a list cannot be read"),
        ],
    )
    def test_wrong_arrays_are_named_with_a_fake_gpu(
        self, bench: Bench, array: Any, message: str
    ) -> None:
        with bench.open() as engine:
            for _ in range(3):  # more often than there are buffers
                with pytest.raises(InputError, match=message):
                    engine.infer(array, np.array([[64, 96]], np.int32), 0.25, 0.5)
