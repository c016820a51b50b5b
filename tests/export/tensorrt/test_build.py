"""TensorRT's builder: parsing, options, failures as one line with advice, timings, cancelling."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from export.small_graph import save_small
from onnx import TensorProto, helper
from recording import RecordingReporter

from tood_deploy.engines.tensorrt.library import Flavour, Messages, load_flavour
from tood_deploy.errors import ArtefactError, DeviceError, ToodError
from tood_deploy.export.tensorrt.build import (
    ParsedNetwork,
    _failure,
    build_monitor,
    build_plan,
    kept_timings,
    parse_network,
    run_cancellable,
)
from tood_deploy.export.tensorrt.options import EngineOptions, Profiles
from tood_deploy.onnx_file import read_onnx
from tood_deploy.reporter import Reporter

pytest.importorskip("tensorrt_rtx")


PROFILES = Profiles(((64, 96),), (1, 1, 2))


@pytest.fixture
def network(tmp_path: Path) -> ParsedNetwork:
    return parse_network(load_flavour("tensorrt_rtx"), read_onnx(save_small(tmp_path / "a.onnx")))


def build(parsed: ParsedNetwork, profiles: Profiles = PROFILES, **options: Any) -> bytes:
    flavour = load_flavour("tensorrt_rtx")
    with build_monitor(flavour, Reporter.silent()) as monitor:
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
            match=r"compute capability 9\.0: TensorRT-RTX .* builds for 7\.5, 8\.0, 8\.6, "
            r"8\.9, 12\.0",
        ):
            build(network, compute_capabilities=("8.9", "9.0"))

    def test_capabilities_are_written_as_nvidia_does(self) -> None:
        assert {"8.9", "12.0"} <= set(load_flavour("tensorrt_rtx").compute_capabilities)


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
    """A builder that says something and gives nothing, as the library does on a GPU that this
    machine does not have."""

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
            match=r"a layer needs more workspace than 1 MiB \(.*\); give a larger "
            r"--workspace, or leave it out",
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
        with build_monitor(flavour, Reporter.silent()) as monitor:
            monitor.cancel()
            with pytest.raises(ArtefactError, match="Build canceled by user"):
                build_plan(flavour, network, PROFILES, EngineOptions(), monitor)


def run_phases(reporter: Reporter) -> list[bool]:
    """Run two phases, of which the inner never ends and the outer lacks its step."""
    with build_monitor(load_flavour("tensorrt_rtx"), reporter) as plain:
        monitor: Any = plain
        monitor.phase_start("Building engine", None, 2)
        monitor.phase_start("Timing tactics", "Building engine", 3)
        answers = [monitor.step_complete("Timing tactics", 0)]
        answers.append(monitor.step_complete("a phase that never began", 0))
        monitor.cancel()
        answers.append(monitor.step_complete("Building engine", 0))
        monitor.phase_finish("Building engine")
        monitor.phase_finish("Building engine")
    return answers


def test_phases_are_shown_and_cancelling_stops_the_builder() -> None:
    reporter = RecordingReporter()
    assert run_phases(reporter) == [True, True, False]
    assert any("cancelling" in line for line in reporter.lines)
    assert not reporter._tasks, "every phase is closed"


def test_ctrl_c_waits_for_the_builder_to_stop() -> None:
    stopped, ended = threading.Event(), []

    class Monitor:
        def cancel(self) -> None:
            stopped.set()

    def long_build() -> None:
        time.sleep(0.2)  # until the main thread waits
        os.kill(os.getpid(), signal.SIGINT)
        stopped.wait(10)
        ended.append(time.perf_counter())

    with pytest.raises(KeyboardInterrupt):
        run_cancellable(long_build, Monitor())
    assert ended
    assert stopped.is_set()


def parse(path: Path) -> ParsedNetwork:
    return parse_network(load_flavour("tensorrt_rtx"), read_onnx(path))


def node(operator: str, *inputs: str) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [f"of_{operator}"], name=f"the_{operator}")


def constant(name: str, values: Sequence[int]) -> onnx.NodeProto:
    return helper.make_node(
        "Constant", [], [name], value=onnx.numpy_helper.from_array(np.array(values, np.int64))
    )


def in_loop(body_node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A loop of one round around a node."""
    values = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (("i", 7, []), ("go", 9, []), ("done", 9, []), ("round", 7, []))
    ]
    ends = [
        helper.make_node("Identity", [name], [to]) for name, to in (("go", "done"), ("i", "round"))
    ]
    body = helper.make_graph([body_node, *ends], "body", values[:2], values[2:])
    once = helper.make_node(
        "Constant", [], ["once"], value=helper.make_tensor("", TensorProto.INT64, [], [1])
    )
    return [once, helper.make_node("Loop", ["once", ""], ["rounds"], body=body)]


DEFORM = (
    "pixels",
    "weight",
    "convolved",
)  # the shapes do not matter: the parser does not come so far


def test_ours_is_taken(tmp_path: Path) -> None:
    network = parse(save_small(tmp_path / "a.onnx")).network
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    assert names == ["images", "valid_hw", "score_threshold", "iou_threshold"]
    assert network.get_output(1).shape[1:] == (100, 4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            [node("DeformConv", *DEFORM)],
            r"1\.7.* has no operator DeformConv; export the ONNX with --deform gather$",
        ),
        ([node("Det", "pixels")], "has no operator Det; export the ONNX again with tood-export$"),
        (
            [node("DeformConv", *DEFORM), node("Unique", "pixels")],
            "has no operator DeformConv, Unique; export .* --deform gather$",
        ),
        (in_loop(node("DeformConv", *DEFORM)), "has no operator DeformConv; "),
    ],
)
def test_a_missing_operator_is_named(
    extra: list[onnx.NodeProto], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError, match=message):
        parse(save_small(tmp_path / "a.onnx", extra=extra))


def test_a_refused_use_of_an_operator_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few, many = (
        constant("few", [1, 2]),
        constant("many", [0, 1, 0, 1]),
    )  # more indices than there are places to write to
    with pytest.raises(
        ArtefactError,
        match=r"cannot take it: operator ScatterElements at node the_ScatterElements: .*[Ii]ndices",
    ):
        parse(
            save_small(
                tmp_path / "a.onnx",
                extra=[few, many, node("ScatterElements", "few", "many", "many")],
            )
        )
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def flavour() -> Flavour:
    """TensorRT-RTX's logger under TensorRT's name."""
    return Flavour("tensorrt", None, "11.4", load_flavour("tensorrt_rtx").logger)


class FakeConfig:
    """A builder configuration that takes what begins with "timings"."""

    def __init__(self, here: bool = True) -> None:
        self.here, self.content = here, b""

    def create_timing_cache(self, content: bytes) -> Any:
        if content and not content.startswith(b"timings"):
            library = load_flavour("tensorrt_rtx")
            cast(Any, library.logger).log(library.module.ILogger.ERROR, "timing cache is corrupted")
            return None
        self.content = content
        return SimpleNamespace(
            serialize=lambda: self.content + b" and more" if self.content else b"timings"
        )

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return self.here


def test_timings_are_read_and_written_faked(flavour: Flavour, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache.bin"
    with kept_timings(flavour, FakeConfig(), path):
        assert not path.exists()
    assert path.read_bytes() == b"timings"
    with kept_timings(flavour, FakeConfig(), path):
        pass
    assert path.read_bytes() == b"timings and more"


def test_without_a_file_nothing_is_asked_of_the_library_faked(flavour: Flavour) -> None:
    with kept_timings(flavour, object(), None):
        pass


def test_a_failed_build_leaves_the_file_as_it_was_faked(flavour: Flavour, tmp_path: Path) -> None:
    path = tmp_path / "cache.bin"
    path.write_bytes(b"timings")
    with (
        pytest.raises(ValueError, match="the build failed"),
        kept_timings(flavour, FakeConfig(), path),
    ):
        raise ValueError("the build failed")
    assert path.read_bytes() == b"timings"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_refused_before_the_build_faked(flavour: Flavour, tmp_path: Path) -> None:
    message = r"cannot be read as a file \(Is a directory\); give another --timing-cache"
    with pytest.raises(ArtefactError, match=message), kept_timings(flavour, FakeConfig(), tmp_path):
        raise AssertionError("builds")


@pytest.mark.parametrize(
    ("content", "here", "message"),
    [
        (
            b"corrupted",
            True,
            r"cache\.bin: not a timing cache \(timing cache is corrupted\); delete it, or "
            r"give another --timing-cache",
        ),
        (
            b"timings",
            False,
            r"cache\.bin: measured on another GPU, or with another version than TensorRT "
            r"11\.4 .*; delete it",
        ),
    ],
)
def test_timings_that_do_not_fit_are_refused_faked(
    content: bytes, here: bool, message: str, flavour: Flavour, tmp_path: Path
) -> None:
    path = tmp_path / "cache.bin"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=message), kept_timings(flavour, FakeConfig(here), path):
        pass
    assert path.read_bytes() == content
