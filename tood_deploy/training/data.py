"""Images into batches: annotated images in, augmented batches out.

The order and every random choice follow from seed, epoch and position alone. So nothing needs to be
stored to go on with a broken run exactly, with any number of loading processes and workers. Knows
no network.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tood_deploy.errors import InputError, InputWarning
from tood_deploy.preprocess import pad_size, resize
from tood_deploy.training.assign import Targets
from tood_deploy.training.records import Record, read_image


@dataclass(frozen=True)
class Augment:
    """What is done to a training image.

    Attributes:
        imgsz: (short side, long side) in pixels to fit.
        short_sides: smallest and largest short side, drawn per image in place of `imgsz`'s.
        flip, flip_vertical: share of images mirrored left to right, and top to bottom.
        colour: strength of brightness, contrast and saturation, 0 for none.
    """

    imgsz: tuple[int, int]
    short_sides: tuple[int, int] | None = None
    flip: float = 0.5
    flip_vertical: float = 0.0
    colour: float = 0.0

    def __call__(
        self, image_bgr: NDArray[np.uint8], boxes: NDArray[np.float32], rng: np.random.Generator
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Change an image.

        Args:
            image_bgr: (H, W, 3) uint8.
            boxes: (G, 4) xyxy in its pixels.
            rng: decides what is drawn at random.

        Returns:
            The changed image (H', W', 3) uint8 BGR and its boxes (G, 4) xyxy in pixels of it.
        """
        short = self.imgsz[0]
        if self.short_sides is not None:
            short = int(rng.integers(self.short_sides[0], self.short_sides[1] + 1))
        image_bgr, boxes = scale(image_bgr, boxes, (short, self.imgsz[1]))
        if rng.random() < self.flip:
            image_bgr, boxes = mirror(image_bgr, boxes)
        if rng.random() < self.flip_vertical:
            image_bgr, boxes = mirror_vertically(image_bgr, boxes)
        if self.colour:
            image_bgr = recolour(image_bgr, *(1 + self.colour * rng.uniform(-1, 1, 3)))
        return np.ascontiguousarray(image_bgr), boxes


def scale(
    image_bgr: NDArray[np.uint8], boxes: NDArray[np.float32], imgsz: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Scale to fit, aspect kept; each direction has its own factor, as rounding gives it.

    Args:
        image_bgr: (H, W, 3) uint8.
        boxes: (G, 4) xyxy in its pixels.
        imgsz: (short side, long side) in pixels.
    """
    resized = resize(image_bgr, imgsz)
    factors = [
        new / old for new, old in zip(resized.shape[1::-1], image_bgr.shape[1::-1], strict=True)
    ]
    return resized, (boxes * np.array(factors * 2, np.float32)).astype(np.float32, copy=False)


def mirror(
    image_bgr: NDArray[np.uint8], boxes: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Mirror left to right: image (H, W, 3) and boxes (G, 4) xyxy in its pixels."""
    width = np.float32(image_bgr.shape[1])
    return image_bgr[:, ::-1], np.stack(
        (width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), axis=1
    )


def mirror_vertically(
    image_bgr: NDArray[np.uint8], boxes: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Mirror top to bottom: image (H, W, 3) and boxes (G, 4) xyxy in its pixels."""
    height = np.float32(image_bgr.shape[0])
    return image_bgr[::-1], np.stack(
        (boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]), axis=1
    )


def recolour(
    image_bgr: NDArray[np.uint8], brightness: float, contrast: float, saturation: float
) -> NDArray[np.uint8]:
    """Change the colours of an image (H, W, 3) uint8.

    Args:
        image_bgr: the image.
        brightness: factor of all values.
        contrast: factor of their distance from the mean.
        saturation: factor of their distance from grey.
    """
    values = image_bgr.astype(np.float32) * np.float32(brightness)
    values = (values - values.mean()) * np.float32(contrast) + values.mean()
    grey = values.mean(axis=2, keepdims=True)
    return np.clip((values - grey) * np.float32(saturation) + grey, 0, 255).astype(np.uint8)


ORDER, AUGMENT = 0, 1  # streams of random numbers
ATTEMPTS = 20  # images tried in place of unreadable ones


@dataclass(frozen=True, eq=False)
class Sample:
    """One augmented image.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        boxes: (G, 4) float32 xyxy in its pixels.
        labels: (G,) int64.
        image_id: as in the annotations.
        unreadable: files that could not be read, in place of which this one came.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    image_id: int
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step learns from.

    Attributes:
        images: (B, H, W, 3) uint8 RGB; zeros where padded.
        valid_hw: (B, 2) int32 rows and columns that hold real pixels.
        targets: of every image.
        image_ids: of every image.
        unreadable: files that were replaced by others.
    """

    images: Tensor
    valid_hw: Tensor
    targets: list[Targets]
    image_ids: list[int]
    unreadable: list[str]


class TrainingData(Dataset[Sample]):
    """The augmented images of an epoch, by (epoch, position)."""

    def __init__(self, records: Sequence[Record], augment: Augment, seed: int) -> None:
        self.records, self.augment, self.seed = records, augment, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the image at a position, as this epoch changes it; else the next readable one."""
        epoch, index = key
        unreadable: list[str] = []
        for attempt in range(min(ATTEMPTS, len(self.records))):
            record = self.records[(index + attempt) % len(self.records)]
            image = read_image(record)
            if image is not None:
                rng = np.random.default_rng((self.seed, AUGMENT, epoch, index))
                image, boxes = self.augment(image, record.boxes, rng)
                return Sample(
                    cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False),
                    boxes,
                    record.labels,
                    record.image_id,
                    tuple(unreadable),
                )
            unreadable.append(record.path.name)
        raise InputError(
            f"{len(unreadable)} images in a row cannot be read ({', '.join(unreadable[:3])}, ...); "
            "check the folder with --check-data"
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad images at the right and bottom to one size, a multiple of 32."""
    sizes = [sample.image.shape[:2] for sample in samples]
    height, width = pad_size((max(h for h, _ in sizes), max(w for _, w in sizes)))
    images = np.zeros((len(samples), height, width, 3), np.uint8)
    for padded, sample, (rows, columns) in zip(images, samples, sizes, strict=True):
        padded[:rows, :columns] = sample.image
    targets = [
        Targets(torch.from_numpy(sample.boxes), torch.from_numpy(sample.labels), size)
        for sample, size in zip(samples, sizes, strict=True)
    ]
    unreadable = [name for sample in samples for name in sample.unreadable]
    valid_hw = torch.tensor(sizes, dtype=torch.int32)
    return Batch(
        torch.from_numpy(images),
        valid_hw,
        targets,
        [sample.image_id for sample in samples],
        unreadable,
    )


def epoch_batches(
    records: Sequence[Record],
    batch: int,
    *,
    seed: int,
    epoch: int,
    by_aspect: bool,
    at_least: int = 1,
) -> list[list[int]]:
    """Return positions of the images of each step of an epoch, every image once.

    Args:
        records: the images.
        batch: images a step; the last steps may have fewer.
        seed, epoch: decide the order.
        by_aspect: a batch holds either wide or tall images, but for the last.
        at_least: images that a step has in any case: the first ones again if need be.
    """
    order = np.random.default_rng((seed, ORDER, epoch)).permutation(len(records)).tolist()
    batches: list[list[int]] = []
    waiting: dict[bool, list[int]] = {False: [], True: []}
    for index in order:
        wide = by_aspect and records[index].size_hw[1] >= records[index].size_hw[0]
        waiting[wide].append(index)
        if len(waiting[wide]) == batch:
            batches.append(waiting[wide])
            waiting[wide] = []
    rest = waiting[True] + waiting[False]
    batches.extend(rest[start : start + batch] for start in range(0, len(rest), batch))
    if len(batches[-1]) < at_least:
        batches[-1] = batches[-1] + (order * at_least)[: at_least - len(batches[-1])]
    return batches


def load_batches(
    data: TrainingData, steps: Sequence[Sequence[int]], epoch: int, workers: int, pin: bool = False
) -> Iterator[Batch]:
    """Load the batches of these steps, in order.

    Args:
        data: the images.
        steps: positions of the images of each step.
        epoch: decides the augmentation.
        workers: loading processes; 0 loads in this one.
        pin: into memory that a GPU copies from fast.
    """
    if workers:
        # Before the fork: in a forked process OpenCV waits for ever for the threads it had in this
        # one.
        cv2.setNumThreads(1)
    keys = [[(epoch, index) for index in step] for step in steps]
    return iter(
        DataLoader(
            data,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin,
            worker_init_fn=_start_worker,
        )
    )  # type: ignore[arg-type]


def _start_worker(number: int) -> None:
    if number:  # what is told of the images, the first one tells
        warnings.simplefilter("ignore", InputWarning)
    # Signals are for the process that trains: it saves first. SIGTERM, by which PyTorch too ends a
    # loading process, must end it, and with 0: of any other end PyTorch makes an error at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
