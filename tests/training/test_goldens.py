"""Assignment, losses and gradients: as MMDetection 3.3.0 and the authors' code compute them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tood_deploy.model import DenseDetector, build_model
from tood_deploy.model.boxes import box_giou
from tood_deploy.model.head import HeadOutput
from tood_deploy.model.heads.tood import TaskAlignedHead
from tood_deploy.presets import PRESETS
from tood_deploy.training import Targets, ToodLoss
from tood_deploy.training.assign import (
    AnchorGrid,
    Assignment,
    assign_atss,
    assign_task_aligned,
    normalised_metrics,
)
from tood_deploy.training.init import freeze
from tood_deploy.training.loss import focal_loss, quality_focal_loss

pytestmark = pytest.mark.shared
Arrays = dict[str, NDArray[Any]]
Goldens = Callable[[str], Arrays]
CASES = [
    *[
        f"af_{case}_epoch{epoch}"
        for case in ("empty", "both", "pad", "allempty", "tiny")
        for epoch in (0, 4)
    ],
    *[f"ab_{case}_epoch{epoch}" for case in ("both", "empty") for epoch in (0, 4)],
]


@pytest.fixture(scope="module")
def models(seeded_fill: Callable[..., Arrays]) -> dict[str, DenseDetector]:
    """R50 with both kinds of anchors, stand-in weights, stem and first stage frozen.

    In float64 up to the head's outputs: a gradient jumps where a ReLU or a sample crosses an edge,
    and in float32 it depends on the number of threads which side a few values are on.
    """

    free, based = (
        build_model(replace(PRESETS[name], convention="mmdet"))
        for name in ("r50-1x", "r50-anchor-1x")
    )
    state = seeded_fill({key: tuple(value.shape) for key, value in free.state_dict().items()})
    for model in (free, based):  # the kind of anchors leaves no trace in keys and shapes
        model.load_state_dict(
            {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()}
        )
        freeze(model, stages=1, norm=True)
        model.double()
    return {"af": free, "ab": based}


@pytest.fixture(scope="module")
def outputs(goldens: Goldens, models: dict[str, DenseDetector]) -> dict[str, HeadOutput]:
    """What the two say of the goldens' input; kept, because many tests go backwards from it."""
    images = torch.from_numpy(goldens("train_input")["input"]).double()
    return {name: model(images) for name, model in models.items()}


def targets_of(golden: Arrays) -> list[Targets]:
    return [
        Targets(
            torch.from_numpy(golden[f"gt_bboxes_{i}"]),
            torch.from_numpy(golden[f"gt_labels_{i}"]),
            tuple(golden[f"img_shape_{i}"].tolist()),
        )
        for i in range(2)
    ]


def flat_maps(out: HeadOutput) -> tuple[torch.Tensor, torch.Tensor, AnchorGrid]:
    grid = AnchorGrid.of_maps(out.scores)
    scores = torch.cat([level.flatten(2) for level in out.scores], 2)
    boxes = (
        torch.cat([level.flatten(2) for level in out.boxes_strides], 2).transpose(1, 2)
        * grid.strides[:, None]
    )
    return scores.detach(), boxes.detach(), grid


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_mmdetection(
    goldens: Goldens, models: dict[str, DenseDetector], outputs: dict[str, HeadOutput], case: str
) -> None:
    golden, model = goldens(f"train_{case}"), models[case[:2]]
    model.zero_grad(set_to_none=True)
    losses = ToodLoss(model.preset)(
        outputs[case[:2]], targets_of(golden), epoch=int(golden["epoch"])
    )
    (losses.cls + losses.box).backward(retain_graph=True)
    assert losses.cls.item() == pytest.approx(float(golden["loss_cls"]), rel=1e-5)
    assert losses.box.item() == pytest.approx(float(golden["loss_bbox"]), rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(
        losses.levels["cls"], golden["loss_cls_levels"], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        losses.levels["box"], golden["loss_bbox_levels"], rtol=1e-5, atol=1e-6
    )
    check_gradients(model, golden)


def check_gradients(model: DenseDetector, golden: Arrays) -> None:
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    # Without any box nothing but classification learns, and a gradient may be absent or zero alike.
    norms = {name: 0.0 if g is None else g.double().norm().item() for name, g in gradients.items()}
    expected = dict(zip(golden["grad_names"].tolist(), golden["grad_norms"].tolist(), strict=True))
    for name, norm in expected.items():
        assert norms.get(name, 0.0) == pytest.approx(
            0.0 if np.isnan(norm) else norm, rel=1e-4, abs=1e-7
        ), name
    total = np.sqrt(sum(norm**2 for norm in norms.values()))
    assert total == pytest.approx(float(golden["total_grad_norm"]), rel=1e-5)
    for key in golden:
        found = gradients[key.removeprefix("grad/")] if key.startswith("grad/") else None
        if found is not None:
            scale = max(float(np.abs(golden[key]).max()), 1e-3)
            np.testing.assert_allclose(
                found, golden[key], rtol=1e-3, atol=1e-4 * scale, err_msg=key
            )


@pytest.mark.parametrize("case", CASES)
def test_assigned_anchors_equal_mmdetection(
    goldens: Goldens, outputs: dict[str, HeadOutput], case: str
) -> None:
    golden = goldens(f"train_{case}")
    scores, boxes, grid = flat_maps(outputs[case[:2]])
    for i, target in enumerate(targets_of(golden)):
        valid = grid.valid_mask(target.valid_hw)
        np.testing.assert_array_equal(valid, golden["valid_flags"][i])
        if int(golden["epoch"]) < 4:
            found = assign_atss(grid, target.valid_hw, target.boxes)
            metrics = found.metrics
        else:
            found = assign_task_aligned(
                scores[i], boxes[i], grid.points, valid, target.boxes, target.labels
            )
            metrics = normalised_metrics(found, len(target.boxes))
        labels = torch.full((len(grid.points),), 80)
        labels[found.anchors] = target.labels[found.boxes]
        np.testing.assert_array_equal(labels, golden["tgt_labels"][i])
        dense = torch.zeros(len(grid.points)).index_put((found.anchors,), metrics)
        np.testing.assert_allclose(dense, golden["tgt_metrics"][i], rtol=2e-5, atol=1e-7)
        np.testing.assert_array_equal(
            target.boxes[found.boxes],
            golden["tgt_bbox_targets"][i][found.anchors.numpy()].reshape(-1, 4),
        )


@pytest.mark.parametrize(
    "case", ["af_both_epoch0", "af_both_epoch4", "af_pad_epoch0", "af_pad_epoch4"]
)
def test_authors_variant_equals_the_authors_code(
    goldens: Goldens, models: dict[str, DenseDetector], case: str
) -> None:
    golden, model = goldens(f"fcjian_train_{case}"), models["af"]
    model.zero_grad(set_to_none=True)
    assert isinstance(model.bbox_head, TaskAlignedHead)
    model.bbox_head.keep_inverted = True
    try:
        out = model(torch.from_numpy(goldens("train_input")["input"]).double())
    finally:
        model.bbox_head.keep_inverted = False
    losses = ToodLoss(model.preset, variant="authors")(
        out, targets_of(goldens(f"train_{case}")), epoch=int(case[-1])
    )
    (losses.cls + losses.box).backward()
    np.testing.assert_allclose(
        losses.levels["cls"], golden["loss_cls_levels"], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        losses.levels["box"], golden["loss_bbox_levels"], rtol=1e-5, atol=1e-6
    )
    norm = torch.stack(
        [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    ).norm()
    assert norm.item() == pytest.approx(float(golden["total_grad_norm"]), rel=1e-5)


def test_authors_variant_does_not_raise_averaging_factors(
    goldens: Goldens, outputs: dict[str, HeadOutput]
) -> None:
    box = ToodLoss("r50-1x", variant="authors")(
        outputs["af"], targets_of(goldens("train_af_tiny_epoch0")), epoch=0
    ).box
    assert box.item() == pytest.approx(
        1.961, abs=5e-4
    )  # reference/SPEC.md section 3; MMDetection: 1.160


@pytest.mark.parametrize("name", ["assign_single", "assign_none"])
@pytest.mark.parametrize("topk", [13, 5])
def test_task_aligned_assigner(goldens: Goldens, name: str, topk: int) -> None:
    golden = {key: torch.from_numpy(value) for key, value in goldens(name).items()}
    points = (golden["priors"][:, :2] + golden["priors"][:, 2:]) / 2
    found = assign_task_aligned(
        golden["pred_scores"].T.contiguous(),
        golden["pred_bboxes"],
        points,
        torch.ones(len(points), dtype=torch.bool),
        golden["gt_bboxes"],
        golden["gt_labels"],
        topk,
    )
    _check_assignment(found, golden, f"tal{topk}")
    metrics = torch.zeros(len(points)).index_put((found.anchors,), found.metrics)
    torch.testing.assert_close(metrics, golden[f"tal{topk}_assign_metrics"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["assign_single", "assign_none"])
def test_atss_assigner(goldens: Goldens, name: str) -> None:
    golden = {key: torch.from_numpy(value) for key, value in goldens(name).items()}
    maps = [torch.zeros(1, 1, *size) for size in ((16, 20), (8, 10), (4, 5), (2, 3), (1, 2))]
    _check_assignment(
        assign_atss(AnchorGrid.of_maps(maps), (128, 160), golden["gt_bboxes"]), golden, "atss"
    )


def _check_assignment(found: Assignment, golden: dict[str, torch.Tensor], prefix: str) -> None:
    indices = torch.zeros_like(golden[f"{prefix}_gt_inds"]).index_put(
        (found.anchors,), found.boxes + 1
    )
    torch.testing.assert_close(indices, golden[f"{prefix}_gt_inds"])
    torch.testing.assert_close(
        found.ious, golden[f"{prefix}_max_overlaps"][found.anchors], rtol=1e-5, atol=1e-7
    )


def test_focal_losses_on_probabilities(goldens: Goldens) -> None:
    golden = {key: torch.from_numpy(np.asarray(value)) for key, value in goldens("units").items()}
    labels, positive = golden["loss_labels"], golden["loss_labels"] < 5
    for name, loss in (("focal", focal_loss), ("qfl", quality_focal_loss)):
        scores = golden["loss_prob"].clone().requires_grad_()
        wanted = torch.zeros_like(scores).detach()
        wanted[positive, labels[positive]] = (
            1.0 if name == "focal" else golden["loss_metric"][positive]
        )
        total = (loss(scores, wanted) * golden["loss_weight"][:, None]).sum()
        total.backward()
        assert total.item() == pytest.approx(golden[name].item(), rel=1e-6)
        torch.testing.assert_close(scores.grad, golden[f"{name}_grad"], rtol=1e-5, atol=1e-6)


def test_giou_loss(goldens: Goldens) -> None:
    golden = {key: torch.from_numpy(np.asarray(value)) for key, value in goldens("units").items()}
    predicted = golden["giou_pred"].clone().requires_grad_()
    loss = (2 * (1 - box_giou(predicted, golden["giou_target"])) * golden["giou_weight"]).sum()
    loss.backward()
    assert loss.item() == pytest.approx(golden["giou"].item(), rel=1e-6)
    torch.testing.assert_close(predicted.grad, golden["giou_grad"], rtol=1e-5, atol=1e-6)
