"""Describe what an export has come to, and where its time went: lines and tables for a person.

Comes in: an artefact's manifest, of an engine also its layers; the steps that `timed` marks. Knows
no runtime.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tood_deploy.graph_io import ARTEFACT_SUFFIXES, ONNX_SUFFIX
from tood_deploy.manifest import Manifest, artefact_files, manifest_path
from tood_deploy.presets import Preset
from tood_deploy.reporter import Reporter

if TYPE_CHECKING:
    from tood_deploy.export.tensorrt.layers import LayerReport


@dataclass(frozen=True)
class ExportResult:
    """An artefact and its manifest; of an engine also its layers."""

    path: Path
    manifest: Manifest
    layers: LayerReport | None = None

    def print(self, reporter: Reporter, list_layers: bool = False) -> None:
        """Report the artefact, its verdict and its layers, and what to do next.

        Args:
            reporter: prints it.
            list_layers: whether to print every layer of an engine.
        """
        size_mib = sum(file.stat().st_size for file in artefact_files(self.path)) / 2**20
        sizes = describe_sizes(self.manifest)
        reporter.result(
            f"{self.path}  {size_mib:.1f} MiB, {describe_precision(self.manifest)}, {sizes}"
        )
        reporter.result(f"{manifest_path(self.path)}  manifest")
        for line in describe_parity(self.manifest.parity.to_dict() if self.manifest.parity else {}):
            reporter.result(line)
        if self.layers is not None:
            self._print_layers(self.layers, reporter, list_layers)
        if self.path.suffix.lower() in ARTEFACT_SUFFIXES and not self.manifest.build.serving:
            for line in self._next_steps():
                reporter.result(line)

    def _print_layers(self, report: LayerReport, reporter: Reporter, list_layers: bool) -> None:
        from tood_deploy.export.tensorrt.layers import layers_table, shares_table

        reporter.table(shares_table(report))
        if list_layers:
            reporter.table(layers_table(report.engine or report.network))

    def _next_steps(self) -> list[str]:
        """Return what to do with the artefact; nothing that it would refuse."""
        if self.path.suffix.lower() == ONNX_SUFFIX:
            from tood_deploy.engines.precision_support import advise_on

            if lines := advise_on(str(self.path), self.manifest):
                return lines
        device = " --device cuda" if self.layers is not None else ""
        return [f"next: tood-infer {self.path} IMAGES --output DIR{device}"]


def describe_preset(preset: Preset) -> str:
    """Return a line on a detector."""
    names = ", ".join(preset.class_names[:3]) + (", ..." if preset.num_classes > 3 else "")
    return (
        f"{preset.name}, anchor-{preset.anchor}, {preset.num_classes} classes ({names}), "
        f"{preset.convention} convention, images {preset.sizing}{_differences(preset)}"
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
    """Return which settings are not those of the published configurations; "" where all are."""
    published = Preset("published", preset.depth)
    values = {
        name: getattr(preset, name)
        for name in SETTINGS
        if getattr(preset, name) != getattr(published, name)
    }
    other = ", ".join(SETTINGS[name].format(_text(value)) for name, value in values.items())
    return f"; other than published: {other}" if other else ""


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_precision(manifest: Manifest) -> str:
    """Return the precision, and what is not in it."""
    kept = manifest.build.int8.keep if manifest.build.int8 else ()
    return f"{manifest.precision}, {', '.join(kept)} not" if kept else manifest.precision


def describe_sizes(manifest: Manifest) -> str:
    """Return the sizes and batches that the artefact takes."""
    if manifest.target is None:
        return "dynamic batch and size"
    profiles = manifest.target.profiles
    shapes = ", ".join(f"{profile.size_hw[0]} x {profile.size_hw[1]}" for profile in profiles)
    return f"images of {shapes}, batches of {profiles[0].min_batch} to {profiles[0].max_batch}"


def describe_parity(parity: dict[str, Any]) -> Iterator[str]:
    """Yield lines on how equal an artefact is to its reference: every value beside its limit."""
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
    detections, limits = parity["detections"], parity["limits"]
    worst = {
        key: max(deviation[key] for deviation in parity["maps"].values())
        for key in ("rms_ratio", "largest_ratio")
    }
    rms_limits = f"limit {limits['rms']:g}, of maps with few cells {limits['rms_of_few']:g}"
    yield (
        f"{_compared(parity)}every map is within {worst['rms_ratio']:.2g} times what float32 "
        f"itself explains ({rms_limits}), every value within {worst['largest_ratio']:.2g} times "
        f"(limit {limits['largest']:g}); {detections['matched']} of {detections['reference']} "
        f"detections matched, scores within {detections['score_deviation']:.1e}, "
        f"boxes within {detections['box_deviation_px']:.1e} px"
    )
    if named := parity["ill_conditioned"]:
        yield (
            "too ill-conditioned in float32 to be judged by their values, and judged by "
            f"detections: {', '.join(named)}"
        )
    if not detections["reference"]:
        yield (
            "no detection on these images: only the maps were compared; "
            "give --verify-images a folder of real images"
        )


def _describe_detections(parity: dict[str, Any]) -> str:
    limits, ap = parity["limits"], parity["ap"]
    text = (
        f"{_compared(parity)}of {parity['reference_detections']} detections with a score above "
        f"{parity['score_threshold']:.2g} {parity['lost']} lost ({parity['lost_share']:.1%}, "
        f"limit {limits['lost']:.0%}), of {parity['artefact_detections']} {parity['added']} added "
        f"({parity['added_share']:.1%}, limit {limits['added']:.0%}); "
        f"scores within {parity['score_deviation']:.2g} (limit {limits['score']:g}), "
        f"overlap at least {parity['least_iou']:.2f} (limit {limits['iou']:g}), "
        f"boxes within {parity['box_deviation_px']:.1f} px"
    )
    if ap is not None:
        text += (
            f"; AP {ap['reference']:.2f} -> {ap['artefact']:.2f}, drop {ap['drop']:.2f} "
            f"(limit {limits['ap_drop']:g})"
        )
    return text


@dataclass
class Timings:
    """Wall clock and CPU seconds of every step so far, in the order of their first use."""

    steps: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, step: str, wall_s: float, cpu_s: float) -> None:
        """Add to a step's seconds."""
        before = self.steps.get(step, (0.0, 0.0))
        self.steps[step] = before[0] + wall_s, before[1] + cpu_s

    def text(self) -> str:
        """Return the steps and their sum as the lines of a table."""
        console = Console(width=80, file=io.StringIO())
        with console.capture() as captured:
            console.print(self._table())
        return captured.get().rstrip()

    def _table(self) -> Table:
        result = Table("step", title="where the time went")
        for name in ("seconds", "CPU seconds", "share"):
            result.add_column(name, justify="right")
        total_wall, total_cpu = (sum(values[i] for values in self.steps.values()) for i in (0, 1))
        for step, (wall, cpu) in (*self.steps.items(), ("together", (total_wall, total_cpu))):
            result.add_row(
                step, f"{wall:.1f}", f"{cpu:.1f}", f"{wall / total_wall if total_wall else 0:.0%}"
            )
        return result


_current: ContextVar[Timings | None] = ContextVar("timings", default=None)


@contextmanager
def record_timings() -> Iterator[Timings]:
    """Record the steps that `timed` marks inside the block."""
    token = _current.set(Timings())
    try:
        timings = _current.get()
        assert timings is not None
        yield timings
    finally:
        _current.reset(token)


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Count the block as a step, where timings are recorded; steps do not hold one another."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        if timings := _current.get():
            timings.add(step, time.perf_counter() - wall, time.process_time() - cpu)
