"""Made-up candidates for suppression: crowds, and chains that need as many rounds as they have boxes."""

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
    """Random boxes in a square of `spread` pixels, sorted; a share `empty` of the rows holds none."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, count, 2, generator=random) * spread
    boxes = torch.cat(
        (corner, corner + 5 + torch.rand(batch, count, 2, generator=random) * side), 2
    )
    scores = torch.rand(batch, count, generator=random).sort(1, descending=True).values
    scores[:, int(count * (1 - empty)) :] = 0
    return boxes, scores, torch.randint(classes, (batch, count), generator=random)


def chain(length: int) -> Boxes:
    """Each box covers the next by a third: every second stays, and as many rounds are needed as there are boxes."""
    left = torch.arange(length, dtype=torch.float32)
    boxes = torch.stack((left, torch.zeros_like(left), left + 2, torch.ones_like(left)), 1)[None]
    return boxes, torch.linspace(1, 0.1, length)[None], torch.zeros(1, length, dtype=torch.int64)
