import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tood_deploy import Detections, ToodError
from tood_deploy.inference.slicing import (
    MERGES,
    METRICS,
    Slicing,
    merge_detections,
    merge_windows,
    shift,
)
from tood_deploy.windows import boxes_in_window, slice_windows

# What SAHI 0.12.8 gives for windows and boxes; made once, since it would replace our OpenCV.
ORACLE: dict[str, Any] = json.loads(
    (Path(__file__).parent / "sahi_oracle.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", ORACLE["windows"], ids=lambda case: str(case["image_hw"]))
def test_windows_are_those_of_sahi(case: dict[str, Any]) -> None:
    windows = slice_windows(tuple(case["image_hw"]), tuple(case["size_hw"]), case["overlap"])
    assert windows.tolist() == case["windows"]


@given(
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(2, 90), st.integers(2, 90)),
    st.floats(0, 0.9),
)
def test_windows_cover_every_pixel_and_have_one_size(
    image_hw: tuple[int, int], size_hw: tuple[int, int], overlap: float
) -> None:
    covered = np.zeros(image_hw, bool)
    for left, top, right, bottom in slice_windows(image_hw, size_hw, overlap).tolist():
        assert bottom - top == min(size_hw[0], image_hw[0])
        assert right - left == min(size_hw[1], image_hw[1])
        covered[top:bottom, left:right] = True
    assert covered.all()


def rows(detections: Detections) -> list[tuple[float, ...]]:
    columns = (detections.boxes, detections.scores[:, None], detections.class_ids[:, None])
    return sorted(map(tuple, np.concatenate(columns, axis=1).tolist()))


@pytest.mark.parametrize(
    "case",
    ORACLE["merging"],
    ids=lambda case: f"{case['merge']}-{case['metric']}-{case['class_agnostic']}",
)
def test_merging_is_that_of_sahi(case: dict[str, Any]) -> None:
    detections = Detections(
        np.array(case["boxes"], np.float32),
        np.array(case["scores"], np.float32),
        np.array(case["classes"], np.int32),
    )
    slicing = Slicing(
        64,
        merge=case["merge"],
        metric=case["metric"],
        threshold=case["threshold"],
        class_agnostic=case["class_agnostic"],
    )
    merged = merge_detections(detections, slicing)
    assert rows(merged) == [tuple(map(float, row)) for row in case["merged"]]
    assert (np.diff(merged.scores) <= 0).all(), "best first"
    assert len(merged) < len(detections)


def overlap(one: NDArray[Any], other: NDArray[Any], metric: str) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = np.float32(0) if (sides <= 0).any() else sides[0] * sides[1]
    areas = [np.prod(box[2:] - box[:2]) for box in (one, other)]
    base = areas[0] + areas[1] - shared if metric == "iou" else min(areas)
    return float(shared / base) if base > 0 else 0.0


def merge_by_loops(detections: Detections, slicing: Slicing) -> list[tuple[float, ...]]:
    """The same in plain loops over all pairs."""
    boxes, scores, labels = detections.boxes, detections.scores, detections.class_ids
    count = len(boxes)
    order = sorted(range(count), key=lambda i: (-scores[i], *boxes[i]))
    match = np.zeros((count, count), bool)
    for i in range(count):
        for j in range(count):
            same = slicing.class_agnostic or labels[i] == labels[j]
            value = overlap(boxes[i], boxes[j], slicing.metric)
            match[i, j] = i != j and same and value >= np.float32(slicing.threshold)
    keeper: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    for i in order:
        if i in keeper and slicing.merge != "nmm":
            continue
        own = keeper.setdefault(i, i)
        candidates = range(count) if slicing.merge == "nmm" else order
        for j in candidates:
            takes = (scores[j], *boxes[j]) <= (scores[i], *boxes[i])
            if match[i, j] and j not in keeper and (takes or slicing.merge != "nmm"):
                keeper[j] = own
                groups.setdefault(own, []).append(j)
    result = []
    for i in (i for i in range(count) if keeper[i] == i):
        box, label = boxes[i].astype(np.float64), labels[i]
        for j in groups.get(i, ()) if slicing.merge != "nms" else ():
            if overlap(box, boxes[j].astype(np.float64), slicing.metric) >= slicing.threshold:
                box = np.append(np.minimum(box, boxes[j])[:2], np.maximum(box, boxes[j])[2:])
                label = labels[j] if scores[j] == scores[i] else label
        result.append((*box.tolist(), float(scores[i]), float(label)))
    return sorted(result)


# Few values, so that boxes and scores are often equal and overlaps lie on the threshold.
BOX = st.tuples(*[st.integers(0, 12)] * 2, *[st.integers(0, 8)] * 2)


@settings(deadline=None, max_examples=120)
@given(
    st.lists(st.tuples(BOX, st.integers(1, 4), st.integers(0, 1)), max_size=25),
    st.sampled_from(MERGES),
    st.sampled_from(METRICS),
    st.sampled_from((0.1, 0.25, 0.5, 1.0)),
    st.booleans(),
)
def test_merging_equals_plain_loops(
    objects: list[Any], merge: Any, metric: Any, threshold: float, class_agnostic: bool
) -> None:
    detections = Detections(
        np.array([(x, y, x + w, y + h) for (x, y, w, h), _, _ in objects], np.float32).reshape(
            -1, 4
        ),
        np.array([score / 4 for _, score, _ in objects], np.float32),
        np.array([label for _, _, label in objects], np.int32),
    )
    slicing = Slicing(8, 0.2, True, merge, metric, threshold, class_agnostic)
    assert rows(merge_detections(detections, slicing)) == merge_by_loops(detections, slicing)


def crowd(count: int) -> Detections:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 4000, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 60, (count, 2))], axis=1)
    return Detections(
        boxes.astype(np.float32),
        rng.random(count, np.float32),
        rng.integers(0, 5, count).astype(np.int32),
    )


@pytest.mark.parametrize("merge", MERGES)
def test_twenty_thousand_boxes_take_no_second(merge: Any) -> None:
    detections = crowd(20_000)
    started = time.process_time()
    merged = merge_detections(detections, Slicing(640, merge=merge))
    assert time.process_time() - started < 1
    assert 10_000 < len(merged) < 20_000


def test_nothing_and_one_box_stay_as_they_are() -> None:
    assert len(merge_windows([Detections.empty(("a",))] * 3, Slicing(8))) == 0
    one = crowd(1)
    assert rows(merge_windows([one, one[:0]], Slicing(8))) == rows(one)


def test_one_part_is_not_merged() -> None:
    together = crowd(200)
    boxes = np.repeat(together.boxes[:1], 200, axis=0)
    same = Detections(boxes, together.scores, together.class_ids)
    assert len(merge_windows([same], Slicing(8))) == 200


def test_boxes_are_shifted_by_their_window() -> None:
    box = Detections(np.array([[1, 2, 3, 4]], np.float32), np.ones(1, np.float32), np.zeros(1, int))
    assert shift(box, np.array([100, 20, 164, 84])).boxes.tolist() == [[101, 22, 103, 24]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": 0}, "0"),
        ({"size": (640, -1)}, "-1"),
        ({"size": (1, 2, 3)}, "1 2 3"),
        ({"size": 8, "overlap": 0.95}, "0.95"),
        ({"size": 8, "overlap": -0.1}, "-0.1"),
        ({"size": 8, "merge": "soft"}, "greedy_nmm"),
        ({"size": 8, "metric": "giou"}, "ios"),
        ({"size": 8, "threshold": 0}, "above 0"),
        ({"size": 8, "threshold": 1.5}, "1.5"),
    ],
)
def test_wrong_slicing_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ToodError, match=named):
        Slicing(**options)


def test_boxes_are_cut_at_a_windows_border_and_kept_by_visible_share() -> None:
    boxes = np.array(
        [[0, 0, 10, 10], [15, 15, 25, 25], [19, 0, 39, 10], [30, 30, 40, 40], [5, 5, 5, 9]],
        np.float32,
    )
    window = np.array([0, 0, 20, 20])
    cut, kept = boxes_in_window(boxes, window, 0.1)
    assert kept.tolist() == [0, 1]
    assert cut.tolist() == [[0, 0, 10, 10], [15, 15, 20, 20]]
    assert boxes_in_window(boxes, window, 0.05)[1].tolist() == [0, 1, 2]
    shifted, _ = boxes_in_window(boxes, np.array([15, 15, 35, 35]), 0.1)
    assert shifted.tolist() == [[0, 0, 10, 10], [15, 15, 20, 20]]
