"""The loss: degenerate targets, its stages, its protection, its share among workers."""

import pytest
import torch
from torch import Tensor

from tood_deploy.errors import ToodError
from tood_deploy.model import HeadOutput
from tood_deploy.presets import Convention
from tood_deploy.training import Targets, ToodLoss
from tood_deploy.training.loss import centerness, quality_focal_loss

SIZES = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))


def maps(batch: int = 2, classes: int = 80, seed: int = 0) -> HeadOutput:
    """Scores and boxes of two images of 64 x 64; every box reaches two cells to each side."""
    torch.manual_seed(seed)
    scores = [
        torch.rand(batch, classes, *size).mul(0.9).add(0.05).requires_grad_() for size in SIZES
    ]
    boxes = []
    for height, width in SIZES:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points = (
            torch.stack((x, y, x, y)).float() + torch.tensor([-2.0, -2.0, 2.0, 2.0])[:, None, None]
        )
        boxes.append((points + 0.3 * torch.rand(batch, 4, height, width)).requires_grad_())
    return HeadOutput(scores, boxes)


def nothing() -> Targets:
    return Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (64, 64))


def one_box(label: int = 3) -> Targets:
    return Targets(torch.tensor([[8.0, 10.0, 40.0, 44.0]]), torch.tensor([label]), (64, 64))


@pytest.mark.parametrize("epoch", [0, 4])
def test_no_boxes_at_all(epoch: int) -> None:
    out = maps()
    losses = ToodLoss("r50-1x")(out, [nothing(), nothing()], epoch)
    (losses.cls + losses.box).backward()
    assert losses.box.item() == 0
    assert losses.cls.item() > 0
    assert losses.positives == 0
    assert all(level.grad is not None and not level.grad.any() for level in out.boxes_strides)


@pytest.mark.parametrize("epoch", [0, 3, 4, 11])
def test_the_epoch_alone_decides_the_stage(epoch: int) -> None:
    loss = ToodLoss("r50-1x")
    first = loss(maps(), [one_box(), nothing()], 4)
    found = loss(maps(), [one_box(), nothing()], epoch)
    assert (found.cls.item() == first.cls.item()) == (epoch >= 4)


def test_padding_counts_in_the_authors_variant_alone() -> None:
    small = Targets(one_box().boxes, one_box().labels, (32, 32))
    whole = Targets(one_box().boxes, one_box().labels, (64, 64))
    variants: tuple[tuple[Convention, bool], ...] = (("authors", True), ("mmdet", False))
    for variant, alike in variants:
        loss = ToodLoss("r50-1x", variant=variant)
        sums = []
        for target in (small, whole):
            out = maps(1)
            losses = loss(out, [target], 4)
            losses.cls.backward()
            corner = out.scores[0].grad
            assert corner is not None
            sums.append(bool(corner[0, :, 7, 7].any()))
        assert (sums[0] == sums[1]) == alike


def test_authors_variant_follows_the_preset() -> None:
    assert ToodLoss("x101-dcn-2x").variant == "authors"
    assert ToodLoss("r50-1x").variant == "mmdet"


def test_a_nan_score_makes_the_loss_nan() -> None:
    out = maps()
    with torch.no_grad():
        out.scores[1][0, 0, 0, 0] = float("nan")
    for epoch in (0, 4):
        assert ToodLoss("r50-1x")(out, [one_box(), one_box()], epoch).cls.isnan()


@pytest.mark.parametrize("label", [-1, 80])
def test_labels_out_of_range_are_refused(label: int) -> None:
    with pytest.raises(
        ToodError, match=rf"image 1: labels \[{label}\]; expected class numbers from 0 to 79"
    ):
        ToodLoss("r50-1x")(maps(), [one_box(), one_box(label)], 4)


def test_one_target_for_each_image() -> None:
    with pytest.raises(ToodError, match="1 targets for a batch of 2"):
        ToodLoss("r50-1x")(maps(), [one_box()], 4)


def test_mis_shaped_targets_are_refused() -> None:
    with pytest.raises(ToodError, match=r"expected \(G, 4\) and \(G,\)"):
        Targets(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64), (32, 32))


def test_centerness() -> None:
    points, boxes = (
        torch.tensor([[5.0, 5.0], [1.0, 5.0], [0.0, 5.0]]),
        torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(3, 1),
    )
    torch.testing.assert_close(centerness(points, boxes), torch.tensor([1.0, (1 / 9) ** 0.5, 0.0]))


def test_quality_focal_loss_is_zero_where_the_score_is_right() -> None:
    wanted = torch.tensor([0.0, 0.3, 1.0])
    torch.testing.assert_close(quality_focal_loss(wanted, wanted), torch.zeros(3))
    surprised: Tensor = quality_focal_loss(torch.tensor([1.0]), torch.tensor([0.0]))
    assert surprised.item() == 100  # the logarithm is cut off at -100


def test_flatter_boxes_cost_more() -> None:
    near = ToodLoss("r50-1x")(maps(), [one_box(), nothing()], 0).box
    far = HeadOutput(maps().scores, [level * 3 for level in maps().boxes_strides])
    assert ToodLoss("r50-1x")(far, [one_box(), nothing()], 0).box > near
