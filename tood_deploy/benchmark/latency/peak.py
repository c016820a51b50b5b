"""The arithmetic that a CPU can do in float32, and what a network needs of it.

Sizes come in, billions of multiply-adds go out. Needs torch and onnx, which come with the extra
`export`; knows no artefact.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tood_deploy.onnx_file import CPU
from tood_deploy.presets import Preset

PRODUCT_SIDE = 2048
CONV_CHANNELS, CONV_HW = 256, (100, 168)  # a 3x3 layer of an R50's head on P3 at 800 x 1344
REPEATS = 5


@dataclass(frozen=True)
class Peak:
    """Billions of float32 multiply-adds a second that ONNX Runtime reached at best.

    Attributes:
        product: in one product of large square matrices.
        convolution: in one 3x3 convolution of 256 channels.
        threads: that it was given; None for its own choice.
    """

    product: float
    convolution: float
    threads: int | None = None

    @property
    def best(self) -> float:
        """Return the larger of both."""
        return max(self.product, self.convolution)

    def better_of(self, other: Peak) -> Peak:
        """Return the best of two measurements, since other work on the machine only slows."""
        return Peak(
            max(self.product, other.product), max(self.convolution, other.convolution), self.threads
        )

    def __str__(self) -> str:
        return (
            f"{self.product:.1f} GMAC/s in a product of {PRODUCT_SIDE} x {PRODUCT_SIDE} matrices, "
            f"{self.convolution:.1f} in a 3x3 convolution of {CONV_CHANNELS} channels on "
            f"{CONV_HW[0]} x {CONV_HW[1]} cells, float32, ONNX Runtime"
        )


@dataclass(frozen=True)
class Arithmetic:
    """What the networks of a run need, and what the CPU can do.

    Attributes:
        peak: of the CPU.
        gmacs: billions of multiply-adds for an image, by network and its input's rows and columns.
    """

    peak: Peak
    gmacs: dict[tuple[Preset, tuple[int, int]], float]


def measure_peak(threads: int | None = None, repeats: int = REPEATS) -> Peak:
    """Measure what the CPU reaches in float32 now: the best of some calls.

    Args:
        threads: of the runtime; its own choice where None.
        repeats: calls of each kind.
    """
    side = PRODUCT_SIDE
    matrix = np.ones((side, side), np.float32)
    image = np.ones((1, CONV_CHANNELS, *CONV_HW), np.float32)
    product = _best_seconds(_session("MatMul", (side, side), threads), matrix, repeats)
    weights = (CONV_CHANNELS, CONV_CHANNELS, 3, 3)
    convolution = _best_seconds(_session("Conv", weights, threads), image, repeats)
    cells = CONV_HW[0] * CONV_HW[1]
    return Peak(side**3 / product / 1e9, 9 * CONV_CHANNELS**2 * cells / convolution / 1e9, threads)


def _best_seconds(run: Callable[[dict[str, Any]], object], values: Any, repeats: int) -> float:
    """Return the shortest of some calls, after one that is not counted."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run({"x": values})
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _session(
    operator: str, weights: tuple[int, ...], threads: int | None
) -> Callable[[dict[str, Any]], object]:
    """Return what runs one operator with constant weights, as a network has them."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(operator, ["x", "w"], ["y"])
    if operator == "Conv":
        node.attribute.append(helper.make_attribute("pads", [1, 1, 1, 1]))
    shape = [None] * len(weights)
    graph = helper.make_graph(
        [node],
        operator,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.full(weights, 1e-3, np.float32), "w")],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    return lambda feeds: session.run(None, feeds)


def network_cost(preset: Preset, size_hw: tuple[int, int]) -> tuple[int, float]:
    """Return the parameters of a network, and its multiply-adds in billions for an image.

    Counted are convolutions and matrix products, on the meta device: nothing is computed.

    Args:
        preset: of the network.
        size_hw: rows and columns of the network's input, multiples of 32.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tood_deploy.model import build_model

    with torch.device("meta"):
        model = build_model(preset)
        images = torch.zeros(1, 3, *size_hw)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, counter.get_total_flops() / 2e9
