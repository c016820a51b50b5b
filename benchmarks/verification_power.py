"""Measure what verification refuses: random networks, sound and with one fault; print one table.

    python benchmarks/verification_power.py --networks 50 --output docs/results/verification.md

Every structure is exported once, without folding, and its graph filled with the weights of every
random network, so that ONNX Runtime computes each of them by itself. A sound network that is
refused is a false alarm; a fault counts as caught if any size refuses it. The sizes are smaller
than an export's, which leaves less to see a fault by, and takes minutes in place of an hour.
"""

from __future__ import annotations

import argparse
import platform
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines.self_test import processor
from tood_deploy.errors import CheckFailed
from tood_deploy.export.graph import ExportedGraph
from tood_deploy.export.to_onnx import onnx_from_model
from tood_deploy.graph_io import OUTPUTS
from tood_deploy.model import build_model
from tood_deploy.model.detector import DenseDetector
from tood_deploy.model.heads.tood import TaskAlignedHead
from tood_deploy.parity.onnx_reference import OnnxRunner
from tood_deploy.parity.reference import Conditioning, Reference
from tood_deploy.parity.tolerances import Failure
from tood_deploy.parity.torch_reference import torch_reference
from tood_deploy.parity.verify import Float32Verifier
from tood_deploy.presets import PRESETS, Preset

STRUCTURES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "anchor-based, 96 channels": {"anchor": "based", "channels": 96},
    "authors' convention, 4 stages of 128": {
        "convention": "authors",
        "channels": 128,
        "tower_stages": 4,
    },
    "bottlenecks, 3 stages": {"depth": 50, "base_channels": 16, "tower_stages": 3},
}
SIZES_HW = ((64, 64), (224, 160), (192, 192))
HEAD, NECK = "detector.model.bbox_head", "detector.model.neck"
Fault = Callable[[onnx.ModelProto, np.random.Generator], None]


def edit_weight(model: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], object]) -> None:
    """Change a weight.

    Args:
        model: changed in place.
        name: of the weight.
        edit: changes its array in place.
    """
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor).copy()
    edit(values)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def weight_off(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Make one number of a tower convolution one per cent too large.

    It is one of the larger half, as a tiny one changes nothing.
    """

    def edit(weight: np.ndarray) -> None:
        large = np.flatnonzero(np.abs(weight) >= np.median(np.abs(weight)))
        weight.flat[rng.choice(large)] *= 1.01

    edit_weight(model, f"{HEAD}.inter_convs.{rng.integers(3)}.conv.weight", edit)


def channels_swapped(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Swap two output channels of a lateral convolution."""
    edit_weight(
        model,
        f"{NECK}.lateral_convs.{rng.integers(3)}.conv.weight",
        lambda weight: weight.__setitem__([3, 4], weight[[4, 3]]),
    )


def set_group_norms(model: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> None:
    """Change an attribute of every group norm.

    Args:
        model: changed in place.
        name: of the attribute.
        change: from the old value to the new one.
    """
    for node in model.graph.node:
        if node.op_type == "GroupNormalization":
            old = next(attribute for attribute in node.attribute if attribute.name == name)
            new = helper.make_attribute(name, change(helper.get_attribute_value(old)))
            node.attribute.remove(old)
            node.attribute.append(new)


def groups_halved(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Give every group norm 16 groups in place of 32."""
    set_group_norms(model, "num_groups", lambda groups: groups // 2)


def epsilon_tenfold(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Give every group norm an epsilon of 1e-4 in place of 1e-5."""
    set_group_norms(model, "epsilon", lambda epsilon: 10 * epsilon)


def maker(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """Return the node that gives a value."""
    return next(node for node in model.graph.node if name in node.output)


def half_cell_shift(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Move decoded boxes by half a cell at one level, as with anchor points in cells' centres."""
    shifted = _sampled_boxes(model, f"head_boxes_p{rng.integers(3, 8)}")
    model.graph.initializer.append(
        numpy_helper.from_array(np.array(0.5, np.float32), "half_a_cell")
    )
    position = next(i for i, node in enumerate(model.graph.node) if shifted in node.output)
    node = model.graph.node[position]
    node.output[list(node.output).index(shifted)] = f"{shifted}_before"
    model.graph.node.insert(
        position + 1, helper.make_node("Add", [f"{shifted}_before", "half_a_cell"], [shifted])
    )


def _sampled_boxes(model: onnx.ModelProto, aligned: str) -> str:
    """Return the value that the alignment which gives `aligned` reads boxes from."""
    makers = {name: node for node in model.graph.node for name in node.output}
    waiting, seen = deque([aligned]), set()
    while waiting:
        node = makers.get(waiting.popleft())
        if node is not None and node.op_type == "GatherElements":
            return node.input[0]
        for name in node.input if node is not None else ():
            if name not in seen:
                seen.add(name)
                waiting.append(name)
    raise AssertionError(aligned)


def stale_constant(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Enlarge P5 to the size that P4 has at 192 x 192, whatever the input."""
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    model.graph.initializer.append(
        numpy_helper.from_array(np.array([12, 12], np.int64), "stale_hw")
    )
    maker(model, resize.input[3]).input[1] = "stale_hw"


FAULTS: dict[str, Fault] = {
    "one tower weight off by 1 %": weight_off,
    "two channels swapped": channels_swapped,
    "group count halved": groups_halved,
    "epsilon tenfold": epsilon_tenfold,
    "half-cell shift": half_cell_shift,
    "stale constant of one size": stale_constant,
}


def fill_randomly(model: DenseDetector, seed: int) -> DenseDetector:
    """Give a network random weights, of another scale for every seed, that find objects."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.uniform_(low, high, generator=generator)

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        tensor.normal_(mean, std, generator=generator)

    head = model.bbox_head
    assert isinstance(head, TaskAlignedHead)
    gain = 10 ** (torch.rand(1, generator=generator).item() - 0.5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                normal(module.running_mean, 0, 0.3)
                uniform(module.running_var, 0.5, 2)
                uniform(module.weight, 0.3, 1.2)
                normal(module.bias, 0, 0.2)
            elif isinstance(module, nn.GroupNorm):
                uniform(module.weight, 0.5, 1.5)
                normal(module.bias, 0, 0.3)
            elif isinstance(module, nn.Conv2d):
                normal(module.weight, 0, (2 / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    normal(module.bias, 0, 0.1)
        for conv in (head.tood_cls, head.cls_prob_module[2], head.reg_offset_module[2]):
            conv.get_parameter("weight").mul_(gain)
        head.tood_reg.weight.mul_(0.5)
        normal(head.tood_cls.get_parameter("bias"), -2, 1)
        normal(head.cls_prob_module[2].get_parameter("bias"), -1, 1)
        for scale in head.scales:
            uniform(scale.get_parameter("scale"), 0.5, 2)
    return model.eval()


def filled(skeleton: onnx.ModelProto, model: DenseDetector) -> onnx.ModelProto:
    """Return the exported graph with the weights of this network."""
    graph = ExportedGraph(model, "op", 100)
    values = dict(graph.named_parameters()) | dict(graph.named_buffers())
    copy = onnx.ModelProto()
    copy.CopyFrom(skeleton)
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(
                numpy_helper.from_array(values[tensor.name].detach().numpy(), tensor.name)
            )
    return copy


def skeleton_of(preset: Preset) -> onnx.ModelProto:
    """Export a structure once, every weight under its own name."""
    graph = onnx_from_model(fill_randomly(build_model(preset), 0), optimise=False)
    outputs = [value for value in graph.graph.output if value.name in OUTPUTS]
    del graph.graph.output[:]
    graph.graph.output.extend(outputs)
    return graph


@dataclass
class Tally:
    """The outcome for the networks of one structure."""

    networks: int = 0
    false_alarms: int = 0
    rms_ratio: float = 0.0
    largest_ratio: float = 0.0
    ill_conditioned: int = 0
    maps: int = 0
    caught: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)


def measured_once(reference: Reference) -> Reference:
    """Return the same reference, which measures an input once."""
    known: dict[bytes, Conditioning] = {}

    def measure(images: np.ndarray, *others: Any) -> Conditioning:
        if (key := images.tobytes()) not in known:
            known[key] = reference.measure(images, *others)
        return known[key]

    return replace(reference, measure=measure)


def compare(
    reference: Reference, graph: onnx.ModelProto, seed: int, *, until_caught: bool
) -> Float32Verifier:
    """Verify a graph at all sizes, on images of this network's own.

    Args:
        reference: the sound network.
        graph: to verify.
        seed: of the images.
        until_caught: stop at the first size that refuses the graph.
    """
    verifier = Float32Verifier(reference, OnnxRunner(graph))
    for number, (height, width) in enumerate(SIZES_HW):
        images = [
            synthetic_image(height - 10, width - 6, 10 * seed + 3 * number + i) for i in range(2)
        ]
        imgsz = min(height - 10, width - 6), max(height - 10, width - 6)
        try:
            allowance = verifier.compare(images, imgsz)
            if not until_caught:
                verifier.compare_slots(images[0], imgsz, allowance)
        except CheckFailed as error:
            verifier.verdict.failed.append(Failure("detections", str(error)))
        if until_caught and verifier.verdict.failed:
            break
    return verifier


def judge_network(tally: Tally, skeleton: onnx.ModelProto, preset: Preset, seed: int) -> None:
    """Add one random network: sound, and with every fault.

    Args:
        tally: to add to.
        skeleton: exported graph of the structure.
        preset: of the structure.
        seed: of the network.
    """
    model = fill_randomly(build_model(preset), seed)
    reference, graph = measured_once(torch_reference(model, 100)), filled(skeleton, model)
    verdict = compare(reference, graph, seed, until_caught=False).verdict
    tally.networks += 1
    tally.false_alarms += bool(verdict.failed)
    tally.missed += [f"false alarm, seed {seed}: {verdict.failed[0]}"] if verdict.failed else []
    tally.rms_ratio = max(tally.rms_ratio, *(item.rms_ratio for item in verdict.maps.values()))
    tally.largest_ratio = max(
        tally.largest_ratio, *(item.largest_ratio for item in verdict.maps.values())
    )
    tally.ill_conditioned += len(verdict.ill_conditioned)
    tally.maps += len(verdict.maps) * len(SIZES_HW)
    rng = np.random.default_rng(seed)
    for name, plant in FAULTS.items():
        broken = onnx.ModelProto()
        broken.CopyFrom(graph)
        plant(broken, rng)
        if compare(reference, broken, seed, until_caught=True).verdict.failed:
            tally.caught[name] += 1
        else:
            tally.missed.append(f"missed, seed {seed}: {name}")


def markdown(tallies: dict[str, Tally], command: str) -> str:
    """Return the report."""
    software = f"Python {platform.python_version()}; PyTorch {torch.__version__}"
    sizes = ", ".join(f"{height}x{width}" for height, width in SIZES_HW)
    columns = ("sound: refused", "rms ratio", "largest ratio", "maps too ill-conditioned", *FAULTS)
    lines = [
        "# What verification refuses",
        "",
        f"- command: {command}",
        f"- date: {datetime.now(UTC).isoformat(timespec='seconds')}",
        f"- CPU: {processor()}, {torch.backends.cpu.get_cpu_capability()}",
        f"- software: {software}; ONNX Runtime {onnxruntime.__version__}",
        f"- images: two of each of {sizes} to a network",
        "- a ratio: deviation from float64 over that of valid float32 computations, the largest of "
        "all maps, sizes and networks",
        "",
        f"| random networks | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name, tally in tallies.items():
        cells = [
            name,
            f"{tally.false_alarms} of {tally.networks}",
            f"{tally.rms_ratio:.2f}",
            f"{tally.largest_ratio:.2f}",
            f"{tally.ill_conditioned} of {tally.maps}",
            *(f"{tally.caught[fault]} of {tally.networks}" for fault in FAULTS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    missed = [f"- {name}: {line}" for name, tally in tallies.items() for line in tally.missed]
    lines += ["", "Not as it should be:", "", *missed] if missed else []
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run all structures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks",
        type=int,
        default=50,
        metavar="N",
        help="random networks of each structure (default: 50)",
    )
    parser.add_argument(
        "--structures",
        nargs="+",
        choices=STRUCTURES,
        default=list(STRUCTURES),
        metavar="NAME",
        help="which (default: all)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the report goes as Markdown"
    )
    arguments = parser.parse_args(argv)
    tallies: dict[str, Tally] = {}
    report = ""
    for name in arguments.structures:
        preset = replace(PRESETS["tiny"], class_names=("a", "b", "c", "d", "e"), **STRUCTURES[name])
        skeleton, tallies[name] = skeleton_of(preset), Tally()
        for seed in track(range(arguments.networks), name, console=Console(stderr=True)):
            judge_network(tallies[name], skeleton, preset, seed)
        report = markdown(
            tallies, f"python benchmarks/verification_power.py --networks {arguments.networks}"
        )
        if arguments.output is not None:
            arguments.output.write_text(report, encoding="utf-8")
    Console().print(report, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
