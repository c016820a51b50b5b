"""What an export made, and how to tell a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from tood_deploy.engines.precision_support import advise_on
from tood_deploy.export.tensorrt.layers import Layer, LayerReport, shares_table
from tood_deploy.graph_io import ARTEFACT_SUFFIXES
from tood_deploy.manifest import Manifest, artefact_files, manifest_path
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
        yield from describe_parity(self.manifest.parity.to_dict() if self.manifest.parity else {})
        if self.layers is not None:
            yield shares_table(self.layers)
            if list_layers:
                yield layers_table(self.layers.engine or self.layers.network)
        if self.path.suffix.lower() in ARTEFACT_SUFFIXES and not self.manifest.build.serving:
            yield from self._next_steps()

    def _next_steps(self) -> Iterator[str]:
        """What to do with the artefact; nothing that it would refuse."""
        if self.path.suffix.lower() == ".onnx" and (
            lines := advise_on(str(self.path), self.manifest)
        ):
            yield from lines
            return
        device = " --device cuda" if self.layers is not None else ""
        yield f"next: tood-infer {self.path} IMAGES --output DIR{device}"


def describe(preset: Preset) -> str:
    """One line on a detector."""
    names = ", ".join(preset.class_names[:3]) + (", ..." if preset.num_classes > 3 else "")
    return (
        f"{preset.name}, anchor-{preset.anchor}, {preset.num_classes} classes ({names}), {preset.convention} convention, "
        f"images {preset.sizing}{_differences(preset)}"
    )


SETTINGS = {
    "norm_groups": "group norms of {} groups",
    "norm_eps": "group norm epsilon {}",
    "batch_norm_eps": "batch norm epsilon {}",
    "anchor_side": "anchors of {} strides",
    "anchor_offset": "anchors moved by {} strides",
    "delta_means": "box delta means {}",
    "delta_stds": "box delta deviations {}",
    "mean": "mean {}",
    "std": "std {}",
    "channel_order": "a network of {} channel order",
    "pad_value": "padding of {} after normalising",
    "score_threshold": "evaluation at scores above {}",
    "iou_threshold": "suppression at {}",
    "max_det": "at most {} detections",
    "candidates_per_level": "{} candidates a level",
}


def _differences(preset: Preset) -> str:
    """Say which settings are not those of the published configurations; "" where all are."""
    published = Preset("published", preset.depth)
    values = {
        name: getattr(preset, name)
        for name in SETTINGS
        if getattr(preset, name) != getattr(published, name)
    }
    other = ", ".join(SETTINGS[name].format(_text(value)) for name, value in values.items())
    return f"; other than published: {other}" if other else ""


def _text(value: object) -> str:
    return (
        " ".join(map(_text, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def describe_precision(manifest: Manifest) -> str:
    """The precision, and what is not in it."""
    kept = manifest.build.int8.keep if manifest.build.int8 else ()
    return f"{manifest.precision}, {', '.join(kept)} not" if kept else manifest.precision


def describe_sizes(manifest: Manifest) -> str:
    """The sizes and batches it takes."""
    if manifest.target is None:
        return "dynamic batch and size"
    profiles = manifest.target.profiles
    shapes = ", ".join(f"{rows} x {columns}" for rows, columns in (p.size_hw for p in profiles))
    return f"images of {shapes}, batches of {profiles[0].min_batch} to {profiles[0].max_batch}"


def describe_parity(parity: dict[str, Any]) -> Iterator[str]:
    """How equal to its reference it is: every value beside its limit."""
    if not parity:
        return
    if parity.get("judged_by") == "detections":
        yield _describe_detections(parity)
    elif "limits" in parity:
        yield from _describe_float32(parity)
    yield from (
        f"the .onnx it was made from: {line}" for line in describe_parity(parity.get("onnx", {}))
    )


def _compared(parity: dict[str, Any]) -> str:
    of = f" (of {parity['compared']})" if "compared" in parity else ""
    return f"parity with {parity['reference']} on {parity['images']} images{of}: "


def _describe_float32(parity: dict[str, Any]) -> Iterator[str]:
    found, limits = parity["detections"], parity["limits"]
    worst = {
        key: max(each[key] for each in parity["maps"].values())
        for key in ("rms_ratio", "largest_ratio")
    }
    rms_limits = f"limit {limits['rms']:g}, of maps with few cells {limits['rms_of_few']:g}"
    yield (
        f"{_compared(parity)}every map is within {worst['rms_ratio']:.2g} times what float32 itself explains ({rms_limits}), "
        f"every value within {worst['largest_ratio']:.2g} times (limit {limits['largest']:g}); {found['matched']} of {found['reference']} "
        f"detections matched, scores within {found['score_deviation']:.1e}, boxes within {found['box_deviation_px']:.1e} px"
    )
    if named := parity["ill_conditioned"]:
        yield f"too ill-conditioned in float32 to be judged by their values, and judged by detections: {', '.join(named)}"
    if not found["reference"]:
        yield "no detection on these images: only the maps were compared; give --verify-images a folder of real images"


def _describe_detections(parity: dict[str, Any]) -> str:
    limits, ap = parity["limits"], parity["ap"]
    text = (
        f"{_compared(parity)}of {parity['reference_detections']} detections with a score above {parity['score_threshold']:.2g} "
        f"{parity['lost']} lost ({parity['lost_share']:.1%}, limit {limits['lost']:.0%}), of {parity['artefact_detections']} "
        f"{parity['added']} added ({parity['added_share']:.1%}, limit {limits['added']:.0%}); "
        f"scores within {parity['score_deviation']:.2g} (limit {limits['score']:g}), "
        f"overlap at least {parity['least_iou']:.2f} (limit {limits['iou']:g}), boxes within {parity['box_deviation_px']:.1f} px"
    )
    if ap is not None:
        text += f"; AP {ap['reference']:.2f} -> {ap['artefact']:.2f}, drop {ap['drop']:.2f} (limit {limits['ap_drop']:g})"
    return text


def layers_table(layers: Sequence[Layer]) -> Table:
    """Every layer with its precision and arithmetic."""
    name = Column("layer", overflow="fold")  # whole, in a file of 80 columns too
    table = Table(name, "kind", "precision", "GMAC a image", title="layers")
    for layer in layers:
        table.add_row(
            Text(layer.name),
            layer.kind,
            layer.precision,
            f"{layer.macs / 1e9:.3g}" if layer.macs else "",
        )
    return table
