"""How large the values of a graph become on calibration pictures, and which of them fp16 cannot hold. Knows nothing of precision elsewhere.

fp16 ends at 65504, and below 2^-14 it loses one bit of its eleven with every halving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tood_deploy.export.pictures import read_picture
from tood_deploy.export.precision.activations import ActivationReader
from tood_deploy.export.precision.calibration import choose_pictures
from tood_deploy.preprocess import ImageSize, resize_and_pad

FP16_MOST = float(np.finfo(np.float16).max)
FP16_LEAST_NORMAL = float(np.finfo(np.float16).smallest_normal)
HEADROOM = 4.0  # other pictures give larger values than the calibration's
MOST_SUBNORMAL = 0.05
QUANTILE = 0.9999
MOST_PICTURES = 64
SAMPLES = 2**20  # of one value, from which its quantile is taken


@dataclass(frozen=True)
class ValueRange:
    """Magnitudes of one value over all pictures.

    Attributes:
        largest: the largest.
        p9999: the 99.99th percentile of a picture, the largest over all.
        nonzero: how many numbers are not zero.
        subnormal: of these, how many are below the smallest normal number of fp16.
    """

    largest: float = 0.0
    p9999: float = 0.0
    nonzero: int = 0
    subnormal: int = 0

    def __or__(self, other: ValueRange) -> ValueRange:
        """Over the pictures of both."""
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
            return f"reaches {self.largest:.4g}, fp16 ends at {FP16_MOST:.0f} and other pictures may give {HEADROOM:.0f} times as much"
        if self.subnormal_share > MOST_SUBNORMAL:
            return f"{self.subnormal_share:.0%} of its numbers are below {FP16_LEAST_NORMAL:.1e}, where fp16 loses digits"
        return ""


def measure_ranges(
    model: Path | onnx.ModelProto,
    names: Sequence[str],
    pictures: Path,
    sizing: ImageSize,
    *,
    most: int = MOST_PICTURES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, ValueRange]:
    """The ranges of inner values over the pictures of a folder, one picture at a time, in memory that does not grow.

    Args:
        model: an exported float32 graph, or its file.
        names: of the values.
        pictures: the folder.
        sizing: how pictures are brought to the size of the network's input.
        most: at most so many pictures, evenly spread over the folder in order of its names.
        progress: called after every picture with how many are done and how many there are.

    Raises:
        InputError: no such folder, fewer than two pictures in it, or one that cannot be read.
        ArtefactError: the graph holds no value of such a name.
    """
    paths = choose_pictures(pictures, most)
    reader = ActivationReader(model, names)
    ranges = dict.fromkeys(names, ValueRange())
    for done, path in enumerate(paths, start=1):
        image, transform = resize_and_pad(read_picture(path), sizing)
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
    step = -(-magnitudes.size // SAMPLES) | 1  # odd, so that not always the same columns of a map are met
    return ValueRange(
        float(magnitudes.max()),
        float(np.quantile(magnitudes[::step], QUANTILE)),
        int(np.count_nonzero(magnitudes)),
        int(np.count_nonzero((magnitudes > 0) & (magnitudes < FP16_LEAST_NORMAL))),
    )


def values_at_risk(ranges: Mapping[str, ValueRange]) -> dict[str, str]:
    """The values that fp16 cannot hold, and why."""
    return {name: found.risk for name, found in ranges.items() if found.risk}
