"""Tables of a comparison: stages, boxes, AP, classes, input sizes. Numbers in, `Table` out."""

from __future__ import annotations

from typing import Any

from tood_deploy.benchmark.canvas import Canvas
from tood_deploy.benchmark.deviation import Deviation
from tood_deploy.benchmark.parity import Result
from tood_deploy.benchmark.report import Table
from tood_deploy.benchmark.scoring import average_precision
from tood_deploy.rows import PAIR_IOU

STAGES_NOTE = "As deployed: with what the stages before handed on. Alone: from the reference's own values."
DETECTIONS_NOTE = "What lies before the detections was not looked at; where the runtime gives no more, the .onnx it was made from does."


def waterfall_table(result: Result) -> Table:
    """Every stage's deviation, as deployed and alone."""
    alone = result.comparison.alone.waterfall() if result.comparison.alone else {}
    rows = []
    for name, found in result.comparison.carried.waterfall().items():
        beside = _numbers(alone[name], full=False) if name in alone else ["0"] * 3 if alone else []
        rows.append([name, *_numbers(found, full=True), *beside])
    headers = ["stage", "max", "99 in 100", "relative L2", "outside"]
    return Table(
        headers + [f"alone: {header}" for header in ("max", "relative L2", "outside") if alone],
        rows,
        f"{STAGES_NOTE if alone else DETECTIONS_NOTE} Outside: share of elements beyond the tolerance. "
        "Pixels in normalised units, head boxes in strides, other boxes in pixels of the network's input.",
    )


def _numbers(found: Deviation, full: bool) -> list[str]:
    shown = [found.worst, *([found.p99] if full else []), found.relative_l2]
    return [*(f"{value:.1e}" if value else "0" for value in shown), f"{100 * found.outside_share:.3g}%"]


def matching_table(result: Result) -> Table:
    """Boxes found again, lost and added."""
    comparison = result.comparison
    kinds = {"candidates": comparison.carried.rows["candidates"], "detections": comparison.carried.rows["detections"]}
    if comparison.alone:
        kinds |= {"candidates, alone": comparison.alone.rows["candidates"], "detections, alone": comparison.alone.rows["detections"]}
    kinds["batch slots"] = comparison.slots
    if comparison.canvas:
        kinds[_padded(comparison.canvas)] = comparison.canvas.change
    rows = [
        [name, found.reference, found.matched, found.lost, found.added, f"{100 * found.matched_share:.2f}%"]
        for name, found in kinds.items()
        if found.reference + found.added
    ]
    note = (
        f"Matched: same class, IoU above {PAIR_IOU}, each box once. Batch slots: the first picture in every slot of a batch, "
        "against itself alone. Padded: on a canvas, as an engine of fixed shape does it, against padded as little as needed."
    )
    return Table(("boxes", "reference", "matched", "lost", "added", "matched of either"), rows, note)


def ap_table(result: Result) -> Table:
    """AP, and what each part costs when it alone is swapped in."""
    reference, found = (average_precision(metrics) for metrics in (result.reference_metrics, result.metrics))
    rows: list[list[Any]] = [["PyTorch", reference, 0.0], ["artefact", found, reference - found]]
    rows += [[f"swapped: {part}", reference - cost, cost] for part, cost in result.swap_costs.items()]
    if result.canvas_ap and result.comparison.canvas:
        least, padded = result.canvas_ap
        rows.append([_padded(result.comparison.canvas), padded, least - padded])
    precise = [[name, f"{ap:.3f}", f"{cost:+.3f}"] for name, ap, cost in rows]
    swapped = "Swapped: the reference, with this part of the artefact in place of its own."
    note = " ".join(filter(None, (swapped if result.swap_costs else "", _precision_note(result), _canvas_note(result))))
    return Table(("run", "AP", "lost"), precise, note)


def _padded(canvas: Canvas) -> str:
    who = "PyTorch" if canvas.fixed else "artefact"
    return f"{who}, padded to {canvas.title}"


def _precision_note(result: Result) -> str:
    precision = result.comparison.subject.engine.precision
    if "precision" in result.swap_costs:
        return f"Precision: the reference's network run by PyTorch in {precision}."
    if precision == "fp32":
        return "Precision costs nothing: the artefact's arithmetic is fp32, as the reference's."
    return f"Precision has no row, because PyTorch cannot run the network in {precision}."


def _canvas_note(result: Result) -> str:
    canvas = result.comparison.canvas
    if canvas is None:
        return ""
    if canvas.fixed:
        return "The artefact takes pictures of fixed sizes alone, so both run on these; the last row is what that costs PyTorch in AP."
    return "The last row is what it costs the artefact to pad every picture that far."


def class_table(result: Result) -> Table:
    """AP of every class on both sides."""
    assert result.reference_metrics is not None
    assert result.metrics is not None
    first, second = result.reference_metrics.class_ap, result.metrics.class_ap
    return Table(
        ("class", "reference", "artefact", "lost"),
        [[n, 100 * first[n], 100 * second[n], f"{100 * (first[n] - second[n]):+.3f}"] for n in first],
    )


def sizes_table(result: Result) -> Table:
    """How an artefact fares at other input sizes."""
    rows = []
    for (height, width), found in result.comparison.sizes.items():
        detections, waterfall = found.rows["detections"], found.waterfall()
        maps = [f"{waterfall[name].worst:.1e}" if name in waterfall else None for name in ("head: scores", "head: boxes")]
        verdict = next((failure.stage for failure in found.failures()), "passed")
        rows.append([f"{height} x {width}", *maps, detections.reference, detections.matched, detections.added, verdict])
    headers = ("input", "head scores, max", "head boxes, max", "detections", "matched", "added", "verdict")
    fixed = " The artefact takes no others." if result.comparison.subject.engine.canvases_hw else ""
    return Table(headers, rows, f"One synthetic picture each, as deployed.{fixed}")
