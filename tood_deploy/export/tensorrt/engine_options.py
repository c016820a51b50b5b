"""What an engine is built with, and which of it each flavour of TensorRT knows. Builds nothing, knows no TensorRT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tood_deploy.errors import ToodError
from tood_deploy.tensorrt_flavour import TITLES, Flavour

Nms = Literal["unrolled", "loop"]

HIGHEST_LEVEL, MOST_ROUNDS = 5, 256

# Found with TensorRT-RTX 1.7.1 and TensorRT's documents: options that one of the two has and the other has not, and what to do instead.
LACKING = {
    "tensorrt_rtx": {
        "optimisation_level": "it chooses kernels on the GPU that runs the engine, and plans of every level are the same",
        "timing_cache": "it chooses kernels on the GPU that runs the engine, so there are no timings to keep",
        "version_compatible": "its plans run in the very version that built them",
        "hardware_compatible": "its plans run on every GPU of their compute capabilities anyway; name these with --compute-capability",
    },
    "tensorrt": {"compute_capabilities": "it builds for the GPU of this machine; for Ampere and newer ones give --hardware-compatible"},
}
FLAGS = {
    "optimisation_level": "--optimisation-level",
    "timing_cache": "--timing-cache",
    "version_compatible": "--version-compatible",
    "hardware_compatible": "--hardware-compatible",
    "compute_capabilities": "--compute-capability",
}


@dataclass(frozen=True)
class EngineOptions:
    """How the builder works; what is None or empty is left to the library.

    Attributes:
        workspace_mib: the most memory that one layer may use for itself, MiB.
        optimisation_level: 0 (built fast) to 5 (runs fast). TensorRT only.
        timing_cache: file of measured times, read and written; makes the next build faster. TensorRT only.
        version_compatible: the engine also runs in later versions of the library. TensorRT only.
        hardware_compatible: the engine also runs on other GPUs, Ampere and newer. TensorRT only.
        compute_capabilities: such as "8.9": the GPUs to build for. TensorRT-RTX only.
        nms: how the engine holds suppression: "unrolled" in a fixed number of rounds, which CUDA graphs can hold; or as the "loop" of the
            .onnx, which ends by the data.
        nms_rounds: of the unrolled form; `nms_unrolled`'s own number where not given.
    """

    workspace_mib: int | None = None
    optimisation_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()
    nms: Nms = "unrolled"
    nms_rounds: int | None = None

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ToodError(f"workspace is {self.workspace_mib} MiB; expected a positive number")
        if self.optimisation_level is not None and not 0 <= self.optimisation_level <= HIGHEST_LEVEL:
            raise ToodError(f"optimisation level is {self.optimisation_level}; expected 0 to {HIGHEST_LEVEL}")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise ToodError(f"compute capabilities {', '.join(self.compute_capabilities)}: one stands there twice; give each once")
        if self.nms not in ("unrolled", "loop"):
            raise ToodError(f"nms is {self.nms!r}; expected unrolled or loop")
        if self.nms_rounds is not None and self.nms == "loop":
            raise ToodError(f"nms is loop, which ends by itself, and {self.nms_rounds} rounds are given; leave --nms-rounds out")
        if self.nms_rounds is not None and not 1 <= self.nms_rounds <= MOST_ROUNDS:
            raise ToodError(f"nms rounds are {self.nms_rounds}; expected 1 to {MOST_ROUNDS}")

    def check(self, flavour: Flavour) -> None:
        """Raises ToodError if an option is set that this flavour does not have."""
        for name, reason in LACKING[flavour.name].items():
            value = getattr(self, name)
            if value not in (None, ()) and value is not False:
                raise ToodError(f"{FLAGS[name]} means nothing to {TITLES[flavour.name]}: {reason}; leave {FLAGS[name]} out")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest: those that were set, and the form of suppression."""
        values = {"workspace_mib": self.workspace_mib, "optimisation_level": self.optimisation_level, "nms": self.nms}
        return {name: value for name, value in values.items() if value is not None}
