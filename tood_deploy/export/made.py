"""What an export made, and how to tell a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from tood_deploy.export.tensorrt.layers import Layer, LayerReport, shares_table
from tood_deploy.half_precision import advise_on
from tood_deploy.manifest import ARTEFACT_SUFFIXES, Manifest, artefact_files, manifest_path
from tood_deploy.presets import Preset


@dataclass(frozen=True)
class Made:
    """An artefact and its manifest; of an engine also its layers."""

    path: Path
    manifest: Manifest
    layers: LayerReport | None = None

    def report(self, list_layers: bool = False) -> Iterator[Any]:
        """Lines and tables to print."""
        size = sum(file.stat().st_size for file in artefact_files(self.path)) / 2**20
        yield f"{self.path}  {size:.1f} MiB, {describe_precision(self.manifest)}, {describe_sizes(self.manifest)}"
        yield f"{manifest_path(self.path)}  manifest"
        yield from describe_parity(self.manifest.parity)
        if self.layers is not None:
            yield shares_table(self.layers)
            if list_layers:
                yield layers_table(self.layers.engine or self.layers.network)
        if self.path.suffix.lower() in ARTEFACT_SUFFIXES and "serving" not in self.manifest.options:
            yield from self._next_steps()

    def _next_steps(self) -> Iterator[str]:
        """What to do with the artefact; nothing that it would refuse."""
        if self.path.suffix.lower() == ".onnx" and (lines := advise_on(str(self.path), self.manifest)):
            yield from lines
            return
        device = " --device cuda" if self.layers is not None else ""
        yield f"next: tood-infer {self.path} PICTURES --output DIR{device}"


def describe(preset: Preset) -> str:
    """One line on a detector."""
    names = ", ".join(preset.class_names[:3]) + (", ..." if preset.num_classes > 3 else "")
    return (
        f"{preset.name}, anchor-{preset.anchor}, {preset.num_classes} classes ({names}), {preset.convention} convention, "
        f"pictures fit {preset.imgsz[0]} x {preset.imgsz[1]}"
    )


def describe_precision(manifest: Manifest) -> str:
    """The precision, and what is not in it."""
    kept = manifest.options.get("int8", {}).get("keep", ())
    return f"{manifest.precision}, {', '.join(kept)} not" if kept else manifest.precision


def describe_sizes(manifest: Manifest) -> str:
    """The sizes and batches it takes."""
    profiles = manifest.target.get("profiles")
    if not profiles:
        return "dynamic batch and size"
    shapes = ", ".join(f"{profile['size_hw'][0]} x {profile['size_hw'][1]}" for profile in profiles)
    return f"pictures of {shapes}, batches of {profiles[0]['batch'][0]} to {profiles[0]['batch'][-1]}"


def describe_parity(parity: dict[str, Any]) -> Iterator[str]:
    """How equal to its reference it is."""
    if not parity:
        return
    found = parity["detections"]
    of = f" (of {parity['compared']})" if "compared" in parity else ""
    yield (
        f"parity with {parity['reference']} on {parity['pictures']} pictures{of}: "
        f"{found['matched']} of {found['reference']} detections matched, "
        f"scores within {found['score_deviation']:.1e}, boxes within {found['box_deviation_px']:.1e} px; "
        f"head maps within {parity['head_scores']:.1e} (scores) and {parity['head_boxes']:.1e} strides (boxes)"
    )
    yield from describe_parity(parity.get("onnx", {}))
    if not found["reference"]:
        yield "no detection on these pictures: only the head's maps were compared; give --verify-images a folder of real pictures"


def layers_table(layers: Sequence[Layer]) -> Table:
    """Every layer with its precision and arithmetic."""
    name = Column("layer", overflow="fold")  # whole, in a file of 80 columns too
    table = Table(name, "kind", "precision", "GMAC a picture", title="layers")
    for layer in layers:
        table.add_row(Text(layer.name), layer.kind, layer.precision, f"{layer.macs / 1e9:.3g}" if layer.macs else "")
    return table
