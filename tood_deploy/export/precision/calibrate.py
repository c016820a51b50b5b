"""Measure what numbers a graph's values take on images: histograms for 8 bits, ranges for fp16.

Comes in: a float32 graph, names of its values, a folder of images. Goes out: a histogram or a range
for each value. Images go through the detector's own pre-processing, one by one in flat memory.
Histograms are kept on disk, so that an interrupted run goes on where it stopped, and the same
images are never run twice through the same graph. Knows nothing of how a graph is quantised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector

from tood_deploy.data import MAX_CALIBRATION_IMAGES, MIN_CALIBRATION_IMAGES
from tood_deploy.data.images import choose_images, read_image
from tood_deploy.errors import ArtefactError
from tood_deploy.export.config import CalibrationMethod
from tood_deploy.export.precision.activations import ActivationReader
from tood_deploy.files import atomic_path, file_sha256, home_folder
from tood_deploy.preprocess import ImageSize, resize_and_pad
from tood_deploy.presets import Sizing
from tood_deploy.reporter import Reporter

BINS = 4096
SAMPLES = 2**15  # of one array; its smallest and largest number are exact
PERCENTILE = 99.99
ENTROPY_BINS = 1024  # the search takes time with the square of them
NOTHING = 1e-30  # what is smaller counts as zero
ENTROPY_LEVELS = 256  # of the whole range, as 8 bits have


def _no_counts() -> NDArray[np.int64]:
    return np.zeros(BINS, np.int64)


@dataclass
class Histogram:
    """The distribution of one activation, of flat size.

    Attributes:
        counts: (BINS,) how many numbers lie in each of equal parts of -limit to limit; a sample of
            large arrays.
        limit: grows by doubling, which joins bins in pairs and so loses no count.
        low, high: the smallest and the largest number of all.
    """

    counts: NDArray[np.int64] = field(default_factory=_no_counts)
    limit: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def add(self, array: NDArray[Any]) -> None:
        """Add the numbers of an array, which must be finite and at least one."""
        low, high = float(array.min()), float(array.max())
        self.low, self.high = (
            (min(self.low, low), max(self.high, high)) if self.counts.any() else (low, high)
        )
        self._grow(max(-low, high))
        # An odd step does not meet the same columns of a map in every row.
        step = -(-array.size // SAMPLES) | 1
        self.counts += np.histogram(
            array.ravel()[::step], BINS, (-self.limit or -1.0, self.limit or 1.0)
        )[0]

    def _grow(self, largest: float) -> None:
        if not self.limit and largest > NOTHING:
            counts, self.limit = self.counts.sum(), largest
            self.counts[:] = 0
            self.counts[BINS // 2] = counts  # all zeros so far
        while 0 < self.limit < largest:
            self.limit *= 2
            self.counts = np.pad(_pairs_joined(self.counts), BINS // 4)

    def range(self, method: CalibrationMethod) -> tuple[float, float]:
        """Return the lowest and highest number that 8 bits should hold; the rest is clipped."""
        if method == "minmax" or not self.limit:
            return self.low, self.high
        low, high = self._percentile_range() if method == "percentile" else self._entropy_range()
        return max(low, self.low), min(high, self.high)

    def _percentile_range(self) -> tuple[float, float]:
        """Leave the rarest 1 of 10,000 numbers out, half of them at each end."""
        cut = (100 - PERCENTILE) / 200
        shares = self.counts.cumsum() / self.counts.sum()
        first, last = np.searchsorted(shares, (cut, 1 - cut))
        edges = self._edges(BINS)
        return float(edges[first]), float(edges[last + 1])

    def _entropy_range(self) -> tuple[float, float]:
        """Return where clipping loses least information.

        Measured by the divergence of the quantised distribution from the real one.
        """
        counts = self.counts
        while len(counts) > ENTROPY_BINS:
            counts = _pairs_joined(counts)
        counts = counts.copy()
        # What a ReLU makes zero is exact in 8 bits, and would hide the rest.
        counts[ENTROPY_BINS // 2] = counts[ENTROPY_BINS // 2 + 1]
        edges = self._edges(ENTROPY_BINS).astype(np.float32)
        collector = HistogramCollector(
            "entropy", False, ENTROPY_BINS, ENTROPY_LEVELS, PERCENTILE, "same"
        )
        low, high = collector.get_entropy_threshold(
            (counts, edges, edges[0], edges[-1], self.limit), ENTROPY_LEVELS
        )
        return float(low), float(high)

    def _edges(self, bins: int) -> NDArray[np.float64]:
        return np.linspace(-self.limit, self.limit, bins + 1)


def _pairs_joined(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return counts.reshape(-1, 2).sum(axis=1)


SAVE_EVERY = 8  # images; more are never lost
HELD_BYTES = 2**28  # of activations in memory at a time
BYTES_PER_PIXEL = 64  # of the largest activation, for each pixel of the image


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured on calibration images.

    Attributes:
        histograms: of every activation, by name.
        images: how many there were.
        key: SHA-256 of all it depends on: graph, images, their size.
    """

    histograms: Mapping[str, Histogram]
    images: int
    key: str

    def ranges(self, method: CalibrationMethod) -> dict[str, tuple[float, float]]:
        """Return the range of every activation that 8 bits should span."""
        return {name: histogram.range(method) for name, histogram in self.histograms.items()}


def calibrate(
    model: onnx.ModelProto,
    values: Collection[str],
    images: Path,
    sizing: ImageSize,
    *,
    max_images: int = MAX_CALIBRATION_IMAGES,
    cache: Path | None = None,
    reporter: Reporter | None = None,
) -> Calibration:
    """Run images through a graph and gather how its inner values are distributed.

    Args:
        model: an exported float32 graph.
        values: names of the inner values.
        images: a folder.
        sizing: how images are brought to the size of the network's input.
        max_images: evenly spread over the folder in order of its names.
        cache: the folder that keeps what was gathered; the package's own where not given.
        reporter: of warnings and progress.

    Raises:
        InputError: fewer than two images, or one that cannot be read.
        ArtefactError: the graph gives values that are not numbers.
    """
    reporter = reporter or Reporter.silent()
    paths = choose_images(images, max_images)
    warn_of_few(images, len(paths), reporter)
    names = sorted(values)
    key = _key(model, names, paths, sizing)
    state = (home_folder("calibration") if cache is None else cache) / f"{key[:32]}.npz"
    histograms, done = _load(state, names, reporter)
    if done < len(paths):
        together = max(1, HELD_BYTES // (BYTES_PER_PIXEL * _pixels(sizing)))
        reader = ActivationReader(model, names, together=together)
        with reporter.progress("calibrating", len(paths)) as task:
            task.update(done)
            for number, path in enumerate(paths[done:], start=done + 1):
                _add_image(histograms, reader, path, sizing)
                if number % SAVE_EVERY == 0 or number == len(paths):
                    _save(state, histograms, number)
                task.update(number)
    return Calibration(histograms, len(paths), key)


def _pixels(sizing: ImageSize) -> int:
    height, width = sizing.imgsz if isinstance(sizing, Sizing) else sizing
    return height * width


def warn_of_few(folder: Path, images: int, reporter: Reporter) -> None:
    """Warn where so few images may not show all values that are to come.

    Args:
        folder: of the images.
        images: how many of it are used.
        reporter: gets the warning.
    """
    if images < MIN_CALIBRATION_IMAGES:
        reporter.warn(
            f"{folder}: {images} images to calibrate on; with fewer than "
            f"{MIN_CALIBRATION_IMAGES} ranges may be too narrow"
        )


def _add_image(
    histograms: Mapping[str, Histogram], reader: ActivationReader, path: Path, sizing: ImageSize
) -> None:
    image, transform = resize_and_pad(read_image(path), sizing)
    for values in reader.read(image, transform.resized_hw):
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise ArtefactError(
                    f"{path}: the network gives values that are not numbers in {name}; "
                    "check the checkpoint"
                )
            histograms[name].add(array)


def _key(
    model: onnx.ModelProto, names: Sequence[str], paths: Sequence[Path], sizing: ImageSize
) -> str:
    """Return the hash of all that a calibration depends on; every method reads the same one."""
    key = hashlib.sha256(model.graph.SerializeToString(deterministic=True))
    key.update(repr((names, sizing, BINS, SAMPLES, [file_sha256(path) for path in paths])).encode())
    return key.hexdigest()


def _save(path: Path, histograms: Mapping[str, Histogram], done: int) -> None:
    counts = np.stack([histogram.counts for histogram in histograms.values()])
    numbers = np.array(
        [(histogram.limit, histogram.low, histogram.high) for histogram in histograms.values()]
    )
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, counts=counts, numbers=numbers, done=np.array(done))


def _load(path: Path, names: Sequence[str], reporter: Reporter) -> tuple[dict[str, Histogram], int]:
    """Return what was gathered before, and from how many images."""
    if not path.is_file():
        return {name: Histogram() for name in names}, 0
    try:
        with path.open("rb") as file, np.load(file) as state:
            counts, numbers, done = state["counts"], state["numbers"], int(state["done"])
            histograms = [
                Histogram(row, *map(float, own)) for row, own in zip(counts, numbers, strict=True)
            ]
            return dict(zip(names, histograms, strict=True)), done
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
        reporter.warn(
            f"{path}: what was kept of an earlier calibration cannot be read ({error}); "
            "calibrating anew"
        )
        return {name: Histogram() for name in names}, 0


FP16_MAX = float(np.finfo(np.float16).max)
FP16_MIN_NORMAL = float(np.finfo(np.float16).smallest_normal)
HEADROOM = 4.0  # other images give larger values than the calibration's
MAX_SUBNORMAL_SHARE = 0.05
QUANTILE = 0.9999
RANGE_IMAGES = 64
QUANTILE_SAMPLES = 2**20  # of one value, from which its quantile is taken


@dataclass(frozen=True)
class ValueRange:
    """Magnitudes of one value over all images.

    Attributes:
        largest: the largest.
        p9999: the 99.99th percentile of an image, the largest over all.
        nonzero: how many numbers are not zero.
        subnormal: of these, how many are below the smallest normal number of fp16.
    """

    largest: float = 0.0
    p9999: float = 0.0
    nonzero: int = 0
    subnormal: int = 0

    def __or__(self, other: ValueRange) -> ValueRange:
        """Return the range over the images of both."""
        return ValueRange(
            max(self.largest, other.largest),
            max(self.p9999, other.p9999),
            self.nonzero + other.nonzero,
            self.subnormal + other.subnormal,
        )

    @property
    def subnormal_share(self) -> float:
        """Return the share of nonzero numbers below the smallest normal one of fp16, 0 to 1."""
        return self.subnormal / self.nonzero if self.nonzero else 0.0

    @property
    def risk(self) -> str:
        """Return why fp16 cannot hold the value, in a few words; "" where it can."""
        if not self.largest * HEADROOM <= FP16_MAX:  # not a number counts, too
            return (
                f"reaches {self.largest:.4g}, fp16 ends at {FP16_MAX:.0f} and other images may "
                f"give {HEADROOM:.0f} times as much"
            )
        if self.subnormal_share > MAX_SUBNORMAL_SHARE:
            return (
                f"{self.subnormal_share:.0%} of its numbers are below {FP16_MIN_NORMAL:.1e}, "
                "where fp16 loses digits"
            )
        return ""


def measure_ranges(
    model: Path | onnx.ModelProto,
    names: Sequence[str],
    images: Path,
    sizing: ImageSize,
    *,
    max_images: int = RANGE_IMAGES,
    reporter: Reporter | None = None,
) -> dict[str, ValueRange]:
    """Return the ranges of inner values over the images of a folder, in memory that does not grow.

    Args:
        model: an exported float32 graph, or its file.
        names: of the values.
        images: the folder.
        sizing: how images are brought to the size of the network's input.
        max_images: evenly spread over the folder in order of its names.
        reporter: of progress.

    Raises:
        InputError: no such folder, fewer than two images in it, or one that cannot be read.
        ArtefactError: the graph holds no value of such a name.
    """
    reporter = reporter or Reporter.silent()
    paths = choose_images(images, max_images)
    reader = ActivationReader(model, names)
    ranges = dict.fromkeys(names, ValueRange())
    for path in reporter.track(paths, "measuring ranges"):
        image, transform = resize_and_pad(read_image(path), sizing)
        for values in reader.read(image, transform.resized_hw):
            for name, array in values.items():
                ranges[name] |= array_range(array)
    return ranges


def array_range(array: NDArray[Any]) -> ValueRange:
    """Return the range of one array of real numbers."""
    magnitudes = np.abs(array.ravel())
    if not magnitudes.size:
        return ValueRange()
    step = -(-magnitudes.size // QUANTILE_SAMPLES) | 1  # odd, as in `Histogram.add`
    return ValueRange(
        float(magnitudes.max()),
        float(np.quantile(magnitudes[::step], QUANTILE)),
        int(np.count_nonzero(magnitudes)),
        int(np.count_nonzero((magnitudes > 0) & (magnitudes < FP16_MIN_NORMAL))),
    )


def values_at_risk(ranges: Mapping[str, ValueRange]) -> dict[str, str]:
    """Return the values that fp16 cannot hold, and why."""
    return {name: measured.risk for name, measured in ranges.items() if measured.risk}
