"""Random candidates for suppression: crowds, and chains that need as many rounds as boxes."""

import torch

Boxes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def crowd(
    seed: int,
    batch: int,
    count: int,
    classes: int,
    spread: float,
    side: float = 60.0,
    empty: float = 0.0,
) -> Boxes:
    """Return random boxes, scores and labels, best first.

    Args:
        seed: of the random numbers.
        batch, count: images, and boxes of each.
        classes: number of classes.
        spread: side of the square that the boxes' corners lie in, in pixels.
        side: sides of boxes are up to 5 pixels longer than this.
        empty: share of the rows that hold no box.
    """
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, count, 2, generator=random) * spread
    boxes = torch.cat(
        (corner, corner + 5 + torch.rand(batch, count, 2, generator=random) * side), 2
    )
    scores = torch.rand(batch, count, generator=random).sort(1, descending=True).values
    scores[:, int(count * (1 - empty)) :] = 0
    return boxes, scores, torch.randint(classes, (batch, count), generator=random)


def chain(length: int) -> Boxes:
    """Return boxes that each cover a third of the next: at an IoU of 0.3 every second one stays.

    As many rounds are needed as there are boxes.
    """
    left = torch.arange(length, dtype=torch.float32)
    boxes = torch.stack((left, torch.zeros_like(left), left + 2, torch.ones_like(left)), 1)[None]
    return boxes, torch.linspace(1, 0.1, length)[None], torch.zeros(1, length, dtype=torch.int64)
