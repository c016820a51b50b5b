"""Suppression of an engine's images on the CPU: what the network's own loop keeps."""

import numpy as np
import pytest
import torch
from model.crowds import Boxes, chain, crowd

from tood_deploy.engines.base import BatchDetections
from tood_deploy.engines.tensorrt.repair import BatchCandidates, finish_exactly
from tood_deploy.model.postprocess import Candidates, suppress, vote

MAX_DET = 100


def finished(boxes: Boxes, iou: float, *, voting: bool = False) -> BatchDetections:
    """Return the detections of images none of which the engine could finish."""
    batch = len(boxes[1])
    unfinished = BatchDetections(
        np.full(batch, -1, np.int32),
        np.zeros((batch, MAX_DET, 4), np.float32),
        np.zeros((batch, MAX_DET), np.float32),
        np.zeros((batch, MAX_DET), np.int32),
    )
    candidates = BatchCandidates(*(part.numpy() for part in boxes))
    return finish_exactly(unfinished, candidates, iou, voting=voting)


def assert_as_the_network(boxes: Boxes, iou: float, *, voting: bool = False) -> None:
    candidates = Candidates(*boxes)
    expected = suppress(candidates, iou, MAX_DET)
    if voting:
        expected = vote(expected, candidates)
    found = finished(boxes, iou, voting=voting)
    np.testing.assert_array_equal(found.num_dets, expected.num_dets)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes_net, expected.boxes_net, rtol=1e-5 if voting else 0)


@pytest.mark.parametrize("count", [0, 1, 2, 600])
@pytest.mark.parametrize("voting", [False, True])
def test_crowds(count: int, voting: bool) -> None:
    assert_as_the_network(crowd(7, 2, count or 1, 3, 300.0, empty=0.2), 0.6, voting=voting)
    boxes, scores, labels = crowd(7, 2, 4, 3, 300.0)
    none = boxes, scores * 0, labels
    assert finished(none, 0.6).num_dets.tolist() == [0, 0]


def test_a_chain_of_more_boxes_than_there_are_rounds() -> None:
    assert_as_the_network(chain(40), 0.3)


def test_a_box_of_no_area_covers_nothing() -> None:
    boxes = torch.tensor([[[5.0, 5, 5, 9], [5, 5, 5, 9], [0, 0, 8, 8]]])
    scores, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.zeros(1, 3, dtype=torch.int64)
    assert_as_the_network((boxes, scores, labels), 0.5)


def test_images_that_are_known_stay() -> None:
    candidates = BatchCandidates(*(part.numpy() for part in crowd(3, 2, 20, 2, 100.0)))
    known = BatchDetections(
        np.array([3, -1], np.int32),
        np.full((2, MAX_DET, 4), 7, np.float32),
        np.full((2, MAX_DET), 0.5, np.float32),
        np.full((2, MAX_DET), 1, np.int32),
    )
    found = finish_exactly(known, candidates, 0.6, voting=False)
    assert found.num_dets[0] == 3 < found.num_dets[1]
    for part in ("boxes_net", "scores", "labels"):
        np.testing.assert_array_equal(getattr(found, part)[0], getattr(known, part)[0])
    assert known.num_dets.tolist() == [3, -1], "what was given stays as it is"
