"""Decide from its manifest alone whether a TensorRT plan may be opened on this machine.

Comes in: the manifest, the file's SHA-256, and the machine in words. Goes out: nothing, or an error
that names every mismatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tood_deploy.engines.tensorrt.library import TITLES, as_numbers
from tood_deploy.errors import ArtefactError
from tood_deploy.manifest import Manifest, manifest_path, read_manifest
from tood_deploy.manifest_sections import EngineTarget


@dataclass(frozen=True)
class Machine:
    """What this machine offers; the attributes are those of `EngineTarget` and the GPU's name."""

    flavour: str
    version: str
    platform: str
    compute_capability: str
    gpu_name: str


def read_plan_manifest(path: Path) -> tuple[Manifest, EngineTarget]:
    """Return the manifest beside a plan, and what it says the plan was built for.

    Raises:
        ArtefactError: there is none, or it is damaged or not a plan's.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise ArtefactError(
            f"{path}: its manifest {manifest_path(path).name} is missing; put it back beside the "
            f"plan, or {rebuild(path)}"
        )
    if manifest.target is None or manifest.target.flavour not in TITLES:
        given = manifest.target.flavour if manifest.target else "nothing"
        raise ArtefactError(
            f"{manifest_path(path)}: states no TensorRT that the plan was built for ({given}); "
            f"{rebuild(path)}"
        )
    return manifest, manifest.target


def check_plan(
    path: Path, manifest: Manifest, target: EngineTarget, machine: Machine, sha256: str
) -> None:
    """Raise ArtefactError unless the plan was built for this machine; name every mismatch.

    Args:
        path: the plan, for the message.
        manifest, target: as `read_plan_manifest` gives them.
        machine: where it shall run.
        sha256: of the file as it is now.
    """
    mismatches = [
        _file_mismatch(manifest, sha256),
        _flavour_mismatch(target, machine),
        _version_mismatch(target, machine),
        _platform_mismatch(target, machine),
        _gpu_mismatch(target, machine),
    ]
    if stated := [mismatch for mismatch in mismatches if mismatch]:
        raise ArtefactError(
            f"{path}: cannot be used here: {'; '.join(stated)}; {rebuild(path, manifest)}"
        )


def tuned_elsewhere(path: Path, target: EngineTarget, machine: Machine) -> str:
    """Return a remark on a plan whose kernels were chosen on another model of GPU, else "".

    Args:
        path: the plan, for the remark.
        target: what it was built for.
        machine: where it will run.
    """
    if target.gpu in ("", machine.gpu_name):
        return ""
    return (
        f"{path.name}: was tuned on {target.gpu}, this is {machine.gpu_name}; built here it may be "
        "faster"
    )


def rebuild(path: Path, manifest: Manifest | None = None) -> str:
    """Return what to do about a plan that cannot be used.

    The command that made it, where the manifest tells.
    """
    command = manifest.build.rebuild if manifest else ""
    usual = f"tood-export MODEL --to engine --output {path}"
    return f"build it again, for this machine: {command or usual}"


def _file_mismatch(manifest: Manifest, sha256: str) -> str:
    if manifest.artefact_sha256 == sha256:
        return ""
    stated = manifest.artefact_sha256[:12] or "nothing"
    return (
        f"the file has SHA-256 {sha256[:12]}.., its manifest states {stated}..: it was cut, "
        "changed "
        "or exchanged"
    )


def _flavour_mismatch(target: EngineTarget, machine: Machine) -> str:
    if target.flavour == machine.flavour:
        return ""
    return f"it was built by {TITLES[target.flavour]}, installed is {TITLES[machine.flavour]}"


def _version_mismatch(target: EngineTarget, machine: Machine) -> str:
    if target.flavour != machine.flavour or target.version == machine.version:
        return ""
    if target.version_compatible and _is_later(machine.version, target.version):
        return ""
    return (
        f"it was built by {TITLES[target.flavour]} {target.version}, installed is {machine.version}"
    )


def _is_later(version: str, than: str) -> bool:
    """Return whether a version follows another within one major version."""
    numbers = [
        [int(part) for part in text.split(".") if part.isdigit()] for text in (version, than)
    ]
    return numbers[0][:1] == numbers[1][:1] and numbers[0] >= numbers[1]


def _platform_mismatch(target: EngineTarget, machine: Machine) -> str:
    return (
        ""
        if target.platform == machine.platform
        else f"it was built for {target.platform}, this machine is {machine.platform}"
    )


def _gpu_mismatch(target: EngineTarget, machine: Machine) -> str:
    built, here = target.compute_capabilities, machine.compute_capability
    if here in built or (target.later_compute_capabilities and _is_above(here, built)):
        return ""
    if target.hardware_compatibility == "ampere_plus" and _is_above(here, ("8.0",)):
        return ""
    return (
        f"it was built for GPUs of compute capability {', '.join(built)}, "
        f"{machine.gpu_name} has {here}"
    )


def _is_above(capability: str, others: tuple[str, ...]) -> bool:
    """Return whether a compute capability is at least the lowest of others."""
    return as_numbers(capability) >= min(map(as_numbers, others))
