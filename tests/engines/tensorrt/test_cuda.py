"""The GPU as the CUDA driver tells of it.

Without one, on a driver made of Python, and the names say so.
"""

import shutil
from contextlib import closing

import pytest

real_driver = pytest.importorskip("cuda.bindings.driver")

from engines.fake_cuda import FakeDriver

from tood_deploy.engines.tensorrt import cuda as cuda_device
from tood_deploy.engines.tensorrt.cuda import CudaError, Gpu, OutOfDeviceMemory, call
from tood_deploy.errors import DeviceError


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver((12, 0))
    monkeypatch.setattr(cuda_device, "driver", fake)
    return fake


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a driver")
def test_no_driver() -> None:
    with pytest.raises(
        DeviceError, match="no NVIDIA driver found; run this on a machine with an NVIDIA GPU"
    ):
        Gpu()


def test_what_a_gpu_is_with_a_fake_gpu(driver: FakeDriver) -> None:
    with closing(Gpu()) as gpu:
        assert (gpu.ordinal, gpu.name, gpu.compute_capability) == (0, "Fake GPU", "12.0")
        assert not driver.stack
        with gpu.current():
            assert len(driver.stack) == 1
            with pytest.raises(ZeroDivisionError), gpu.current():
                raise ZeroDivisionError
            assert len(driver.stack) == 1
    assert driver.held() == {}


def test_no_gpu_beside_a_driver_with_a_fake_gpu(driver: FakeDriver) -> None:
    driver.count = 0
    with pytest.raises(
        DeviceError, match=r"\(CUDA_ERROR_NO_DEVICE\); look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    ):
        Gpu()


def test_driver_too_old_with_a_fake_gpu(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "bindings_version", "13.5.0")
    driver.version = 12080
    with pytest.raises(
        DeviceError,
        match=r"up to 12\.8, cuda-bindings 13\.5\.0 needs .* CUDA 13\.0; update the driver",
    ):
        Gpu()
    driver.version = 13000
    Gpu().close()


@pytest.mark.parametrize("ordinal", [-1, 2])
def test_a_gpu_that_is_not_there_with_a_fake_gpu(driver: FakeDriver, ordinal: int) -> None:
    driver.count = 2
    with pytest.raises(
        DeviceError,
        match=f"gpu is {ordinal}, this machine has 2 that CUDA can see; expected 0 to 1",
    ):
        Gpu(ordinal)


def test_a_status_becomes_an_error_with_a_fake_gpu(driver: FakeDriver) -> None:
    with closing(Gpu()) as gpu, gpu.current():
        driver.fail("cuMemGetInfo", real_driver.CUresult.CUDA_ERROR_ECC_UNCORRECTABLE)
        with pytest.raises(
            CudaError, match="cuMemGetInfo failed with CUDA_ERROR_ECC_UNCORRECTABLE, text of"
        ):
            call(driver.cuMemGetInfo)
        driver.fail("cuMemGetInfo", real_driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        with pytest.raises(OutOfDeviceMemory, match="cuMemGetInfo failed"):
            call(driver.cuMemGetInfo)
        assert call(driver.cuMemGetInfo) == (5 * 2**20, 80 * 2**20)


def test_the_fake_driver_has_no_function_that_the_real_one_lacks() -> None:
    functions = [name for name in vars(FakeDriver) if name.startswith("cu")]
    assert len(functions) > 25
    for name in functions:
        assert getattr(real_driver, name).__doc__.startswith(name)


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    with closing(Gpu()) as gpu, gpu.current():
        free, total = call(real_driver.cuMemGetInfo)
        assert 0 < free <= total
        assert gpu.name
        assert float(gpu.compute_capability) >= 5
