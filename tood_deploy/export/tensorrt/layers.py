"""Tell in which precision an engine computes, by its layers and their arithmetic.

Comes in: a parsed network or a plan. Goes out: layers, and shares of layers and of arithmetic per
precision. A network is strongly typed, so its own types are certain. What the builder has made of
it (layers fused, types of the tensors between them) is read from the plan, which takes a GPU, or
from the builder's log (`kernels.py`), which takes none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from tood_deploy.engines.tensorrt.library import Flavour
from tood_deploy.errors import ArtefactError
from tood_deploy.export.tensorrt.kernels import KernelSummary, kernels_from_log, summarise
from tood_deploy.export.tensorrt.options import Shape

PRECISIONS = ("int8", "fp16", "bf16", "fp32")
TYPES = {  # as the two versions of the API and of the inspector write them
    "INT8": "int8",
    "HALF": "fp16",
    "FP16": "fp16",
    "FLOAT16": "fp16",
    "BF16": "bf16",
    "BFLOAT16": "bf16",
    "FLOAT": "fp32",
    "FP32": "fp32",
    "FLOAT32": "fp32",
}
# What these hold or change is not arithmetic in a precision.
NO_WORK = ("CONSTANT", "SHAPE", "QUANTIZE", "DEQUANTIZE", "CAST")


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: the network's.
        kind: such as "CONVOLUTION".
        precision: one of `PRECISIONS`; "" for whole numbers, shapes and conversions.
        macs: multiplications of a convolution or matrix product for one image; 0 for others. The
            body of a loop counts once.
    """

    name: str
    kind: str
    precision: str
    macs: int


@dataclass(frozen=True)
class Share:
    """How much of an engine one precision has: layers and multiplications, absolute and of 1."""

    layers: int
    layer_share: float
    macs: int
    mac_share: float


@dataclass(frozen=True)
class LayerReport:
    """What is known of an engine's layers.

    Attributes:
        network: of the strongly typed network that was built.
        engine: of the built engine, from the plan or from the builder's log; None where neither
            tells.
        note: why not, in one line.
        kernels: what the engine's kernels come to; None where the log does not tell.
    """

    network: tuple[Layer, ...]
    engine: tuple[Layer, ...] | None = None
    note: str = ""
    kernels: KernelSummary | None = None

    def with_kernels(self, log: str, profiles: int) -> LayerReport:
        """Return the report with what the builder's log says of the engine.

        Args:
            log: its list of layers; "" where it printed none.
            profiles: that the engine was built with.
        """
        if not log:
            return self
        try:
            kernels = kernels_from_log(log, profiles)
        except ArtefactError as error:
            return replace(self, note=f"{self.note}; {error}" if self.note else str(error))
        built = tuple(Layer(one.name, one.kind, one.precision, 0) for one in kernels)
        return replace(self, engine=self.engine or built, note="", kernels=summarise(kernels))

    def check(self, asked: str) -> None:
        """Refuse a network that does none of its arithmetic in the precision that was asked for.

        Raises:
            ArtefactError: it does not.
        """
        present = shares(self.network)
        if asked == "fp32" or (asked in present and present[asked].macs):
            return
        listed = ", ".join(
            f"{name} {100 * share.mac_share:.0f}%" for name, share in present.items()
        )
        raise ArtefactError(
            f"{asked} was asked for and no arithmetic of the network is in it (found: {listed}); "
            "export the ONNX again"
        )

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return plain values for the manifest: shares of layers and arithmetic per precision."""
        return {
            name: {"layers": round(share.layer_share, 4), "arithmetic": round(share.mac_share, 4)}
            for name, share in shares(self.network).items()
        }


def shares(layers: Sequence[Layer]) -> dict[str, Share]:
    """Return, per precision that occurs, lowest first, its share of layers and multiplications.

    Layers that have no precision are not counted.
    """
    counted = [layer for layer in layers if layer.precision]
    all_macs = sum(layer.macs for layer in counted)
    result = {}
    for precision in PRECISIONS:
        own = [layer for layer in counted if layer.precision == precision]
        macs = sum(layer.macs for layer in own)
        if own:
            result[precision] = Share(
                len(own), len(own) / len(counted), macs, macs / all_macs if all_macs else 0.0
            )
    return result


def network_layers(flavour: Flavour, network: Any, shape_hw: Shape) -> tuple[Layer, ...]:
    """Return the layers of a parsed network, for one image.

    Fixes the network's inputs to that: parse it again to build it.

    Args:
        flavour: that parsed it.
        network: the library's own.
        shape_hw: rows and columns of the image.
    """
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if rest := tuple(tensor.shape)[1:]:
            tensor.shape = (1, *shape_hw, rest[-1]) if tensor.name == "images" else (1, *rest)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    from_quantised = {
        layer.get_output(0).name for layer in layers if layer.type.name == "DEQUANTIZE"
    }
    return tuple(_describe(flavour, layer, from_quantised) for layer in layers)


def _describe(flavour: Flavour, layer: Any, from_quantised: set[str]) -> Layer:
    kind = layer.type.name
    inputs = [
        tensor
        for tensor in (layer.get_input(i) for i in range(layer.num_inputs))
        if tensor is not None
    ]
    output = layer.get_output(0) if layer.num_outputs else None
    if output is None or kind in NO_WORK:
        return Layer(layer.name, kind, "", 0)
    macs = _multiplications(flavour, layer, inputs, output)
    # Activations and weights both come from 8 bits.
    if macs and len(inputs) > 1 and all(tensor.name in from_quantised for tensor in inputs[:2]):
        return Layer(layer.name, kind, "int8", macs)
    return Layer(layer.name, kind, TYPES.get((inputs[0] if macs else output).dtype.name, ""), macs)


def _multiplications(flavour: Flavour, layer: Any, inputs: list[Any], output: Any) -> int:
    trt = flavour.module
    if layer.type == trt.LayerType.CONVOLUTION:
        # The API gives layers as their base class, and this is its way to the attributes.
        layer.__class__ = trt.IConvolutionLayer
        return (
            math.prod(output.shape)
            * math.prod(layer.kernel_size_nd)
            * inputs[0].shape[1]
            // layer.num_groups
        )
    if layer.type == trt.LayerType.MATRIX_MULTIPLY:
        layer.__class__ = trt.IMatrixMultiplyLayer
        inner = -2 if layer.op0 == trt.MatrixOperation.TRANSPOSE else -1
        return math.prod(output.shape) * inputs[0].shape[inner]
    return 0


def inspect_plan(
    flavour: Flavour, plan: Any, *, host_code: bool = False
) -> tuple[tuple[Layer, ...] | None, str]:
    """Return the layers of a built engine, or None and the reason in one line.

    Opening a plan takes a GPU.

    Args:
        flavour: that built it.
        plan: the engine.
        host_code: whether the plan brings code for the CPU along, as version-compatible ones do.
    """
    trt = flavour.module
    with flavour.logger.collecting() as messages:
        runtime = trt.Runtime(flavour.logger)
        runtime.engine_host_code_allowed = host_code
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return (
            None,
            f"the built engine was not inspected: {flavour.title} opens a plan only on a GPU that "
            f"it is for ({messages.reason()})",
        )
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return tuple(engine_layers(text)), ""


def engine_layers(inspected: str) -> Iterator[Layer]:
    """Yield the layers in the JSON of the library's engine inspector.

    TensorRT 10 writes types as "Format/Datatype", 11 as "DataType".
    """
    for layer in json.loads(inspected)["Layers"]:
        if isinstance(layer, str):  # a name alone: the engine was built without detail
            yield Layer(layer, "", "", 0)
            continue
        types = [
            _precision(tensor) for tensor in (*layer.get("Inputs", ()), *layer.get("Outputs", ()))
        ]
        lowest = min((name for name in types if name), key=PRECISIONS.index, default="")
        yield Layer(layer["Name"], layer.get("LayerType", ""), lowest, 0)


def _precision(tensor: dict[str, Any]) -> str:
    text = str(tensor.get("DataType") or tensor.get("Format/Datatype") or "").upper()
    return next(
        (name for word, name in TYPES.items() if word in text.replace(".", " ").split()), ""
    )


def shares_table(report: LayerReport) -> Table:
    """Return the shares as a table to print."""
    table = Table(title="precision of the network's layers")
    for column in ("precision", "layers", "share", "GMAC per image", "share of arithmetic"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for name, share in shares(report.network).items():
        table.add_row(
            name,
            str(share.layers),
            f"{share.layer_share:.1%}",
            f"{share.macs / 1e9:.3g}",
            f"{share.mac_share:.1%}",
        )
    table.caption = report.note or str(report.kernels or _engine_summary(report.engine or ()))
    return table


def _engine_summary(layers: Sequence[Layer]) -> str:
    parts = [f"{share.layers} {name}" for name, share in shares(layers).items()]
    listed = ", ".join(parts) or "it does not tell their precision"
    return f"the built engine has {len(layers)} layers after fusing: {listed}"


def layers_table(layers: Sequence[Layer]) -> Table:
    """Return every layer with its precision and arithmetic, as a table to print."""
    name = Column("layer", overflow="fold")  # whole, in a file of 80 columns too
    table = Table(name, "kind", "precision", "GMAC per image", title="layers")
    for layer in layers:
        table.add_row(
            Text(layer.name),
            layer.kind,
            layer.precision,
            f"{layer.macs / 1e9:.3g}" if layer.macs else "",
        )
    return table
