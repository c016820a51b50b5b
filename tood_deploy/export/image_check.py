"""Whether images that an export will read can be decoded, in about a second: headers of all, then as many whole ones as there is time for.

Knows neither why they are read nor where they come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imagesize

from tood_deploy.errors import InputError
from tood_deploy.export.pictures import read_picture

BUDGET_S = 1.0
MOST_NAMED = 3


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images that one option has named.

    Attributes:
        option: as it is written on the command line.
        paths: all that will be read, at least one.
        decode: reads one whole, as it will be read; raises InputError where it cannot.
    """

    option: str
    paths: Sequence[Path]
    decode: Callable[[Path], object] | None = read_picture


def check_images(sets: Sequence[ImageSet], seconds: float = BUDGET_S) -> None:
    """Look at headers first and then at whole images, spread evenly over each set.

    Args:
        sets: whose `decode` is None has its headers looked at alone.
        seconds: for all sets together; of every set at least one image is decoded, however long it takes.

    Raises:
        InputError: some cannot be read; the message names the first of them.
    """
    for images in sets:
        started = time.perf_counter()
        share = seconds / len(sets)
        unread = list(_without_header(images.paths, started + share / 2))
        if not unread and images.decode is not None:
            unread = list(_undecoded(images, started + share))
        if unread:
            raise InputError(_complaint(images, unread))


def spread_evenly(count: int) -> list[int]:
    """Return the numbers below `count` in an order whose every beginning is spread over all of them."""
    return sorted(range(count), key=lambda number: f"{number:032b}"[::-1])


def _without_header(paths: Sequence[Path], deadline: float) -> Iterator[Path]:
    """Yield those that have no image's header, while there is time."""
    for number in spread_evenly(len(paths)):
        if not _has_header(paths[number]):
            yield paths[number]
        if time.perf_counter() > deadline:
            return


def _has_header(path: Path) -> bool:
    try:
        return min(imagesize.get(path)) > 0
    except (OSError, ValueError):
        return False


def _undecoded(images: ImageSet, deadline: float) -> Iterator[Path]:
    """Yield those that cannot be decoded, while there is time."""
    assert images.decode is not None
    for number in spread_evenly(len(images.paths)):
        try:
            images.decode(images.paths[number])
        except InputError:
            yield images.paths[number]
        if time.perf_counter() > deadline:
            return


def _complaint(images: ImageSet, unread: Sequence[Path]) -> str:
    named = ", ".join(map(str, sorted(unread)[:MOST_NAMED]))
    more = f" and {len(unread) - MOST_NAMED} more" if len(unread) > MOST_NAMED else ""
    return (
        f"{images.option}: {len(unread)} of {len(images.paths)} images cannot be read: {named}{more}; "
        "expected whole image files: remove or replace them"
    )
