"""Which numbers the activations of a graph take on calibration images: histograms, gathered image by image in flat memory.

Images go through the detector's own pre-processing. What is gathered is kept on disk, so that an interrupted run goes on where it stopped
and the same images are never run twice through the same graph. Knows nothing of 8-bit numbers but their ranges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args
from zipfile import BadZipFile

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import HistogramCollector

from tood_deploy.data import MAX_CALIBRATION_IMAGES, MIN_CALIBRATION_IMAGES
from tood_deploy.data.images import choose_images, read_image
from tood_deploy.errors import ArtefactError
from tood_deploy.export.precision.activations import ActivationReader
from tood_deploy.files import atomic_path, file_sha256, home_folder
from tood_deploy.preprocess import ImageSize, resize_and_pad
from tood_deploy.presets import Sizing

Method = Literal["entropy", "percentile", "minmax"]
METHODS: tuple[Method, ...] = get_args(Method)

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
        counts: (BINS,) how many numbers lie in each of equal parts of -limit to limit; a sample of large arrays.
        limit: grows by doubling, which joins bins in pairs and so loses no count.
        low, high: the smallest and the largest number of all.
    """

    counts: NDArray[np.int64] = field(default_factory=_no_counts)
    limit: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def add(self, array: NDArray[Any]) -> None:
        """Adds the numbers of an array, which must be finite and at least one."""
        low, high = float(array.min()), float(array.max())
        self.low, self.high = (
            (min(self.low, low), max(self.high, high)) if self.counts.any() else (low, high)
        )
        self._grow(max(-low, high))
        step = (
            -(-array.size // SAMPLES) | 1
        )  # odd, so that not always the same columns of a map are met
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

    def range(self, method: Method) -> tuple[float, float]:
        """The lowest and the highest number that 8 bits should hold; what lies beyond is clipped."""
        if method == "minmax" or not self.limit:
            return self.low, self.high
        low, high = self._percentile_range() if method == "percentile" else self._entropy_range()
        return max(low, self.low), min(high, self.high)

    def _percentile_range(self) -> tuple[float, float]:
        """Leaves the rarest 1 of 10,000 numbers out, half of them at each end."""
        cut = (100 - PERCENTILE) / 200
        shares = self.counts.cumsum() / self.counts.sum()
        first, last = np.searchsorted(shares, (cut, 1 - cut))
        edges = self._edges(BINS)
        return float(edges[first]), float(edges[last + 1])

    def _entropy_range(self) -> tuple[float, float]:
        """Where clipping loses least information, by the divergence of the quantised distribution from the real one."""
        counts = self.counts
        while len(counts) > ENTROPY_BINS:
            counts = _pairs_joined(counts)
        counts = counts.copy()
        counts[ENTROPY_BINS // 2] = counts[
            ENTROPY_BINS // 2 + 1
        ]  # what a ReLU makes zero is exact in 8 bits, and would hide the rest
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
HELD_BYTES, BYTES_A_PIXEL = (
    2**28,
    64,
)  # activations in memory at a time; the largest of one activation, for each pixel of the image


@dataclass(frozen=True, eq=False)
class Calibration:
    """What calibration images told.

    Attributes:
        histograms: of every activation, by name.
        images: how many there were.
        key: SHA-256 of all it depends on: graph, images, their size.
    """

    histograms: Mapping[str, Histogram]
    images: int
    key: str

    def ranges(self, method: Method) -> dict[str, tuple[float, float]]:
        """The range of every activation that 8 bits should span."""
        return {name: histogram.range(method) for name, histogram in self.histograms.items()}


def calibrate(
    model: onnx.ModelProto,
    values: Collection[str],
    images: Path,
    sizing: ImageSize,
    *,
    most: int = MAX_CALIBRATION_IMAGES,
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Runs images through a graph and gathers how its inner values are distributed.

    Args:
        model: an exported float32 graph.
        values: names of the inner values.
        images: a folder.
        sizing: how images are brought to the size of the network's input.
        most: at most so many images, evenly spread over the folder in order of its names.
        cache: the folder that keeps what was gathered; the package's own where not given.
        progress: called with how many images are done and how many there are.
        say: told warnings, a line each.

    Raises:
        InputError: fewer than two images, or one that cannot be read.
        ArtefactError: the graph gives values that are not numbers.
    """
    paths = choose_images(images, most)
    warn_of_few(images, len(paths), say)
    names = sorted(values)
    key = _key(model, names, paths, sizing)
    state = (home_folder("calibration") if cache is None else cache) / f"{key[:32]}.npz"
    histograms, done = _load(state, names, say)
    progress(done, len(paths))
    together = max(1, HELD_BYTES // (BYTES_A_PIXEL * _pixels(sizing)))
    reader = ActivationReader(model, names, together=together) if done < len(paths) else None
    for number, path in enumerate(paths[done:], start=done + 1):
        assert reader is not None
        _add_image(histograms, reader, path, sizing)
        if number % SAVE_EVERY == 0 or number == len(paths):
            _save(state, histograms, number)
        progress(number, len(paths))
    return Calibration(histograms, len(paths), key)


def _pixels(sizing: ImageSize) -> int:
    height, width = sizing.imgsz if isinstance(sizing, Sizing) else sizing
    return height * width


def warn_of_few(folder: Path, images: int, say: Callable[[str], None]) -> None:
    """Says so where what is seen on so many images may not be all that there is."""
    if images < MIN_CALIBRATION_IMAGES:
        say(
            f"warning: {folder}: {images} images to calibrate on; with fewer than {MIN_CALIBRATION_IMAGES} ranges may be too narrow"
        )


def _add_image(
    histograms: Mapping[str, Histogram], reader: ActivationReader, path: Path, sizing: ImageSize
) -> None:
    image, transform = resize_and_pad(read_image(path), sizing)
    for some in reader.read(image, transform.resized_hw):
        for name, array in some.items():
            if not np.isfinite(array).all():
                raise ArtefactError(
                    f"{path}: the network gives values that are not numbers in {name}; check the checkpoint"
                )
            histograms[name].add(array)


def _key(
    model: onnx.ModelProto, names: Sequence[str], paths: Sequence[Path], sizing: ImageSize
) -> str:
    """Not the method: histograms serve all."""
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


def _load(
    path: Path, names: Sequence[str], say: Callable[[str], None]
) -> tuple[dict[str, Histogram], int]:
    """What was gathered before, and from how many images."""
    if not path.is_file():
        return {name: Histogram() for name in names}, 0
    try:
        with path.open("rb") as file, np.load(file) as state:
            counts, numbers, done = state["counts"], state["numbers"], int(state["done"])
            found = [
                Histogram(row, *map(float, own)) for row, own in zip(counts, numbers, strict=True)
            ]
            return dict(zip(names, found, strict=True)), done
    except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
        say(
            f"warning: {path}: what was kept of an earlier calibration cannot be read ({error}); calibrating anew"
        )
        return {name: Histogram() for name in names}, 0


FP16_MOST = float(np.finfo(np.float16).max)
FP16_LEAST_NORMAL = float(np.finfo(np.float16).smallest_normal)
HEADROOM = 4.0  # other images give larger values than the calibration's
MOST_SUBNORMAL = 0.05
QUANTILE = 0.9999
RANGE_IMAGES = 64
QUANTILE_SAMPLES = 2**20  # of one value, from which its quantile is taken


@dataclass(frozen=True)
class ValueRange:
    """Magnitudes of one value over all images.

    Attributes:
        largest: the largest.
        p9999: the 99.99th percentile of a image, the largest over all.
        nonzero: how many numbers are not zero.
        subnormal: of these, how many are below the smallest normal number of fp16.
    """

    largest: float = 0.0
    p9999: float = 0.0
    nonzero: int = 0
    subnormal: int = 0

    def __or__(self, other: ValueRange) -> ValueRange:
        """Over the images of both."""
        return ValueRange(
            max(self.largest, other.largest),
            max(self.p9999, other.p9999),
            self.nonzero + other.nonzero,
            self.subnormal + other.subnormal,
        )

    @property
    def subnormal_share(self) -> float:
        """Of the numbers that are not zero, those below the smallest normal number of fp16: 0 to 1."""
        return self.subnormal / self.nonzero if self.nonzero else 0.0

    @property
    def risk(self) -> str:
        """Why fp16 cannot hold the value, in a few words; "" where it can."""
        if not self.largest * HEADROOM <= FP16_MOST:  # not a number counts, too
            return f"reaches {self.largest:.4g}, fp16 ends at {FP16_MOST:.0f} and other images may give {HEADROOM:.0f} times as much"
        if self.subnormal_share > MOST_SUBNORMAL:
            return f"{self.subnormal_share:.0%} of its numbers are below {FP16_LEAST_NORMAL:.1e}, where fp16 loses digits"
        return ""


def measure_ranges(
    model: Path | onnx.ModelProto,
    names: Sequence[str],
    images: Path,
    sizing: ImageSize,
    *,
    most: int = RANGE_IMAGES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, ValueRange]:
    """The ranges of inner values over the images of a folder, one image at a time, in memory that does not grow.

    Args:
        model: an exported float32 graph, or its file.
        names: of the values.
        images: the folder.
        sizing: how images are brought to the size of the network's input.
        most: at most so many images, evenly spread over the folder in order of its names.
        progress: called after every image with how many are done and how many there are.

    Raises:
        InputError: no such folder, fewer than two images in it, or one that cannot be read.
        ArtefactError: the graph holds no value of such a name.
    """
    paths = choose_images(images, most)
    reader = ActivationReader(model, names)
    ranges = dict.fromkeys(names, ValueRange())
    for done, path in enumerate(paths, start=1):
        image, transform = resize_and_pad(read_image(path), sizing)
        for values in reader.read(image, transform.resized_hw):
            for name, array in values.items():
                ranges[name] |= array_range(array)
        progress(done, len(paths))
    return ranges


def array_range(array: NDArray[Any]) -> ValueRange:
    """The range of one array of real numbers."""
    magnitudes = np.abs(array.ravel())
    if not magnitudes.size:
        return ValueRange()
    step = (
        -(-magnitudes.size // QUANTILE_SAMPLES) | 1
    )  # odd, so that not always the same columns of a map are met
    return ValueRange(
        float(magnitudes.max()),
        float(np.quantile(magnitudes[::step], QUANTILE)),
        int(np.count_nonzero(magnitudes)),
        int(np.count_nonzero((magnitudes > 0) & (magnitudes < FP16_LEAST_NORMAL))),
    )


def values_at_risk(ranges: Mapping[str, ValueRange]) -> dict[str, str]:
    """The values that fp16 cannot hold, and why."""
    return {name: found.risk for name, found in ranges.items() if found.risk}
