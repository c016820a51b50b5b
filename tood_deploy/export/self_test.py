"""Makes the golden self-test of an artefact from something that runs the network: its manifest's `self_test`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tood_deploy.golden import Golden, GoldenCase
from tood_deploy.parity.reference import Runner
from tood_deploy.parity.sample_images import synthetic_picture
from tood_deploy.rows import Rows, batch_rows

ANY_SIZE = ((160, 224),)  # in place of the canvases of an artefact that takes every size: not square, three levels with several cells
PICTURE_HW = (150, 210)  # fewer rows and columns than the canvas, so that padding takes part
PADDING_HW = (10, 14)
SEED, COARSE = 3, 0xF0  # without the grain of the synthetic picture its PNG takes a fifth
IOU_THRESHOLD = 0.6
FEWEST, MOST = 8, 24  # detections in an answer: enough for a verdict, few enough for a manifest


def self_test_from(run: Runner, canvases_hw: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
    """A built-in picture and the answers to it, for `Manifest.self_test`.

    Args:
        run: the reference: the network in PyTorch, or an artefact in float32 that was proven equal to it.
        canvases_hw: the padded sizes that the artefact takes; empty where every multiple of 32 will do.
    """
    canvases = tuple(canvases_hw) or ANY_SIZE
    height, width = (min(PICTURE_HW[axis], min(canvas[axis] for canvas in canvases) - PADDING_HW[axis]) for axis in (0, 1))
    picture = np.bitwise_and(synthetic_picture(height, width, SEED), COARSE, dtype=np.uint8)
    golden = Golden(picture, IOU_THRESHOLD, run.name, ())
    cases = tuple(_answer(run, golden, canvas) for canvas in canvases)
    return Golden(picture, IOU_THRESHOLD, run.name, cases).to_dict()


def _answer(run: Runner, golden: Golden, net_hw: tuple[int, int]) -> GoldenCase:
    """What the reference finds, cut at the widest gap between its scores: suppression is greedy, so a higher threshold only cuts."""
    (rows,) = batch_rows(run(*golden.inputs(net_hw), 0.0, golden.iou_threshold))
    if len(rows) <= FEWEST:
        return GoldenCase(net_hw, 0.0, rows)
    scores = rows.scores[FEWEST - 1 : MOST + 1].astype(np.float64)
    gap = int(((scores[:-1] - scores[1:]) / scores[:-1]).argmax())
    count = FEWEST + gap
    return GoldenCase(net_hw, float(scores[gap : gap + 2].mean()), Rows(rows.boxes[:count], rows.scores[:count], rows.labels[:count]))
