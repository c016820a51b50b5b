"""A TensorRT plan, deserialised: what it takes and gives, and new execution contexts of it.

Comes in: the bytes of a plan that was checked against its manifest. In a block of `Gpu.current`,
all of it. Knows no images.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tood_deploy.engines.tensorrt.cuda import CudaError, OutOfDeviceMemory
from tood_deploy.engines.tensorrt.library import Flavour, Messages
from tood_deploy.errors import ArtefactError, DeviceError, OutputError, ToodError
from tood_deploy.files import atomic_path
from tood_deploy.graph_io import CANDIDATES, INPUTS, OUTPUTS
from tood_deploy.manifest_sections import OptimizationProfile

AddNote = Callable[[str], None]  # takes a remark for the user


class KernelCache:
    """An IRuntimeCache and its file.

    Attributes:
        cache: what every runtime configuration of the engine is given.
    """

    def __init__(self, cache: Any, path: Path, add_note: AddNote) -> None:
        """Fill an empty cache from the file, if there is one that fits.

        Where it does not fit, says so to `add_note`.
        """
        self.cache, self._path = cache, path
        self._kept = b""
        with suppress(OSError):
            self._kept = path.read_bytes()
        if self._kept and not cache.deserialize(self._kept):
            add_note(
                f"{path}: holds kernels of another driver, or is damaged; they are compiled again, "
                "and it is replaced"
            )

    def save(self) -> None:
        """Write the file if there is anything new.

        Where nothing can be kept, the kernels are compiled again next time.
        """
        serialised = self.cache.serialize()
        if serialised is None or (kernels := bytes(memoryview(serialised))) == self._kept:
            return
        with suppress(OutputError), atomic_path(self._path) as temporary:
            temporary.write_bytes(kernels)


OTHER_GPU = (
    "TensorRT-RTX has no kernels in it for this GPU: build it with this GPU's "
    "--compute-capability, "
    "or by TensorRT"
)
INPUT_TYPES = dict(zip(INPUTS, ("UINT8", "INT32", "FLOAT", "FLOAT"), strict=True))
OUTPUT_TYPES = dict(zip(OUTPUTS, ("INT32", "FLOAT", "FLOAT", "INT32"), strict=True))
CANDIDATE_TYPES = dict(zip(CANDIDATES, ("FLOAT", "FLOAT", "INT64"), strict=True))


class Plan:
    """A deserialised plan.

    Attributes:
        path: where it came from.
        logger: hears what TensorRT says.
        profiles: its optimisation profiles, in its own order.
        max_det: rows D of the outputs.
        candidates: N of an image that it gives beside its detections; 0 where it gives none.
        scratch_bytes: what a context needs on the GPU while it runs, beside inputs and outputs;
            contexts that take turns can share it.
    """

    def __init__(
        self,
        blob: bytes,
        flavour: Flavour,
        path: Path,
        *,
        host_code: bool,
        remedy: str,
        kernels: Path,
        add_note: AddNote,
    ) -> None:
        """Deserialise.

        Args:
            blob: the plan.
            flavour: the TensorRT it was built by.
            path: where it came from.
            host_code: whether it may bring code for the CPU along, as version-compatible plans do.
            remedy: what to do if it cannot be used, for errors.
            kernels: file for what TensorRT-RTX compiles.
            add_note: takes a remark for the user.

        Raises:
            ArtefactError: TensorRT refuses it, or it is no plan of tood_deploy.
            DeviceError: the driver is too old for it, or the GPU's memory is full.
        """
        self.path, self.logger, self._add_note = path, flavour.logger, add_note
        self._trt, self._is_rtx, self._remedy = (
            flavour.module,
            flavour.name == "tensorrt_rtx",
            remedy,
        )
        self._runtime: Any = None
        self._engine: Any = (
            None  # nowhere under a local name: the frames of an error would keep it alive
        )
        self._kernels: KernelCache | None = None
        self._kernels_path = kernels
        try:
            self._deserialise(blob, host_code)
            self._check_tensors()
            self.profiles = tuple(map(self._profile, range(self._engine.num_optimization_profiles)))
            self.max_det = int(self._engine.get_tensor_shape("boxes")[1])
            self.candidates = self._count_candidates()
            self.scratch_bytes = max(
                map(self._engine.get_device_memory_size_for_profile_v2, range(len(self.profiles)))
            )
        except BaseException:
            self.close()
            raise

    def _deserialise(self, blob: bytes, host_code: bool) -> None:
        with self.logger.collecting() as messages:
            self._runtime = self._trt.Runtime(self.logger)
            self._runtime.engine_host_code_allowed = host_code
            self._check_validity(blob, messages)
            self._engine = self._runtime.deserialize_cuda_engine(blob)
        if self._engine is None:
            raise refusal(f"{self.path}: cannot be opened", messages, self._remedy, ArtefactError)

    def _check_validity(self, blob: bytes, messages: Messages) -> None:
        """Refuse a plan that does not suit the machine, which TensorRT-RTX knows beforehand."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, flags = self._runtime.get_engine_validity(blob)
        if validity == self._trt.EngineValidity.SUBOPTIMAL:
            self._add_note(
                f"{self.path.name}: runs on this GPU, but was not built for it and may be slower "
                "than it could be"
            )
        if validity == self._trt.EngineValidity.INVALID:
            reasons = [
                reason.name
                for reason in self._trt.EngineInvalidityDiagnostics.__members__.values()
                if int(reason) & flags
            ]
            remedy = OTHER_GPU if "UNSUPPORTED_CC" in reasons else self._remedy
            raise refusal(
                f"{self.path}: cannot be opened: {', '.join(reasons) or 'not valid here'}",
                messages,
                remedy,
                ArtefactError,
            )

    def _check_tensors(self) -> None:
        names = list(map(self._engine.get_tensor_name, range(self._engine.num_io_tensors)))
        inputs = {name: self._type_of(name) for name in names if self._is_input(name)}
        outputs = {name: self._type_of(name) for name in names if not self._is_input(name)}
        expected = OUTPUT_TYPES | (CANDIDATE_TYPES if set(CANDIDATES) <= outputs.keys() else {})
        if (inputs, outputs) != (INPUT_TYPES, expected):
            raise ArtefactError(
                f"{self.path}: a plan, but not one of tood_deploy (inputs {inputs}, outputs "
                f"{outputs}, expected {INPUT_TYPES} and {expected}); "
                "make it from the checkpoint with tood-export --to engine"
            )
        if len(self._engine.get_tensor_shape("score_threshold")):
            raise ArtefactError(
                f"{self.path}: takes thresholds for each image, the form for Triton; make one to "
                "be run here with tood-export --to engine"
            )
        on_host = [
            name
            for name in names
            if self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE
        ]
        if on_host:
            raise ArtefactError(
                f"{self.path}: wants {', '.join(on_host)} in host memory, as no plan of "
                f"tood_deploy does; {self._remedy}"
            )

    def _count_candidates(self) -> int:
        names = map(self._engine.get_tensor_name, range(self._engine.num_io_tensors))
        if CANDIDATES[1] not in set(names):
            return 0
        return int(self._engine.get_tensor_shape(CANDIDATES[1])[1])

    def _type_of(self, name: str) -> str:
        return self._engine.get_tensor_dtype(name).name

    def _is_input(self, name: str) -> bool:
        return self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT

    def _profile(self, index: int) -> OptimizationProfile:
        smallest, best, largest = (
            tuple(shape) for shape in self._engine.get_tensor_profile_shape("images", index)
        )
        if smallest[1:3] != largest[1:3]:
            raise ArtefactError(
                f"{self.path}: profile {index} takes {smallest} to {largest}; expected one height "
                f"and width; {self._remedy}"
            )
        return OptimizationProfile((largest[1], largest[2]), smallest[0], best[0], largest[0])

    def new_context(self) -> Any:
        """Return a new IExecutionContext, without scratch memory of its own.

        Raises:
            DeviceError: TensorRT could not make one; the GPU's memory is full, for example.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self.logger.collecting() as messages:
            if self._is_rtx:
                context = self._engine.create_execution_context(
                    runtime_config=self._runtime_config(strategy)
                )
            else:
                context = self._engine.create_execution_context(strategy)
        if context is None:
            raise refusal(
                f"{self.path}: TensorRT gives no execution context", messages, self._remedy
            )
        return context

    def _runtime_config(self, strategy: Any) -> Any:
        """Return how TensorRT-RTX, which compiles kernels on the machine, shall do that.

        Eagerly: by default kernels are exchanged for faster ones while the engine runs, which a
            recorded CUDA graph would not take part in.
        All contexts share what was compiled, now or before.
        """
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = (
            self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        if self._kernels is None:
            self._kernels = KernelCache(
                config.create_runtime_cache(), self._kernels_path, self._add_note
            )
        config.set_runtime_cache(self._kernels.cache)
        return config

    def close(self) -> None:
        """Free engine and runtime; contexts must be gone before. May be called again."""
        if self._kernels is not None:
            self._kernels.save()
        self._kernels = None
        self._engine = None
        self._runtime = None


def refusal(
    what: str, messages: Messages, remedy: str, kind: type[ToodError] = CudaError
) -> ToodError:
    """Return the error that says what TensorRT said, in one line.

    Args:
        what: what failed.
        messages: what TensorRT said meanwhile.
        remedy: what to do, unless the messages tell better.
        kind: of the error, likewise.
    """
    reason = messages.reason()
    lowered = reason.lower()
    if "driver version is insufficient" in lowered:
        return DeviceError(
            f"{what}: the NVIDIA driver is too old for this TensorRT; update the driver ({reason})"
        )
    if "out of memory" in lowered or "outofmemory" in lowered:
        return OutOfDeviceMemory(
            f"{what}: the GPU's memory is full; use a smaller --batch, or stop what else uses the "
            f"GPU ({reason})"
        )
    if "cudaerror" in lowered:
        return DeviceError(
            f"{what}: CUDA failed; look at nvidia-smi, update the driver, and start the program "
            f"again ({reason})"
        )
    return kind(f"{what} ({reason}); {remedy}")
