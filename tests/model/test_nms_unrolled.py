"""Suppression in a fixed number of rounds: equal to `nms` wherever it says so, and says so wherever it can."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.crowds import chain, crowd

from tood_deploy.model.nms import nms, nms_unrolled
from tood_deploy.model.postprocess import Candidates, suppress, suppress_unrolled


def agrees(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """For every image, whether positions and count are the same."""
    return (found[0] == expected[0]).all(1) & (found[1] == expected[1])


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.sampled_from([1, 3, 40, 63, 64, 65, 300]),
    classes=st.sampled_from([1, 2, 80]),
    spread=st.sampled_from([0.0, 30.0, 300.0]),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    max_det=st.sampled_from([1, 5, 100]),
    empty=st.sampled_from([0.0, 0.5, 1.0]),
    rounds=st.integers(1, 12),
    block=st.sampled_from([1, 20, 64]),
)
def test_is_never_wrong_where_it_says_exact(
    seed: int,
    count: int,
    classes: int,
    spread: float,
    threshold: float,
    max_det: int,
    empty: float,
    rounds: int,
    block: int,
) -> None:
    boxes = crowd(seed, 2, count, classes, spread, empty=empty)
    found = nms_unrolled(*boxes, threshold, max_det, block=block, rounds=rounds)
    assert (agrees(found, nms(*boxes, threshold, max_det)) | ~found.exact).all()


@pytest.mark.parametrize("spread", [60.0, 200.0, 800.0])
@pytest.mark.parametrize("classes", [1, 80])
def test_crowds_settle_within_the_rounds(spread: float, classes: int) -> None:
    """Three thousand boxes on top of one another, as no image has them."""
    boxes = crowd(7, 3, 1024, classes, spread)
    found = nms_unrolled(*boxes, 0.6, 100)
    assert found.exact.all()
    assert agrees(found, nms(*boxes, 0.6, 100)).all()


def test_every_block_is_looked_at() -> None:
    """A crowd on one spot in front, so that what is kept beside it lies in the last block."""
    (boxes, scores, labels), (spread, _, _) = (
        crowd(6, 2, 1000, 1, 0.0, side=0.0),
        crowd(6, 2, 40, 1, 3000.0),
    )
    boxes = torch.cat((boxes, spread + 100), 1)
    scores, labels = (
        torch.linspace(1, 0.1, 1040).expand(2, -1),
        torch.zeros(2, 1040, dtype=torch.int64),
    )
    found = nms_unrolled(boxes, scores, labels, 0.6, 30, block=300)
    assert found.exact.all()
    assert (found.kept[:, 1:] >= 1000).all()
    assert agrees(found, nms(boxes, scores, labels, 0.6, 30)).all()


def test_chain_that_needs_more_rounds_is_told() -> None:
    boxes = chain(40)
    assert not nms_unrolled(*boxes, 0.3, 100, rounds=16).exact.item()
    settled = nms_unrolled(*boxes, 0.3, 100, rounds=41)
    assert settled.exact.item()
    assert agrees(settled, nms(*boxes, 0.3, 100)).item()


def test_what_lies_behind_the_last_wanted_box_need_not_settle() -> None:
    boxes = chain(40)
    found = nms_unrolled(*boxes, 0.3, 5, rounds=16)
    assert found.exact.item()
    assert found.kept.tolist() == [[0, 2, 4, 6, 8]]


def test_fewer_boxes_than_places() -> None:
    boxes = crowd(3, 2, 4, 1, 1000.0, side=1.0)
    found = nms_unrolled(*boxes, 0.6, 10)
    assert found.exact.all()
    assert found.kept.tolist() == [[0, 1, 2, 3] + [4] * 6] * 2
    assert found.num_dets.tolist() == [4, 4]


def test_images_of_a_batch_have_thresholds_of_their_own() -> None:
    """As the serving form of the graph gives them: one for each image."""
    boxes, scores, labels = (part.expand(2, *part.shape[1:]) for part in crowd(5, 1, 200, 2, 100.0))
    found = nms_unrolled(boxes, scores, labels, torch.tensor([0.2, 0.7]).reshape(2, 1, 1), 50)
    for i, threshold in enumerate((0.2, 0.7)):
        assert agrees(found, nms(boxes, scores, labels, threshold, 50))[i]


def test_detections_are_those_of_suppress() -> None:
    candidates = Candidates(*crowd(11, 2, 1500, 5, 400.0))
    found, exact = suppress_unrolled(candidates, 0.6)
    assert exact.all()
    assert all(
        torch.equal(one, other) for one, other in zip(found, suppress(candidates, 0.6), strict=True)
    )


def test_is_one_graph_for_compilers() -> None:
    """Traced as a whole, without a branch on data; `nms` is not."""
    boxes = crowd(4, 2, 300, 3, 200.0)
    compiled = torch.compile(nms_unrolled, backend="eager", fullgraph=True)
    assert all(
        torch.equal(one, other)
        for one, other in zip(compiled(*boxes, 0.6, 20), nms_unrolled(*boxes, 0.6, 20), strict=True)
    )
