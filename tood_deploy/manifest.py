"""What an artefact says of itself: JSON beside it, and, for ONNX, the same in the file's metadata. Knows no runtime."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tood_deploy.errors import ArtefactError, ToodError
from tood_deploy.files import file_sha256
from tood_deploy.graph_io import ARTEFACT_SUFFIXES, OPENVINO_SUFFIX, OPENVINO_WEIGHTS_SUFFIX
from tood_deploy.presets import Preset

FORMAT = 1
METADATA_KEY = "tood_deploy"


@dataclass(frozen=True)
class Manifest:
    """The description of one artefact.

    Attributes:
        preset: the detector.
        precision: of the network's arithmetic: "fp32", "bf16", "fp16" or "int8".
        max_det: rows D of the outputs.
        checkpoint_sha256: of the checkpoint the artefact was made from.
        options: what the artefact was built with, such as opset and form of the deformable convolutions.
        versions: of tood_deploy and of every tool that took part.
        created: date and time, ISO 8601, UTC.
        artefact_sha256: of the artefact itself; empty inside the artefact's own metadata.
        parity: the verdict of the comparison with PyTorch: deviations, tolerances, images; empty where there is none.
        target: what the artefact was built for and must meet again when it is opened; empty where it runs anywhere.
        self_test: a stored input and the stored answer to it; empty where there is none.
    """

    preset: Preset
    precision: str = "fp32"
    max_det: int = 100
    checkpoint_sha256: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    artefact_sha256: str = ""
    parity: dict[str, Any] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    self_test: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as a JSON object with sorted, stable keys."""
        values = asdict(self) | {"format": FORMAT, "preset": self.preset.to_dict()}
        return json.dumps(values, indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, origin: str) -> Manifest:
        """The manifest that `to_json` wrote; `origin` names the file in errors.

        Raises:
            ArtefactError: not a manifest, or one of another version.
        """
        try:
            values = json.loads(text)
            found = values.pop("format")
            if found != FORMAT:
                raise ArtefactError(
                    f"{origin}: manifest of format {found}, this version reads format {FORMAT}; export the model again"
                )
            return cls(**values | {"preset": Preset.from_dict(values["preset"])})
        except ArtefactError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, ToodError) as error:
            raise ArtefactError(
                f"{origin}: not a manifest of tood_deploy ({error}); export the model again with tood-export"
            ) from error

    def with_artefact(self, artefact: Path) -> Manifest:
        """The same, with the SHA-256 of this artefact."""
        return replace(self, artefact_sha256=artefact_sha256(artefact))


def saturating_weights(manifest: Manifest) -> bool:
    """Whether an artefact's 8-bit weights give wrong sums on CPUs without VNNI instructions (`export.precision.quantize`)."""
    described = (manifest.options.get(key, {}) for key in ("int8", "autotune"))
    return manifest.precision == "int8" and any(
        each.get("scheme") in ("u8s8", "s8s8") for each in described
    )


def manifest_path(artefact: Path) -> Path:
    """Where the manifest of an artefact lies: model.onnx -> model.json."""
    return artefact.with_suffix(".json")


def neighbour(artefact: Path) -> Path | None:
    """An artefact of another kind beside this one whose manifest has the same name; None where there is none."""
    others = (
        artefact.with_suffix(suffix)
        for suffix in ARTEFACT_SUFFIXES
        if suffix != artefact.suffix.lower()
    )
    return next((other for other in others if other.is_file()), None)


def read_manifest(artefact: Path) -> Manifest | None:
    """The manifest beside an artefact, None where there is none.

    Raises:
        ArtefactError: there is one, and it cannot be read.
    """
    path = manifest_path(artefact)
    if not path.is_file():
        return None
    return Manifest.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))


def artefact_files(artefact: Path) -> tuple[Path, ...]:
    """The files an artefact consists of, its manifest left out: one, but an OpenVINO .xml has its weights in a .bin beside it."""
    return (
        (artefact, artefact.with_suffix(OPENVINO_WEIGHTS_SUFFIX))
        if artefact.suffix.lower() == OPENVINO_SUFFIX
        else (artefact,)
    )


def artefact_sha256(artefact: Path) -> str:
    """SHA-256 of all bytes of an artefact.

    Raises:
        ArtefactError: a file of it is missing.
    """
    files = artefact_files(artefact)
    for path in files:
        if not path.is_file():
            raise ArtefactError(
                f"{path}: is missing; {artefact.name} consists of {' and '.join(file.name for file in files)}: copy them all"
            )
    return file_sha256(*files)


def doubts(artefact: Path, manifest: Manifest) -> str:
    """Why an artefact's answers should not be trusted blindly, in one line; "" where nothing speaks against it."""
    if manifest.artefact_sha256 and manifest.artefact_sha256 != artefact_sha256(artefact):
        return f"{artefact}: is not the file its manifest describes (another SHA-256); export it again with tood-export"
    if not manifest.parity:
        return f"{artefact}: was never compared with PyTorch (its manifest has no parity verdict); export it again with tood-export"
    if failing := manifest.parity.get("benchmark", {}).get("failing_stage"):
        return f"{artefact}: failed its comparison with PyTorch at the stage {failing}; see tood-bench parity, or export it again"
    return ""
