"""Counts of images and detections, and how far two of them are apart."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tood_deploy.distributions import (
    COUNTED_CONF,
    KINDS,
    SCORE_BINS,
    SIZE_BINS,
    ImageCounter,
    bin_names,
    shares,
    size_bin,
    stability_index,
)
from tood_deploy.manifest_sections import ImageStatistics, Parity

COUNTS = st.lists(st.integers(0, 1000), min_size=4, max_size=4).map(lambda c: np.array(c, float))


def filled(window: int | None = None, images: int = 3) -> ImageCounter:
    counter = ImageCounter(2, window)
    for _ in range(images):
        scores, labels = (
            np.array([1.0, 0.31, 0.3, 0.1], np.float32),
            np.array([1, 0, 0, 0], np.int32),
        )
        counter.add((480, 640), scores, labels)
    return counter


def test_counts_are_those_of_a_plain_loop() -> None:
    statistics = filled().statistics()
    assert (statistics.images, statistics.conf) == (3, COUNTED_CONF)
    assert statistics.scores == (3, *[0] * (SCORE_BINS - 2), 3)
    assert statistics.classes == (3, 3)
    assert sum(statistics.sizes) == statistics.sizes[size_bin((480, 640))] == 3


def test_an_image_without_detections_counts() -> None:
    counter = ImageCounter(2)
    counter.add((1, 1), np.zeros(0, np.float32), np.zeros(0, np.int32))
    assert (counter.images, counter.counts["sizes"][0]) == (1, 1)
    assert not shares(counter.counts["scores"]).any()


def test_a_window_forgets() -> None:
    counter = filled(window=10, images=1000)
    assert counter.images == pytest.approx(10, rel=0.01)
    assert counter.counts["sizes"].sum() == pytest.approx(10, rel=0.01)


def test_sizes_fall_into_bins_whose_names_are_their_edges() -> None:
    names = bin_names("sizes", ())
    assert len(names) == SIZE_BINS
    for size, name in (
        (63, "0"),
        (64, "64"),
        (90, "64"),
        (91, "91"),
        (640, "512"),
        (10**5, names[-1]),
    ):
        assert names[size_bin((size, size))] == name
    assert [len(bin_names(kind, ("a", "b"))) for kind in KINDS] == [SCORE_BINS, 2, SIZE_BINS]


@given(COUNTS, COUNTS)
def test_the_index_is_a_distance(first: np.ndarray, second: np.ndarray) -> None:
    assert stability_index(first, first) == 0
    assert stability_index(first, second) >= -1e-12
    assert stability_index(first, second) == pytest.approx(stability_index(second, first))


def test_few_images_of_one_size_are_alike() -> None:
    first, second = np.zeros(16), np.zeros(16)
    first[5], second[5] = 16, 40
    assert stability_index(first, second) == 0


def test_the_index_of_known_shares() -> None:
    first, second = np.array([50e6, 50e6]), np.array([80e6, 20e6])
    expected = 0.3 * np.log(1.6) + -0.3 * np.log(0.4)
    assert stability_index(first, second) == pytest.approx(expected, rel=1e-5)


def test_statistics_survive_the_manifest() -> None:
    statistics = filled().statistics()
    text = json.dumps(Parity(statistics=statistics).to_dict())
    assert Parity.from_dict(json.loads(text)).statistics == statistics
    assert Parity(onnx=Parity(statistics=statistics)).image_statistics == statistics
    assert Parity().image_statistics is None
    assert isinstance(statistics, ImageStatistics)
