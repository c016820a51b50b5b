"""What an engine is built with, and which of it each flavour of TensorRT knows. Builds nothing, knows no TensorRT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tood_deploy.errors import ToodError
from tood_deploy.tensorrt_flavour import TITLES, Flavour

HIGHEST_LEVEL = 5

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
    """

    workspace_mib: int | None = None
    optimisation_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ToodError(f"workspace is {self.workspace_mib} MiB; expected a positive number")
        if self.optimisation_level is not None and not 0 <= self.optimisation_level <= HIGHEST_LEVEL:
            raise ToodError(f"optimisation level is {self.optimisation_level}; expected 0 to {HIGHEST_LEVEL}")
        if len(set(self.compute_capabilities)) < len(self.compute_capabilities):
            raise ToodError(f"compute capabilities {', '.join(self.compute_capabilities)}: one stands there twice; give each once")

    def check(self, flavour: Flavour) -> None:
        """Raises ToodError if an option is set that this flavour does not have."""
        for name, reason in LACKING[flavour.name].items():
            value = getattr(self, name)
            if value not in (None, ()) and value is not False:
                raise ToodError(f"{FLAGS[name]} means nothing to {TITLES[flavour.name]}: {reason}; leave {FLAGS[name]} out")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest: those that were set."""
        values = {"workspace_mib": self.workspace_mib, "optimisation_level": self.optimisation_level}
        return {name: value for name, value in values.items() if value is not None}
