"""The list of sensitive layers and the search for those that stay float32; the damage against a
loop over cells."""

from collections.abc import Collection

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from recording import RecordingReporter

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import InputError
from tood_deploy.export.precision import sensitivity as sensitivity_module
from tood_deploy.export.precision.quantize import Ranges, quantize
from tood_deploy.export.precision.sensitivity import (
    DetectionMismatch,
    Prepared,
    Sensitivity,
    choose_kept,
    layer_groups,
    map_damage,
    measure_sensitivity,
)

IMGSZ = (96, 128)
LEVELS_HW = ((4, 6), (2, 3), (1, 2), (1, 1), (1, 1))
CLASSES = 3
IMAGES: list[Prepared] = [(synthetic_image(*IMGSZ, 40 + seed), IMGSZ) for seed in range(2)]


def random_maps(seed: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    corners = [rng.uniform(0, 10, (1, 4, *size)) for size in LEVELS_HW]
    boxes = [
        np.concatenate((both[:, :2], both[:, :2] + both[:, 2:] + 0.1), axis=1).astype(np.float32)
        for both in corners
    ]
    return [rng.uniform(0, 1, (1, CLASSES, *size)).astype(np.float32) for size in LEVELS_HW] + boxes


class TestDamage:
    def test_nothing_moved(self) -> None:
        assert map_damage(random_maps(0), random_maps(0)) == 0

    def test_nothing_found(self) -> None:
        nothing = [np.zeros_like(array) for array in random_maps(0)]
        assert map_damage(nothing, random_maps(1)) == 0

    def test_equals_a_loop_over_cells(self) -> None:
        reference, found = random_maps(0), random_maps(1)
        total = weights = 0.0
        for i, (rows, columns) in enumerate(LEVELS_HW):
            for row in range(rows):
                for column in range(columns):
                    scores, moved, box, other = (
                        maps[j][0, :, row, column]
                        for j in (i, 5 + i)
                        for maps in (reference, found)
                    )
                    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
                    overlap = max(sides[0], 0) * max(sides[1], 0)
                    union = np.prod(box[2:] - box[:2]) + np.prod(other[2:] - other[:2]) - overlap
                    weight = max(scores) ** 2
                    total += weight * (np.abs(scores - moved).max() + 1 - overlap / union)
                    weights += weight
        assert map_damage(reference, found) == pytest.approx(total / weights, rel=1e-5)

    def test_what_lies_in_the_background_counts_little(self) -> None:
        reference, front, back = (random_maps(0) for _ in range(3))
        reference[0][0, :, 0, 0], reference[0][0, :, 0, 1] = 0.9, 0.01
        front[0], back[0] = reference[0].copy(), reference[0].copy()
        front[0][0, 0, 0, 0] -= 0.005
        back[0][0, 0, 0, 1] -= 0.005
        assert map_damage(reference, front) > 1000 * map_damage(reference, back) > 0


class TestList:
    def test_parts_of_a_layer_are_one_group(self, model: onnx.ModelProto) -> None:
        groups = layer_groups(model)
        assert len(groups) == 20 + 8 + 6 + 4
        assert groups[0] == "backbone.conv1"
        assert {
            "bbox_head.cls_decomp.kernels.*",
            "backbone.layer2.0.downsample.*",
            "bbox_head.inter_convs.0.conv",
        } <= set(groups)

    @pytest.mark.slow
    def test_a_layer_with_bad_ranges_comes_first(
        self, model: onnx.ModelProto, ranges: Ranges, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        groups = ("backbone.conv1", "bbox_head.inter_convs.*", "*")
        monkeypatch.setattr(sensitivity_module, "layer_groups", lambda _: groups[:2])
        spoilt = dict(ranges) | {"pixels": (0.0, 0.5)}
        bad, good = (
            measure_sensitivity(model, found, IMAGES[:1], scheme="u8s8")
            for found in (spoilt, ranges)
        )
        assert [one.group for one in bad] == list(groups[:2])
        damage = {one.group: one.damage for one in good}
        assert bad[0].damage > 3 * damage["backbone.conv1"] > 0
        assert (
            bad[1].damage == damage[groups[1]] > 0
        )  # alone: what other layers suffer does not count


class TestSearch:
    RANKED = tuple(Sensitivity(f"layer{i}", 1 / (i + 1)) for i in range(11))

    @pytest.mark.parametrize("needed", range(12))
    def test_finds_the_fewest(self, needed: int) -> None:
        asked: list[int] = []

        def drop_of(patterns: Collection[str]) -> float:
            assert list(patterns) == [f"layer{i}" for i in range(len(patterns))]
            asked.append(len(patterns))
            return 0.5 if len(patterns) >= needed else 0.6 + needed - len(patterns)

        reporter = RecordingReporter()
        found = choose_kept(self.RANKED, drop_of, 0.5, reporter)
        assert found.keep == tuple(f"layer{i}" for i in range(needed))
        assert found.drop == (
            0.5 if needed < 11 else 0.0
        )  # without any 8-bit layer nothing has to be measured
        assert len(set(asked)) == len(asked) <= 8
        assert [count for count, _ in found.trials if count < 11] == asked
        assert found.ranked == self.RANKED
        assert reporter.lines[0].startswith(
            "most sensitive to 8 bits: layer0 1.0000, layer1 0.5000, "
        )
        assert len(reporter.lines) == 1 + len(found.trials)


class TestMismatch:
    def test_the_reference_equals_itself(self, model: onnx.ModelProto) -> None:
        assert DetectionMismatch(model, IMAGES, 0.05)(model) == 0

    def test_8_bits_cost_some_and_bad_ranges_more(
        self, model: onnx.ModelProto, ranges: Ranges
    ) -> None:
        mismatch = DetectionMismatch(model, IMAGES, 0.05)
        good = mismatch(quantize(model, ranges, scheme="u8s8"))
        bad = mismatch(quantize(model, dict(ranges) | {"pixels": (0.0, 0.1)}, scheme="u8s8"))
        assert 0 <= good < bad <= 100

    def test_nothing_to_find(self, model: onnx.ModelProto) -> None:
        with pytest.raises(
            InputError, match=r"nothing is found with a score above 0\.99 in 2 calibration images"
        ):
            DetectionMismatch(model, IMAGES, 0.99)
