"""The builder: options arrive, failures become one line with advice, the monitor stops it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export.small_graph import save_small
from onnx import helper

from tood_deploy.engines.tensorrt.library import Flavour, Messages, load_flavour
from tood_deploy.errors import ArtefactError, DeviceError, ToodError
from tood_deploy.export.tensorrt.build import (
    ParsedNetwork,
    _failure,
    build_plan,
    build_progress,
    known_capabilities,
    parse_network,
)
from tood_deploy.export.tensorrt.options import EngineOptions, Profiles
from tood_deploy.onnx_file import read_onnx

pytest.importorskip("tensorrt_rtx")
PROFILES = Profiles(((64, 96),), (1, 1, 2))


@pytest.fixture
def network(tmp_path: Path) -> ParsedNetwork:
    return parse_network(load_flavour("tensorrt_rtx"), read_onnx(save_small(tmp_path / "a.onnx")))


def build(parsed: ParsedNetwork, profiles: Profiles = PROFILES, **options: Any) -> bytes:
    flavour = load_flavour("tensorrt_rtx")
    with build_progress(flavour, quiet=True) as monitor:
        return bytes(build_plan(flavour, parsed, profiles, EngineOptions(**options), monitor))


class TestOptions:
    def test_a_plan_of_two_profiles(
        self, network: ParsedNetwork, capfd: pytest.CaptureFixture[str]
    ) -> None:
        plan = build(
            network,
            Profiles(((64, 96), (96, 64)), (1, 2, 4)),
            workspace_mib=64,
            compute_capabilities=("8.9", "12.0"),
        )
        assert len(plan) > 10_000
        assert capfd.readouterr() == ("", "")

    def test_what_the_builder_is_told(
        self, monkeypatch: pytest.MonkeyPatch, network: ParsedNetwork
    ) -> None:
        trt = load_flavour("tensorrt_rtx").module
        seen: list[Any] = []
        parsed = ParsedNetwork(BuilderSpy(network.builder, seen), network.parser, network.network)
        build(parsed, workspace_mib=64, compute_capabilities=("8.9", "12.0"))
        (config,) = seen
        assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 * 2**20
        assert not config.get_flag(trt.BuilderFlag.TF32)
        assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
        assert [config.get_compute_capability(i) for i in range(2)] == [
            trt.ComputeCapability.SM89,
            trt.ComputeCapability.SM120,
        ]
        assert config.num_optimization_profiles == 1

    def test_an_unknown_compute_capability_is_refused(self, network: ParsedNetwork) -> None:
        with pytest.raises(
            ToodError,
            match=r"compute capability 9\.0: TensorRT-RTX .* builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0",
        ):
            build(network, compute_capabilities=("8.9", "9.0"))

    def test_capabilities_are_written_as_nvidia_does(self) -> None:
        assert {"8.9", "12.0"} <= known_capabilities(load_flavour("tensorrt_rtx")).keys()


class BuilderSpy:
    """A builder that keeps the configurations it makes."""

    def __init__(self, builder: Any, seen: list[Any]) -> None:
        self.builder, self.seen = builder, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.builder, name)

    def create_builder_config(self) -> Any:
        self.seen.append(self.builder.create_builder_config())
        return self.seen[-1]


class FailingBuilder:
    """A builder that says something and gives nothing, as the library does on a GPU that this machine does not have."""

    def __init__(self, builder: Any, message: str, without_config: bool = False) -> None:
        self.builder, self.message, self.without_config = builder, message, without_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.builder, name)

    def create_builder_config(self) -> Any:
        if not self.without_config:
            return self.builder.create_builder_config()
        return self.build_serialized_network()

    def build_serialized_network(self, *arguments: Any) -> None:
        flavour: Any = load_flavour("tensorrt_rtx")
        flavour.logger.log(flavour.module.ILogger.ERROR, self.message)


class TestFailures:
    def test_what_the_library_refuses_is_said(self, tmp_path: Path) -> None:
        numbers = {"k": [3841], "row": [1, 1, 1, -1]}
        constants = [
            onnx.numpy_helper.from_array(np.array(values, np.int64), name)
            for name, values in numbers.items()
        ]
        extra = [
            *(
                helper.make_node("Constant", [], [constant.name], value=constant)
                for constant in constants
            ),
            helper.make_node("Reshape", ["convolved", "row"], ["all"]),
            helper.make_node("TopK", ["all", "k"], ["best", "where"], name="the_TopK"),
        ]
        path = save_small(tmp_path / "a.onnx", extra=extra, read="best")
        with pytest.raises(
            ArtefactError,
            match=r"could not build the network: .*K exceeds the maximum value allowed \(3840\)",
        ):
            build(parse_network(load_flavour("tensorrt_rtx"), read_onnx(path)))

    @pytest.mark.parametrize("without_config", [False, True])
    @pytest.mark.parametrize(
        ("message", "error", "advice"),
        [
            (
                "[a.cpp::b::1] Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)",
                DeviceError,
                "give a smaller --workspace, --batch",
            ),
            (
                "Error Code 1: Cuda Runtime (cudaError 2: out of memory)",
                DeviceError,
                "ran out of memory in the build",
            ),
            (
                "Error Code 1: Cuda Runtime (cudaError 100: no CUDA-capable device is detected)",
                DeviceError,
                "could not use a GPU .*nvidia-smi",
            ),
        ],
    )
    def test_failures_on_a_gpu_faked(
        self,
        message: str,
        error: type[ToodError],
        advice: str,
        without_config: bool,
        network: ParsedNetwork,
    ) -> None:
        failing = ParsedNetwork(
            FailingBuilder(network.builder, message, without_config),
            network.parser,
            network.network,
        )
        with pytest.raises(error, match=advice):
            build(failing)

    def test_a_workspace_that_is_too_small(self, network: ParsedNetwork) -> None:
        with pytest.raises(
            ToodError,
            match=r"a layer needs more workspace than 1 MiB \(.*\); give a larger --workspace, or leave it out",
        ):
            build(network, workspace_mib=1)

    def test_with_a_gpu_full_memory_asks_for_less_faked(self, network: ParsedNetwork) -> None:
        library = load_flavour("tensorrt_rtx")
        messages = Messages(["Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)"])
        options = EngineOptions(workspace_mib=4096)
        on_gpu = _failure(
            Flavour("tensorrt", library.module, "11.4", library.logger), messages, options
        )
        assert "give a smaller --workspace, --batch or --shapes" in str(on_gpu)
        assert "give a larger --workspace" in str(_failure(library, messages, options))


class TestCancelling:
    def test_the_monitor_stops_the_library(self, network: ParsedNetwork) -> None:
        flavour = load_flavour("tensorrt_rtx")
        with build_progress(flavour, quiet=True) as monitor:
            monitor.cancel()
            with pytest.raises(ArtefactError, match="Build canceled by user"):
                build_plan(flavour, network, PROFILES, EngineOptions(), monitor)
