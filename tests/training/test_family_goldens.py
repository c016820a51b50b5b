"""ATSS, GFL and PAA: targets, losses and gradients as MMDetection 3.3.0 computes them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from training.test_goldens import check_gradients, targets_of

from tood_deploy.model import DenseDetector
from tood_deploy.model.head import HeadMaps, SeparateTowers
from tood_deploy.training import AtssLoss, GflLoss, PaaLoss
from tood_deploy.training.assign import AnchorGrid, assign_atss
from tood_deploy.training.init import freeze
from tood_deploy.training.loss import FlatMaps, atss_positives, positives_factor

pytestmark = pytest.mark.shared
Arrays = dict[str, NDArray[Any]]
LOSSES = {"atss": AtssLoss, "gfl": GflLoss, "paa": PaaLoss}
NAMES = {  # ours, and MMDetection's
    "atss": {"cls": "cls", "box": "bbox", "centerness": "centerness"},
    "gfl": {"cls": "cls", "box": "bbox", "distribution": "dfl"},
    "paa": {"cls": "cls", "box": "bbox", "overlap": "iou"},
}
CASES = ("empty", "both", "pad", "allempty", "tiny")


class Seeded(NamedTuple):
    """A detector with stand-in weights, and its maps of the goldens' input."""

    model: DenseDetector
    maps: HeadMaps


@pytest.fixture(scope="module")
def golden(shared: Path) -> Callable[[str, str], Arrays]:
    """A function of detector and case."""

    def load(name: str, case: str) -> Arrays:
        path = shared / "reference" / "goldens_family" / f"train_{name}_{case}.npz"
        with np.load(path) as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="module")
def seeded(
    goldens: Callable[[str], Arrays], seeded_model: Callable[..., DenseDetector]
) -> Callable[[str], Seeded]:
    """A function of a detector's name; in float64 up to the maps, as for TOOD."""
    images = torch.from_numpy(goldens("train_input")["input"]).double()

    @functools.cache
    def build(name: str) -> Seeded:
        model = seeded_model(f"{name}-r50-1x")
        freeze(model, stages=1, norm=True)
        model.double()
        assert isinstance(model.bbox_head, SeparateTowers)
        return Seeded(model, model.bbox_head.maps(model.neck(model.backbone(images))))

    return build


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_equal_mmdetection(
    golden: Callable[[str, str], Arrays], seeded: Callable[[str], Seeded], name: str, case: str
) -> None:
    model, maps = seeded(name)
    expected = golden(name, case)
    model.zero_grad(set_to_none=True)
    losses = LOSSES[name](model.preset)(maps, targets_of(expected), 0)
    losses.total.backward(retain_graph=True)
    assert list(losses.terms) == list(NAMES[name])
    for ours, theirs in NAMES[name].items():
        own = losses.terms[ours].item()
        assert own == pytest.approx(float(expected[f"loss_{theirs}"]), rel=1e-5, abs=1e-7), ours
        if name != "paa":
            levels = expected[f"loss_{theirs}_levels"]
            np.testing.assert_allclose(losses.levels[ours], levels, rtol=1e-5, atol=1e-6)
    check_gradients(model, expected)


@pytest.mark.parametrize("case", CASES)
def test_targets_of_atss_and_gfl(golden: Callable[[str, str], Arrays], case: str) -> None:
    expected = golden("atss", case)
    sizes = ((16, 20), (8, 10), (4, 5), (2, 3), (1, 2))
    grid = AnchorGrid.of_maps([torch.zeros(1, 1, *size) for size in sizes])
    targets = targets_of(expected)
    for i, target in enumerate(targets):
        valid = grid.valid_mask(target.valid_hw)
        np.testing.assert_array_equal(valid, expected["valid_flags"][i])
        np.testing.assert_array_equal(valid, expected["tgt_label_weights"][i])
        assigned = assign_atss(grid, target.valid_hw, target.boxes)
        labels = torch.full((len(grid.points),), 80)
        labels[assigned.anchors] = target.labels[assigned.boxes]
        np.testing.assert_array_equal(labels, expected["tgt_labels"][i])
        goal = expected["tgt_bbox_targets"][i][assigned.anchors.numpy()].reshape(-1, 4)
        np.testing.assert_array_equal(target.boxes[assigned.boxes], goal)
    factor = positives_factor(atss_positives(grid, targets), len(targets))
    assert factor.item() == expected["num_pos"]


@pytest.mark.parametrize("case", CASES)
def test_candidates_and_mixtures_of_paa(
    golden: Callable[[str, str], Arrays], seeded: Callable[[str], Seeded], case: str
) -> None:
    model, maps = seeded("paa")
    expected, loss = golden("paa", case), PaaLoss(model.preset)
    flat = FlatMaps.of(maps, targets_of(expected), loss.preset)
    candidates, _ = loss.candidates(flat)
    losses, positives = loss.candidate_losses(flat, candidates), loss.positives(flat)
    for i in range(2):
        own = candidates.images == i
        order = candidates.anchors[own].argsort()
        np.testing.assert_array_equal(
            candidates.anchors[own][order], expected[f"pos_inds_{i}"], err_msg="candidates"
        )
        np.testing.assert_allclose(
            losses[own][order].detach(), expected[f"pos_losses_{i}"], rtol=2e-5
        )
        for part, key in ((candidates, "labels_before"), (positives, "labels_after")):
            labels, here = torch.full((428,), 80), part.images == i
            labels[part.anchors[here]] = part.labels[here]
            np.testing.assert_array_equal(labels, expected[f"{key}_{i}"], err_msg=key)
        assert int((positives.images == i).sum()) == expected[f"num_pos_{i}"]
