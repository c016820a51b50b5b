"""A TensorRT made of Python, on top of the fake CUDA driver.

It runs a little formula instead of a network.

It holds its user to the rules: contexts get scratch memory, shapes within a profile, aligned
addresses, and go before the memory does.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from engines.fake_cuda import FakeDriver
from numpy.typing import NDArray

tensorrt_rtx: Any = importlib.import_module("tensorrt_rtx")
MAX_DET = 5
TYPES: dict[str, Any] = {
    "images": np.uint8,
    "valid_hw": np.int32,
    "score_threshold": np.float32,
    "iou_threshold": np.float32,
    "num_dets": np.int32,
    "boxes": np.float32,
    "scores": np.float32,
    "labels": np.int32,
}
INPUTS = list(TYPES)[:4]
CANDIDATES = 8  # of an image
CANDIDATE_TYPES: dict[str, Any] = {
    "candidate_boxes": np.float32,
    "candidate_scores": np.float32,
    "candidate_labels": np.int64,
}
SHAPES = {
    "num_dets": (),
    "boxes": (MAX_DET, 4),
    "scores": (MAX_DET,),
    "labels": (MAX_DET,),
    "candidate_boxes": (CANDIDATES, 4),
    "candidate_scores": (CANDIDATES,),
    "candidate_labels": (CANDIDATES,),
}
SCRATCH = 4096


def answers(
    images: NDArray[Any], valid_hw: NDArray[Any], score_threshold: Any, iou_threshold: Any
) -> dict[str, NDArray[Any]]:
    """What the formula finds: every input decides about something."""
    batch = len(images)
    found = {name: np.zeros((batch, *SHAPES[name]), TYPES[name]) for name in list(TYPES)[4:]}
    found["num_dets"][:] = 1 + images[:, 0, 0, 0] % MAX_DET
    found["boxes"][:, 0, :2] = valid_hw
    found["boxes"][:, 0, 2] = images.reshape(batch, -1).sum(1, dtype=np.int64) % 1000
    found["scores"][:, 0] = score_threshold
    found["scores"][:, 1] = iou_threshold
    found["labels"][:, 0] = images[:, -1, -1, -1] % 80  # a class of COCO
    return found


class FakeContext:
    """Stands for an IExecutionContext."""

    def __init__(self, engine: FakeEngine) -> None:
        self._plan, self._engine = engine.plan, engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {"score_threshold": (), "iou_threshold": ()}
        self._addresses: dict[str, int] = {}
        self._scratch = 0
        self._ran = False
        self._plan.contexts.add(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= SCRATCH, "too little scratch memory"
        assert memory % 256 == 0
        self._scratch = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        self._plan.driver.give(stream_handle, f"profile {stream_handle:#x}", lambda: None)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, "shapes belong to a profile"
        if name == "images":
            size_hw, batches = self._plan.profiles[self._profile]
            if tuple(shape[1:]) != (*size_hw, 3) or not batches[0] <= shape[0] <= batches[2]:
                self._plan.say("ERROR", f"setInputShape: {shape} is not within the profile")
                return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0, f"{name} lies at {memory:#x}"
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in INPUTS if name not in self._shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        driver = self._plan.driver
        assert set(self._addresses) == set(self._plan.types)
        assert self._scratch
        if failure := self._plan.failures.pop("execute", None):
            self._plan.say("ERROR", failure)
            return False
        if driver.is_recording(stream_handle):
            assert self._ran, "a context is recorded after a run, which settles it"
            if not self._plan.recordable:
                driver.spoil(stream_handle)
                self._plan.say("ERROR", "operation not permitted when stream is capturing")
                return False
        self._ran = True
        driver.give(stream_handle, f"run {stream_handle:#x}", self._work(dict(self._addresses)))
        return True

    def _work(self, addresses: dict[str, int]) -> Callable[[], None]:
        """The run with the shapes and addresses of now, whatever the context is set to later.

        A graph keeps it so.
        """
        shapes, driver, scratch = dict(self._shapes), self._plan.driver, self._scratch

        def work() -> None:
            driver.array(scratch, (SCRATCH,), np.uint8)[:] = 0x5C
            inputs = [driver.array(addresses[name], shapes[name], TYPES[name]) for name in INPUTS]
            found = answers(*inputs)
            for name in CANDIDATE_TYPES.keys() & self._plan.types.keys():
                shape = (len(inputs[0]), *SHAPES[name])
                found[name] = np.zeros(shape, CANDIDATE_TYPES[name])
            self._plan.spoil(found)
            for name, values in found.items():
                driver.array(addresses[name], values.shape, values.dtype)[...] = values

        return work


class FakeRtxContext(FakeContext):
    """TensorRT-RTX compiles a kernel for each shape, and knows whether it can be recorded."""

    def __init__(self, engine: FakeEngine, cache: FakeRuntimeCache) -> None:
        super().__init__(engine)
        self._cache = cache

    def execute_async_v3(self, stream_handle: int) -> bool:
        kernel = "x".join(map(str, self._shapes["images"]))
        if kernel not in self._cache._kernels:
            self._plan.compiled.append(kernel)
            self._cache._kernels.add(kernel)
        return super().execute_async_v3(stream_handle)

    def is_stream_capturable(self, stream: int) -> bool:
        assert not self._plan.driver.is_recording(stream)
        return self._plan.recordable


class FakeRuntimeCache:
    """Stands for an IRuntimeCache: the kernels are names, one a line."""

    def __init__(self) -> None:
        self._kernels: set[str] = set()

    def serialize(self) -> bytes:
        return ("kernels\n" + "\n".join(sorted(self._kernels))).encode()

    def deserialize(self, blob: bytes) -> bool:
        head, *kernels = blob.decode().split("\n")
        self._kernels |= set(kernels) if head == "kernels" else set()
        return head == "kernels"


class FakeRuntimeConfig:
    """Stands for an IRuntimeConfig."""

    def __init__(self) -> None:
        self.cuda_graph_strategy = tensorrt_rtx.CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = (
            tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.LAZY
        )
        self.cache: FakeRuntimeCache | None = None
        self.strategy = tensorrt_rtx.ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeEngine:
    """Stands for an ICudaEngine."""

    def __init__(self, plan: FakePlan) -> None:
        self.plan = plan
        self.num_io_tensors, self.num_optimization_profiles = len(plan.types), len(plan.profiles)
        plan.engines.add(self)

    def get_tensor_name(self, index: int) -> str:
        return list(self.plan.types)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        names = {np.uint8: "UINT8", np.int32: "INT32", np.int64: "INT64", np.float32: "FLOAT"}
        return tensorrt_rtx.DataType.__members__[names[self.plan.types[name]]]

    def get_tensor_mode(self, name: str) -> Any:
        return (
            tensorrt_rtx.TensorIOMode.INPUT if name in INPUTS else tensorrt_rtx.TensorIOMode.OUTPUT
        )

    def get_tensor_location(self, _name: str) -> Any:
        return tensorrt_rtx.TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.plan.threshold_shape if name.endswith("threshold") else (-1, *SHAPES[name])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert name == "images"
        size_hw, batches = self.plan.profiles[profile_index]
        return [(batch, *size_hw, 3) for batch in batches]

    def get_device_memory_size_for_profile_v2(self, _profile_index: int) -> int:
        return SCRATCH

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()

    def create_execution_context(
        self, strategy: Any = None, runtime_config: FakeRuntimeConfig | None = None
    ) -> FakeContext | None:
        if failure := self.plan.failures.pop("context", None):
            self.plan.say("ERROR", failure)
            return None
        if runtime_config is not None:
            assert self.plan.rtx
            assert runtime_config.cache is not None
            assert runtime_config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
            strategy = runtime_config.strategy
        assert strategy == tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.plan.rtx:
            assert runtime_config is not None
            assert runtime_config.cache is not None
            return FakeRtxContext(self, runtime_config.cache)
        return FakeContext(self)


class FakePlan:
    """One plan and the library that opens it: `module` stands for the package.

    Attributes:
        profiles: ((rows, columns), (least, best, most)) each.
        recordable: whether CUDA graphs can be recorded.
        failures: what goes wrong once, by "deserialize", "context", "execute": the library's words.
        contexts, engines: those that are alive.
        compiled: kernels that TensorRT-RTX compiled, in order.
    """

    def __init__(
        self,
        driver: FakeDriver,
        logger: Any,
        profiles: list[tuple[tuple[int, int], tuple[int, int, int]]],
        *,
        rtx: bool,
    ) -> None:
        self.driver, self.profiles, self.rtx = driver, profiles, rtx
        self.recordable = True
        self.spoil: Callable[[dict[str, NDArray[Any]]], None] = lambda found: None
        self.types = dict(TYPES)
        self.failures: dict[str, str] = {}
        self.threshold_shape: tuple[int, ...] = ()
        self.validity: tuple[Any, int] = (tensorrt_rtx.EngineValidity.VALID, 0)
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.engines: weakref.WeakSet[FakeEngine] = weakref.WeakSet()
        self.host_code: list[bool] = []
        self.compiled: list[str] = []
        self._logger = logger
        driver.before_free.append(self._check_unused)
        shared = ("TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy")
        rtx_only = (
            "DynamicShapesKernelSpecializationStrategy",
            "EngineValidity",
            "EngineInvalidityDiagnostics",
        )
        names = shared + (rtx_only if rtx else ())
        self.module = SimpleNamespace(
            Runtime=self._runtime, **{name: getattr(tensorrt_rtx, name) for name in names}
        )

    def _check_unused(self, address: int) -> None:
        assert all(
            address not in (context._scratch, *context._addresses.values())
            for context in self.contexts
        ), "a context still uses it"

    def say(self, severity: str, message: str) -> None:
        """The library's logger says something."""
        self._logger.log(tensorrt_rtx.ILogger.Severity.__members__[severity], message)

    def _runtime(self, logger: Any) -> FakeRuntime:
        assert logger is self._logger
        return (FakeRtxRuntime if self.rtx else FakeRuntime)(self)


class FakeRuntime:
    """Stands for a Runtime."""

    def __init__(self, plan: FakePlan) -> None:
        self._plan = plan
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
        assert isinstance(serialized_engine, bytes)
        assert self._plan.driver.stack, "no context is current"
        self._plan.host_code.append(self.engine_host_code_allowed)
        if failure := self._plan.failures.pop("deserialize", None):
            self._plan.say("ERROR", failure)
            return None
        return FakeEngine(self._plan)


class FakeRtxRuntime(FakeRuntime):
    """TensorRT-RTX judges a plan before it opens it."""

    def get_engine_validity(self, buffer: bytes) -> tuple[Any, int]:
        return self._plan.validity
