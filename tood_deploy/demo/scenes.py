"""Generated images with known contents: a seed in, images and COCO annotations out.

Textured shapes of five classes over clutter. Needs NumPy and OpenCV alone.

An image follows from its seed alone: scale, turn, colour, texture and overlap are drawn at random.
Hundreds are made in a second.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.coco import AnnotatedImage, write_annotations
from tood_deploy.errors import OutputError, ToodError

SCENE_CLASSES = ("disc", "square", "triangle", "star", "ring")
SIZE_HW = (240, 320)
OBJECTS = (2, 9)  # fewest and most that are tried in an image
RADII = (13.0, 60.0)  # pixels; drawn evenly in their logarithm
MAX_COVERED = 0.3  # share of an object that later ones may hide
CLUTTER = 8  # thin lines and small outlines behind the objects
TEXTURE_SIDE = 128
JPEG_QUALITY = 92


@dataclass(frozen=True, eq=False)
class Scene:
    """One generated image.

    Attributes:
        image_bgr: (H, W, 3) uint8.
        boxes: (G, 4) float32 xyxy in pixels: the outline of each shape, also where another hides
            part of it.
        labels: (G,) int64 positions in `SCENE_CLASSES`.
    """

    image_bgr: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


def make_scene(
    seed: int | Sequence[int],
    size_hw: tuple[int, int] = SIZE_HW,
    objects: tuple[int, int] = OBJECTS,
    radii: tuple[float, float] = RADII,
) -> Scene:
    """Return the image of a seed, with its boxes.

    Args:
        seed: of all that is drawn at random.
        size_hw: rows and columns.
        objects: fewest and most that are tried.
        radii: smallest and largest, in pixels.
    """
    rng = np.random.default_rng(seed)
    image = _background(rng, size_hw)
    owner = np.full(size_hw, -1, np.int32)  # which object each pixel shows
    areas: list[int] = []
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(objects[0], objects[1] + 1))):
        label = int(rng.integers(len(SCENE_CLASSES)))
        mask, (x1, y1, x2, y2) = _random_shape(label, rng, size_hw, radii)
        inside = mask > 127
        if _hides_too_much(owner[y1:y2, x1:x2], inside, areas):
            continue
        _paint(image[y1:y2, x1:x2], mask, rng)
        owner[y1:y2, x1:x2][inside] = len(areas)
        areas.append(int(inside.sum()))
        boxes.append((x1, y1, x2, y2))
        labels.append(label)
    return Scene(
        _with_noise(image, rng),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
    )


def write_scenes(
    folder: Path,
    count: int,
    seed: int = 0,
    size_hw: tuple[int, int] = SIZE_HW,
    objects: tuple[int, int] = OBJECTS,
    radii: tuple[float, float] = RADII,
) -> Path:
    """Write images into `folder/images` and their annotations into `folder`.

    Args:
        folder: made if it is not there.
        count: images.
        seed: of the whole set; sets of other seeds share no image.
        size_hw: rows and columns of each.
        objects: fewest and most that are tried in an image.
        radii: of the objects, smallest and largest, in pixels.

    Returns:
        The COCO JSON, `folder/annotations.json`.

    Raises:
        OutputError: the folder cannot be written.
    """
    images: dict[int, AnnotatedImage] = {}
    boxes: list[tuple[int, int, Sequence[float]]] = []
    for number in range(count):
        scene = make_scene((seed, number), size_hw, objects, radii)
        images[number] = AnnotatedImage(f"{number:05d}.jpg", size_hw)
        _write_image(folder / "images" / images[number].file_name, scene.image_bgr)
        for (x1, y1, x2, y2), label in zip(
            scene.boxes.tolist(), scene.labels.tolist(), strict=True
        ):
            boxes.append((number, label, (x1, y1, x2 - x1, y2 - y1)))
    path = folder / "annotations.json"
    write_annotations(path, images, boxes, SCENE_CLASSES)
    return path


def _write_image(path: Path, image_bgr: NDArray[np.uint8]) -> None:
    encoded = cv2.imencode(".jpg", image_bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); choose another folder"
        ) from error


def _background(rng: np.random.Generator, size_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Draw soft patches of colour, with lines and outlines that are no objects."""
    coarse = rng.uniform(40, 200, (int(rng.integers(2, 9)), int(rng.integers(2, 9)), 3)).astype(
        np.float32
    )
    image = np.asarray(cv2.resize(coarse, size_hw[::-1], interpolation=cv2.INTER_CUBIC), np.float32)
    for _ in range(int(rng.integers(CLUTTER + 1))):
        colour = rng.uniform(0, 255, 3).tolist()
        x, y, u, v = (int(value) for value in rng.uniform(0, (*size_hw[::-1], *size_hw[::-1])))
        if rng.random() < 0.5:
            cv2.line(image, (x, y), (u, v), colour, int(rng.integers(1, 4)), cv2.LINE_AA)
        else:
            cv2.ellipse(
                image,
                (x, y),
                (2 + u // 40, 2 + v // 40),
                float(u),
                0,
                float(v),
                colour,
                1,
                cv2.LINE_AA,
            )
    return image


def _random_shape(
    label: int, rng: np.random.Generator, size_hw: tuple[int, int], radii: tuple[float, float]
) -> tuple[NDArray[np.uint8], tuple[int, int, int, int]]:
    """Draw a shape: its mask (h, w), 0 to 255, and where it lies (xyxy), wholly inside the image.

    Args:
        label: position in `SCENE_CLASSES`.
        rng: of what is drawn at random.
        size_hw: rows and columns of the image.
        radii: smallest and largest, in pixels; drawn evenly in their logarithm.
    """
    radius = float(np.exp(rng.uniform(*np.log(radii))))
    points = _outline(SCENE_CLASSES[label], float(rng.uniform(0, 2 * np.pi))) * radius
    points -= points.min(axis=0)
    width, height = (int(np.ceil(side)) + 1 for side in points.max(axis=0))
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [np.rint(points * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    if SCENE_CLASSES[label] == "ring":
        centre = tuple(round(side * 8) for side in points.max(axis=0))
        cv2.circle(mask, centre, int(radius * 0.55 * 16), 0, -1, cv2.LINE_AA, 4)
    x1, y1 = int(rng.integers(size_hw[1] - width)), int(rng.integers(size_hw[0] - height))
    return mask, (x1, y1, x1 + width, y1 + height)


def _with_noise(image: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return the image as a camera of some noise would give it."""
    height, width = image.shape[:2]
    noise = _noise((2 * height, 2 * width))
    top, left = int(rng.integers(height)), int(rng.integers(width))
    image += noise[top : top + height, left : left + width, None] * np.float32(rng.uniform(2, 8))
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


@functools.cache
def _noise(size_hw: tuple[int, int]) -> NDArray[np.float32]:
    """Return standard normal noise, drawn once: an image takes a part of it."""
    return np.random.default_rng(0).standard_normal(size_hw, np.float32)


def _outline(name: str, turn: float) -> NDArray[np.float64]:
    """Return (P, 2) corners of a shape of radius 1, turned."""
    corners, inner = {
        "disc": (64, 1.0),
        "ring": (64, 1.0),
        "square": (4, 1.0),
        "triangle": (3, 1.0),
        "star": (10, 0.45),
    }[name]
    angles = turn + np.arange(corners) * (2 * np.pi / corners)
    radii = np.where(np.arange(corners) % 2, inner, 1.0)[:, None]
    return np.stack((np.cos(angles), np.sin(angles)), axis=1) * radii


def _hides_too_much(
    owner: NDArray[np.int32], inside: NDArray[np.bool_], areas: Sequence[int]
) -> bool:
    """Tell whether a shape painted here would hide more of an earlier one than is allowed.

    Args:
        owner: (h, w) position of the object that each pixel of the region shows; -1 for none.
        inside: (h, w) bool, the shape's pixels.
        areas: of the objects, before any was hidden.
    """
    covered = owner[inside]
    return any(
        count > MAX_COVERED * areas[k] for k, count in enumerate(np.bincount(covered[covered >= 0]))
    )


def _paint(region: NDArray[np.float32], mask: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Fill the mask, in place, with two colours mixed by a texture."""
    textures = _textures()
    texture = textures[int(rng.integers(len(textures)))]
    height, width = mask.shape
    top, left = (int(rng.integers(TEXTURE_SIDE)) for _ in range(2))
    mix = texture[top : top + height, left : left + width, None]
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    share = mask[..., None].astype(np.float32) / 255
    region += (first + (second - first) * mix - region) * share


@functools.cache
def _textures() -> tuple[NDArray[np.float32], ...]:
    """Return stripes, checks, dots and noise, 0 to 1, large enough for any crop."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: 2 * TEXTURE_SIDE, : 2 * TEXTURE_SIDE].astype(np.float32)
    textures = [np.full_like(x, 0.1)]
    for period in (6.0, 11.0, 19.0):
        for angle in (0.2, 1.0, 1.9, 2.7):
            across = x * np.cos(angle) + y * np.sin(angle)
            textures.append(0.5 + 0.5 * np.sin(across * (2 * np.pi / period)))
        textures.append((x // period + y // period) % 2)
        from_centre = (x % period - period / 2) ** 2 + (y % period - period / 2) ** 2
        textures.append(from_centre < (period / 3.2) ** 2)
        cells = int(2 * TEXTURE_SIDE / period)
        coarse = rng.random((cells, cells), np.float32)
        textures.append(np.asarray(cv2.resize(coarse, x.shape[::-1])))
    return tuple(texture.astype(np.float32) for texture in textures)


def _check_ranges(arguments: argparse.Namespace) -> None:
    """Raise ToodError where an image would have no room for its objects, or a range is none."""
    least, most = arguments.radii
    if not (4 <= least <= most <= TEXTURE_SIDE / 2 and min(arguments.size) > 2 * most + 2):
        raise ToodError(
            f"--radii {least:g} {most:g} in images of {arguments.size[0]} x {arguments.size[1]}; "
            f"expected from 4 to {TEXTURE_SIDE // 2} pixels, and images larger than two of them"
        )
    if not 0 <= arguments.objects[0] <= arguments.objects[1]:
        raise ToodError(
            f"--objects {arguments.objects[0]} {arguments.objects[1]}; expected fewest and most"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run as `python -m tood_deploy.demo.scenes`: write a set."""
    parser = argparse.ArgumentParser(
        "python -m tood_deploy.demo.scenes", description="Writes generated images as COCO data."
    )
    parser.add_argument("folder", type=Path, help="where to: gets annotations.json and images/")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="images (default: 100)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="sets of different seeds share no image (default: 0)",
    )
    for name, default, metavar, text in (
        ("size", SIZE_HW, ("H", "W"), "rows and columns of an image"),
        ("objects", OBJECTS, ("MIN", "MAX"), "fewest and most objects of an image"),
        ("radii", RADII, ("MIN", "MAX"), "of the objects, in pixels"),
    ):
        shown = " ".join(f"{value:g}" for value in default)
        parser.add_argument(
            f"--{name}",
            type=float if name == "radii" else int,
            nargs=2,
            default=default,
            metavar=metavar,
            help=f"{text} (default: {shown})",
        )
    arguments = parser.parse_args(argv)
    try:
        _check_ranges(arguments)
        if arguments.count < 1 or arguments.seed < 0:
            raise ToodError(
                f"--count {arguments.count} --seed {arguments.seed}; "
                "expected at least 1 image and a seed of at least 0"
            )
        ranges = (tuple(values) for values in (arguments.objects, arguments.radii))
        print(
            write_scenes(
                arguments.folder, arguments.count, arguments.seed, tuple(arguments.size), *ranges
            )
        )
    except ToodError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
