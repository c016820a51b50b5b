"""Which numbers the activations of a graph take on calibration pictures: histograms, gathered picture by picture in flat memory.

Pictures go through the detector's own pre-processing. What is gathered is kept on disk, so that an interrupted run goes on where it stopped
and the same pictures are never run twice through the same graph. Knows nothing of 8-bit numbers but their ranges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import onnx

from tood_deploy.errors import ArtefactError
from tood_deploy.export.pictures import FEWEST_PICTURES, MOST_PICTURES, choose_pictures, read_picture
from tood_deploy.export.precision.activations import ActivationReader
from tood_deploy.export.precision.histogram import BINS, SAMPLES, Histogram, Method
from tood_deploy.home import home_folder
from tood_deploy.manifest import atomic_path, file_sha256
from tood_deploy.preprocess import ImageSize, resize_and_pad
from tood_deploy.presets import Sizing

SAVE_EVERY = 8  # pictures; more are never lost
HELD_BYTES, BYTES_A_PIXEL = 2**28, 64  # activations in memory at a time; the largest of one activation, for each pixel of the picture


@dataclass(frozen=True, eq=False)
class Calibration:
    """What calibration pictures told.

    Attributes:
        histograms: of every activation, by name.
        pictures: how many there were.
        key: SHA-256 of all it depends on: graph, pictures, their size.
    """

    histograms: Mapping[str, Histogram]
    pictures: int
    key: str

    def ranges(self, method: Method) -> dict[str, tuple[float, float]]:
        """The range of every activation that 8 bits should span."""
        return {name: histogram.range(method) for name, histogram in self.histograms.items()}


def calibrate(
    model: onnx.ModelProto,
    values: Collection[str],
    pictures: Path,
    sizing: ImageSize,
    *,
    most: int = MOST_PICTURES,
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Runs pictures through a graph and gathers how its inner values are distributed.

    Args:
        model: an exported float32 graph.
        values: names of the inner values.
        pictures: a folder.
        sizing: how pictures are brought to the size of the network's input.
        most: at most so many pictures, evenly spread over the folder in order of its names.
        cache: the folder that keeps what was gathered; the package's own where not given.
        progress: called with how many pictures are done and how many there are.
        say: told warnings, a line each.

    Raises:
        InputError: fewer than two pictures, or one that cannot be read.
        ArtefactError: the graph gives values that are not numbers.
    """
    paths = choose_pictures(pictures, most)
    warn_of_few(pictures, len(paths), say)
    names = sorted(values)
    key = _key(model, names, paths, sizing)
    state = (home_folder("calibration") if cache is None else cache) / f"{key[:32]}.npz"
    histograms, done = _load(state, names, say)
    progress(done, len(paths))
    together = max(1, HELD_BYTES // (BYTES_A_PIXEL * _pixels(sizing)))
    reader = ActivationReader(model, names, together=together) if done < len(paths) else None
    for number, path in enumerate(paths[done:], start=done + 1):
        assert reader is not None
        _add_picture(histograms, reader, path, sizing)
        if number % SAVE_EVERY == 0 or number == len(paths):
            _save(state, histograms, number)
        progress(number, len(paths))
    return Calibration(histograms, len(paths), key)


def _pixels(sizing: ImageSize) -> int:
    height, width = sizing.imgsz if isinstance(sizing, Sizing) else sizing
    return height * width


def warn_of_few(folder: Path, pictures: int, say: Callable[[str], None]) -> None:
    """Says so where what is seen on so many pictures may not be all that there is."""
    if pictures < FEWEST_PICTURES:
        say(f"warning: {folder}: {pictures} pictures to calibrate on; with fewer than {FEWEST_PICTURES} ranges may be too narrow")


def _add_picture(histograms: Mapping[str, Histogram], reader: ActivationReader, path: Path, sizing: ImageSize) -> None:
    image, transform = resize_and_pad(read_picture(path), sizing)
    for some in reader.read(image, transform.resized_hw):
        for name, array in some.items():
            if not np.isfinite(array).all():
                raise ArtefactError(f"{path}: the network gives values that are not numbers in {name}; check the checkpoint")
            histograms[name].add(array)


def _key(model: onnx.ModelProto, names: Sequence[str], paths: Sequence[Path], sizing: ImageSize) -> str:
    """Not the method: histograms serve all."""
    key = hashlib.sha256(model.graph.SerializeToString(deterministic=True))
    key.update(repr((names, sizing, BINS, SAMPLES, [file_sha256(path) for path in paths])).encode())
    return key.hexdigest()


def _save(path: Path, histograms: Mapping[str, Histogram], done: int) -> None:
    counts = np.stack([histogram.counts for histogram in histograms.values()])
    numbers = np.array([(histogram.limit, histogram.low, histogram.high) for histogram in histograms.values()])
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, counts=counts, numbers=numbers, done=np.array(done))


def _load(path: Path, names: Sequence[str], say: Callable[[str], None]) -> tuple[dict[str, Histogram], int]:
    """What was gathered before, and from how many pictures."""
    if not path.is_file():
        return {name: Histogram() for name in names}, 0
    try:
        with path.open("rb") as file, np.load(file) as state:
            counts, numbers, done = state["counts"], state["numbers"], int(state["done"])
            found = [Histogram(row, *map(float, own)) for row, own in zip(counts, numbers, strict=True)]
            return dict(zip(names, found, strict=True)), done
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
        say(f"warning: {path}: what was kept of an earlier calibration cannot be read ({error}); calibrating anew")
        return {name: Histogram() for name in names}, 0
