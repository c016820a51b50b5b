"""Whether two programs give the same detections, in the form of `tood-infer --jsonl`."""

from collections.abc import Mapping, Sequence
from typing import Any

Objects = Sequence[Mapping[str, Any]]  # box xyxy in pixels, score, class_id


def assert_same_detections(
    expected: Objects, given: Objects, score_atol: float, box_atol: float
) -> None:
    """Match every object with the nearest of its class, whatever their order, and compare."""
    assert len(given) == len(expected)
    rest = list(given)
    for one in expected:
        same_class = [other for other in rest if other["class_id"] == one["class_id"]]
        assert same_class, f"no detection of class {one['class_id']} is left for {one}"
        other = min(same_class, key=lambda other: _apart(one, other) + _score_apart(one, other))
        rest.remove(other)
        assert _apart(one, other) <= box_atol, (one, other)
        assert _score_apart(one, other) <= score_atol, (one, other)


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the largest distance of two boxes' sides, in pixels."""
    return max(abs(a - b) for a, b in zip(one["box"], other["box"], strict=True))


def _score_apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return how far two scores are apart."""
    return abs(one["score"] - other["score"])
