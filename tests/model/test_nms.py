"""Suppression against a plain greedy loop, on everything that could break a fixed point in blocks.

And the form with a fixed number of rounds against `nms`: equal wherever it says that it is exact.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.crowds import Boxes, chain, crowd
from numpy.typing import NDArray

from tood_deploy.model.boxes import box_iou
from tood_deploy.model.nms import BLOCK, best_for, nms, nms_unrolled


def greedy(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float, max_det: int
) -> list[int]:
    """Return the positions that the textbook loop keeps of one image's boxes, best first."""
    overlap = (box_iou(boxes, boxes) > threshold) & (labels[:, None] == labels)
    kept: list[int] = []
    for i in range(len(scores)):
        if scores[i] > 0 and len(kept) < max_det and not any(overlap[j, i] for j in kept):
            kept.append(i)
    return kept


def assert_equals_greedy(candidates: Boxes, threshold: float, max_det: int) -> None:
    kept, counts = nms(*candidates, threshold, max_det)
    for image, (boxes, scores, labels) in enumerate(zip(*candidates, strict=True)):
        expected = greedy(boxes, scores, labels, threshold, max_det)
        assert counts[image].item() == len(expected)
        assert kept[image].tolist() == expected + [len(scores)] * (max_det - len(expected))


def coarse(
    seed: int, batch: int, count: int, classes: int, spread: float, empty: float = 0.0
) -> Boxes:
    """Return boxes on a coarse grid, many of them equal, touching or nested; many scores tie."""
    rng = np.random.default_rng(seed)
    corner = np.round(rng.random((batch, count, 2)) * spread)
    boxes = np.concatenate([corner, corner + np.round(rng.random((batch, count, 2)) * 10)], axis=2)
    scores = -np.sort(-np.round(rng.random((batch, count)), 2), axis=1)
    scores[:, int(count * (1 - empty)) :] = 0
    labels = torch.tensor(rng.integers(0, classes, (batch, count)))
    return (
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(scores, dtype=torch.float32),
        labels,
    )


class TestLoop:
    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1),
        batch=st.integers(1, 3),
        count=st.sampled_from([1, 2, 7, 60, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3]),
        classes=st.sampled_from([1, 2, 80]),
        spread=st.sampled_from([0.0, 5.0, 30.0, 300.0]),
        threshold=st.sampled_from([0.0, 0.3, 0.5, 0.6, 1.0]),
        max_det=st.sampled_from([1, 5, 100, 700]),
        empty=st.sampled_from([0.0, 0.5, 1.0]),
    )
    def test_equals_greedy(
        self,
        seed: int,
        batch: int,
        count: int,
        classes: int,
        spread: float,
        threshold: float,
        max_det: int,
        empty: float,
    ) -> None:
        candidates = coarse(seed, batch, count, classes, spread, empty)
        assert_equals_greedy(candidates, threshold, max_det)

    def test_equals_greedy_on_thousands(self) -> None:
        assert_equals_greedy(coarse(3, 1, 3840, 3, 150.0), 0.5, 100)

    def test_chain_in_which_each_box_covers_the_next(self) -> None:
        """A chain needs as many rounds as it has boxes; every second box stays."""
        kept, counts = nms(*chain(2 * BLOCK), 0.3, 2 * BLOCK)
        assert counts.item() == BLOCK
        assert kept[0, :BLOCK].tolist() == list(range(0, 2 * BLOCK, 2))

    def test_equal_boxes_keep_one_a_class(self) -> None:
        boxes = torch.tensor([0.0, 0, 4, 4]).expand(1, 300, 4)
        labels = (torch.arange(300) % 3)[None]
        kept, counts = nms(boxes, torch.full((1, 300), 0.5), labels, 0.6, 100)
        assert counts.item() == 3
        assert kept[0, :3].tolist() == [0, 1, 2]

    def test_boxes_without_area_suppress_nothing(self) -> None:
        boxes, labels = torch.tensor([[[3.0, 3, 3, 3]] * 4]), torch.zeros(1, 4, dtype=torch.int64)
        assert nms(boxes, torch.ones(1, 4), labels, 0.6, 10)[1].item() == 4

    def test_nothing_to_keep(self) -> None:
        labels = torch.zeros(2, 5, dtype=torch.int64)
        kept, counts = nms(torch.zeros(2, 5, 4), torch.zeros(2, 5), labels, 0.6, 3)
        assert counts.tolist() == [0, 0]
        assert (kept == 5).all()

    @pytest.mark.shared
    def test_equals_the_reference(self, goldens: Callable[[str], dict[str, NDArray[Any]]]) -> None:
        units = goldens("units")
        order = np.argsort(-units["nms_scores"], kind="stable")
        boxes, scores, labels = (
            torch.tensor(units[f"nms_{key}"][order])[None] for key in ("boxes", "scores", "labels")
        )
        kept, counts = nms(boxes, scores, labels, 0.6, len(order))
        assert set(order[kept[0, : int(counts)].numpy()]) == set(units["nms_keep"].tolist())


def agrees(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return for every image whether positions and count are the same."""
    return (first[0] == second[0]).all(1) & (first[1] == second[1])


class TestUnrolled:
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
        self,
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
        unrolled = nms_unrolled(*boxes, threshold, max_det, block=block, rounds=rounds)
        assert (agrees(unrolled, nms(*boxes, threshold, max_det)) | ~unrolled.exact).all()

    @pytest.mark.parametrize("spread", [60.0, 200.0, 800.0])
    @pytest.mark.parametrize("classes", [1, 80])
    def test_crowds_settle_within_the_rounds(self, spread: float, classes: int) -> None:
        """Three thousand boxes on top of one another, as no image has them."""
        boxes = crowd(7, 3, 1024, classes, spread)
        unrolled = nms_unrolled(*boxes, 0.6, 100)
        assert unrolled.exact.all()
        assert agrees(unrolled, nms(*boxes, 0.6, 100)).all()

    def test_every_block_is_looked_at(self) -> None:
        """A crowd on one spot comes first, so that all else that is kept is in the last block."""
        front, back = crowd(6, 2, 1000, 1, 0.0, side=0.0)[0], crowd(6, 2, 40, 1, 3000.0)[0]
        boxes = torch.cat((front, back + 100), 1)
        scores = torch.linspace(1, 0.1, 1040).expand(2, -1)
        labels = torch.zeros(2, 1040, dtype=torch.int64)
        unrolled = nms_unrolled(boxes, scores, labels, 0.6, 30, block=300)
        assert unrolled.exact.all()
        assert (unrolled.kept[:, 1:] >= 1000).all()
        assert agrees(unrolled, nms(boxes, scores, labels, 0.6, 30)).all()

    def test_chain_that_needs_more_rounds_is_not_exact(self) -> None:
        boxes = chain(40)
        assert not nms_unrolled(*boxes, 0.3, 100, rounds=16).exact.item()
        settled = nms_unrolled(*boxes, 0.3, 100, rounds=41)
        assert settled.exact.item()
        assert agrees(settled, nms(*boxes, 0.3, 100)).item()

    def test_boxes_behind_the_last_kept_one_need_not_settle(self) -> None:
        unrolled = nms_unrolled(*chain(40), 0.3, 5, rounds=16)
        assert unrolled.exact.item()
        assert unrolled.kept.tolist() == [[0, 2, 4, 6, 8]]

    def test_fewer_boxes_than_places(self) -> None:
        unrolled = nms_unrolled(*crowd(3, 2, 4, 1, 1000.0, side=1.0), 0.6, 10)
        assert unrolled.exact.all()
        assert unrolled.kept.tolist() == [[0, 1, 2, 3] + [4] * 6] * 2
        assert unrolled.num_dets.tolist() == [4, 4]

    def test_images_of_a_batch_have_thresholds_of_their_own(self) -> None:
        """As the serving form of the graph gives them: one for each image."""
        boxes, scores, labels = (
            part.expand(2, *part.shape[1:]) for part in crowd(5, 1, 200, 2, 100.0)
        )
        thresholds = torch.tensor([0.2, 0.7])
        unrolled = nms_unrolled(boxes, scores, labels, thresholds.reshape(2, 1, 1), 50)
        for i, threshold in enumerate((0.2, 0.7)):
            assert agrees(unrolled, nms(boxes, scores, labels, threshold, 50))[i]

    def test_is_one_graph_for_compilers(self) -> None:
        """Traced as a whole, without a branch on data; `nms` is not."""
        boxes = crowd(4, 2, 300, 3, 200.0)
        compiled = torch.compile(nms_unrolled, backend="eager", fullgraph=True)
        pairs = zip(compiled(*boxes, 0.6, 20), nms_unrolled(*boxes, 0.6, 20), strict=True)
        assert all(torch.equal(first, second) for first, second in pairs)


class TestBestAlone:
    def test_what_they_hold_is_that_of_all(self) -> None:
        boxes = crowd(3, 2, 300, 5, 800.0)
        kept, counts = nms(*boxes, 0.6, 20)
        unrolled = nms_unrolled(*boxes, 0.6, 20, best=100)
        assert unrolled.exact.all()
        assert torch.equal(unrolled.kept, kept)
        assert torch.equal(unrolled.num_dets, counts)

    def test_an_image_that_needs_more_is_not_exact(self) -> None:
        """The first image has candidates behind the best, and room for detections; not the second.

        The third has nothing but empty rows there.
        """
        boxes, scores, labels = crowd(3, 3, 300, 5, 800.0)
        scores[2, 100:] = 0
        unrolled = nms_unrolled(boxes, scores, labels, 0.6, 95, best=100)
        enough = unrolled.num_dets >= 95
        assert unrolled.exact.tolist() == [bool(enough[0]), bool(enough[1]), True]
        assert not nms_unrolled(boxes, scores, labels, 0.6, 101, best=100).exact[:2].any()

    def test_no_candidate_behind_the_best(self) -> None:
        boxes = crowd(3, 1, 100, 5, 800.0)
        assert nms_unrolled(*boxes, 0.6, 200, best=100).exact.all()

    def test_few_detections_alone_are_looked_for_among_them(self) -> None:
        assert (best_for(100), best_for(101)) == (1024, None)
