"""What a manifest says that an engine is for."""

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tood_deploy.engines.tensorrt.library import Flavour, Name
from tood_deploy.errors import DeviceError
from tood_deploy.export.tensorrt.options import EngineOptions, Profiles
from tood_deploy.export.tensorrt.to_tensorrt import engine_target

PROFILES = Profiles(((64, 96),), (1, 2, 4))


def target(name: str, **options: Any) -> dict[str, Any]:
    return engine_target(
        Flavour(cast(Name, name), None, "1.7.1", cast(Any, None)),
        PROFILES,
        EngineOptions(**options),
    )


def test_rtx_is_for_ampere_and_later_unless_told() -> None:
    found = target("tensorrt_rtx")
    assert found["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0"]
    assert found["later_compute_capabilities"]
    assert (found["flavour"], found["version"]) == ("tensorrt_rtx", "1.7.1")
    assert found["platform"].startswith(sys.platform)
    assert found["profiles"] == [{"size_hw": [64, 96], "batch": [1, 2, 4]}]
    chosen = target("tensorrt_rtx", compute_capabilities=("8.9",))
    assert (chosen["compute_capabilities"], chosen["later_compute_capabilities"]) == (
        ["8.9"],
        False,
    )


class TestTensorRT:
    def test_the_gpu_of_this_machine_faked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        closed = []
        gpu = SimpleNamespace(
            name="NVIDIA H200", compute_capability="9.0", close=lambda: closed.append(True)
        )
        driver = SimpleNamespace(cuDriverGetVersion=lambda: 12080)
        device: Any = SimpleNamespace(
            Gpu=lambda: gpu, call=lambda function: function(), driver=driver
        )
        monkeypatch.setitem(sys.modules, "tood_deploy.engines.tensorrt.cuda", device)
        found = target("tensorrt")
        assert found["driver"] == "CUDA 12.8"
        assert (
            found["compute_capabilities"],
            found["later_compute_capabilities"],
            found["gpu"],
        ) == (["9.0"], False, "NVIDIA H200")
        assert (found["hardware_compatibility"], found["version_compatible"]) == ("none", False)
        assert closed == [True]
        wide = target("tensorrt", hardware_compatible=True, version_compatible=True)
        assert wide["later_compute_capabilities"]
        assert (wide["hardware_compatibility"], wide["version_compatible"]) == ("ampere_plus", True)

    def test_no_gpu_is_an_error_faked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse() -> None:
            raise DeviceError("no NVIDIA driver")

        device: Any = SimpleNamespace(Gpu=refuse, call=None, driver=None)
        monkeypatch.setitem(sys.modules, "tood_deploy.engines.tensorrt.cuda", device)
        with pytest.raises(DeviceError, match="no NVIDIA driver"):
            target("tensorrt")
