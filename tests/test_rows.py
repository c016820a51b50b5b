import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tood_deploy.matching import PAIR_IOU, Rows, batch_rows, pair_rows


def rows(*boxes: tuple[float, float, float, float, int], scores: list[float] | None = None) -> Rows:
    table = np.array(boxes, np.float32).reshape(-1, 5)
    given_scores = np.linspace(0.9, 0.1, len(table)) if scores is None else np.array(scores)
    return Rows(table[:, :4], given_scores.astype(np.float32), table[:, 4].astype(np.int32))


A, B, C = (0, 0, 10, 10, 0), (50, 50, 70, 80, 0), (0, 0, 10, 10, 1)


def test_the_same_rows_pair_in_place() -> None:
    assert pair_rows(rows(A, B), rows(A, B)).tolist() == [[0, 0], [1, 1]]


def test_another_order_pairs_all_the_same() -> None:
    assert sorted(pair_rows(rows(A, B, C), rows(B, C, A)).tolist()) == [[0, 2], [1, 0], [2, 1]]


def test_another_class_or_place_does_not_pair() -> None:
    assert pair_rows(rows(A), rows(C)).tolist() == []
    assert pair_rows(rows(A), rows((5, 0, 15, 10, 0))).tolist() == []


def test_each_box_is_used_once() -> None:
    assert pair_rows(rows(A, A), rows(B, A)).tolist() == [[1, 1]]
    assert pair_rows(rows(A, A), rows(A)).tolist() == [[0, 0]]


def test_a_box_without_area_pairs_with_itself_alone() -> None:
    point = (5, 5, 5, 5, 0)
    assert pair_rows(rows(point), rows(point)).tolist() == [[0, 0]]
    assert pair_rows(rows(point), rows(A)).tolist() == []


def test_nothing_pairs_with_nothing() -> None:
    assert pair_rows(rows(), rows()).shape == (0, 2)
    assert pair_rows(rows(A), rows()).shape == (0, 2)


def test_rows_of_a_batch_end_where_the_detections_end() -> None:
    boxes = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    first, second = batch_rows((np.array([2, 0]), boxes, boxes[..., 0], np.arange(6).reshape(2, 3)))
    assert first.boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert first.labels.tolist() == [0, 1]
    assert len(second) == 0


@given(
    st.lists(
        st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 20)] * 2, st.integers(0, 2)),
        max_size=12,
    ),
    st.randoms(),
)
def test_a_shuffled_list_pairs_completely(
    boxes: list[tuple[int, int, int, int, int]], random: object
) -> None:
    xyxy = [(x, y, x + w, y + h, label) for x, y, w, h, label in boxes]
    shuffled = list(xyxy)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    reference, found = rows(*xyxy), rows(*shuffled)
    pairs = pair_rows(reference, found)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    assert (reference.labels[pairs[:, 0]] == found.labels[pairs[:, 1]]).all()
    distinct = all(
        iou(a, b) <= PAIR_IOU for i, a in enumerate(xyxy) for b in xyxy[:i] if a[4] == b[4]
    )
    if distinct:
        assert len(pairs) == len(boxes)


def iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0, width) * max(0, height)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)
