"""Images that are larger than memory, read by window: GeoTIFF, tiled TIFF, big JPEG and PNG.

A file in; pixels of windows out, upright, and where the image lies on the Earth. GDAL reads, by way
of rasterio (extra `large`). Knows no detector.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from tood_deploy.data.image_file import upright
from tood_deploy.data.image_header import ImageHeader
from tood_deploy.errors import InputError, ToodError, naming_extras
from tood_deploy.inference.frame import WindowReader
from tood_deploy.preprocess import ImageSize, fit_size

if TYPE_CHECKING:
    from rasterio import DatasetReader

CACHE_MIB = 128  # of decoded tiles, in GDAL
MAX_BAND_BYTES = 256 * 2**20  # of rows that are read at once
WGS84 = "EPSG:4326"
SWAPPING = (5, 6, 7, 8)  # EXIF orientations that exchange rows and columns


@contextmanager
def open_raster(path: str) -> Iterator[DatasetReader]:
    """Open a file with GDAL.

    Raises:
        DeviceError: rasterio is not installed.
        InputError: GDAL does not read it.
    """
    with naming_extras("large"):
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MIB), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(path) as dataset:
                yield dataset
        except RasterioError as error:
            raise InputError(
                f"{path}: cannot be read by window ({error}); expected a GeoTIFF, TIFF, JPEG or "
                "PNG: convert it, or raise --max-pixels to decode it at once"
            ) from error


class RasterReader(WindowReader):
    """Reads windows of one file, in bands of rows: no row of the file is decoded twice."""

    def __init__(self, path: str, header: ImageHeader, bit_depth: int | None = None) -> None:
        """Look at what the file holds.

        Args:
            path: of the file.
            header: of the file.
            bit_depth: bits of 16 that hold data; None: what the header says, else all.

        Raises:
            InputError: it cannot be read by window, or its values are none of 8 or 16 bits.
        """
        self.path, self.orientation = path, header.orientation
        self.max_value = header.max_value if bit_depth is None else 2**bit_depth - 1
        with open_raster(path) as dataset:
            self.stored_hw = (dataset.height, dataset.width)
            self.channels = _channels(dataset, path)
            self.colours = _palette(dataset)
        turned = self.orientation in SWAPPING
        self.size_hw = self.stored_hw[::-1] if turned else self.stored_hw

    def read_windows(self, windows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield every window's number and pixels, from the first row of the file to the last."""
        stored = np.array([self._stored(window) for window in windows.tolist()])
        order = np.argsort(stored[:, 1], kind="stable")
        rows, first = np.zeros((0, self.stored_hw[1], 3), np.uint8), 0
        with open_raster(self.path) as dataset:
            for number in order.tolist():
                left, top, right, bottom = stored[number].tolist()
                if bottom > first + len(rows):
                    rows, first = self._next_rows(dataset, rows, first, top, bottom)
                cut = rows[top - first : bottom - first, left:right]
                yield number, np.asarray(upright(cut, self.orientation), np.uint8)

    def read_to_fit(self, fit: ImageSize) -> NDArray[np.uint8]:
        """Return the whole image, scaled down as its pixels come: each is the mean of a block."""
        height, width = fit_size(self.size_hw, fit)
        if self.orientation in SWAPPING:
            height, width = width, height
        stored_h, stored_w = self.stored_hw
        result = np.zeros((min(height, stored_h), min(width, stored_w), 3), np.uint8)
        edges = np.linspace(0, stored_h, len(result) + 1).round().astype(int)
        step = max(1, MAX_BAND_BYTES // (3 * stored_w) * len(result) // stored_h)
        with open_raster(self.path) as dataset:
            for start in range(0, len(result), step):
                stop = min(start + step, len(result))
                band = self._read(dataset, 0, int(edges[start]), stored_w, int(edges[stop]))
                size = (result.shape[1], stop - start)
                result[start:stop] = cv2.resize(band, size, interpolation=cv2.INTER_AREA)
        return np.asarray(upright(result, self.orientation), np.uint8)

    def _stored(self, window: Sequence[int]) -> tuple[int, int, int, int]:
        """Return a window (xyxy) of the upright image in pixels of the file."""
        left, top, right, bottom = window
        height, width = self.size_hw
        if self.orientation in (2, 3, 6, 7):  # as `upright` turns, backwards
            left, right = width - right, width - left
        if self.orientation in (3, 4, 7, 8):
            top, bottom = height - bottom, height - top
        if self.orientation in SWAPPING:
            left, top, right, bottom = top, left, bottom, right
        return left, top, right, bottom

    def _next_rows(
        self, dataset: DatasetReader, rows: NDArray[np.uint8], first: int, top: int, bottom: int
    ) -> tuple[NDArray[np.uint8], int]:
        """Return rows `top` to `bottom` and the first one's number; those that are there stay.

        Args:
            dataset: the file.
            rows: (h, W, 3) what was read last.
            first: number of their first row.
            top, bottom: what is needed.
        """
        known = rows[top - first :] if top < first + len(rows) else rows[:0]
        read_from = top + len(known)
        fresh = self._read(dataset, 0, read_from, self.stored_hw[1], bottom)
        return (np.concatenate([known, fresh]) if len(known) else fresh), top

    def _read(
        self, dataset: DatasetReader, left: int, top: int, right: int, bottom: int
    ) -> NDArray[np.uint8]:
        """Return (h, w, 3) uint8 BGR of a part of the file, as stored."""
        values = dataset.read(self.channels, window=((top, bottom), (left, right)))
        if self.colours is not None:
            return self.colours[values[0]]
        if values.dtype == np.uint16:
            values = self._to_8_bits(values)
        planes = values[::-1] if len(values) == 3 else np.repeat(values, 3, axis=0)
        return np.ascontiguousarray(np.moveaxis(planes, 0, 2))

    def _to_8_bits(self, values: NDArray[np.uint16]) -> NDArray[np.uint8]:
        if self.max_value is None or self.max_value >= 65535:
            return (values >> 8).astype(np.uint8)
        scaled = np.rint(values.astype(np.float32) * (255 / self.max_value))
        return np.minimum(scaled, 255).astype(np.uint8)


def _channels(dataset: DatasetReader, path: str) -> list[int]:
    """Return the numbers of the red, green and blue channels, or of the grey one.

    Raises:
        InputError: there are none, or their values are none of 8 or 16 bits.
    """
    from rasterio.enums import ColorInterp

    kinds = set(dataset.dtypes)
    if kinds not in ({"uint8"}, {"uint16"}):
        raise InputError(
            f"{path}: values of type {', '.join(sorted(kinds))}; expected 8 or 16 bits without "
            "sign: convert it"
        )
    meanings = list(dataset.colorinterp)
    wanted = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    if all(colour in meanings for colour in wanted):
        return [meanings.index(colour) + 1 for colour in wanted]
    if dataset.count in (1, 2):
        return [1]
    if dataset.count == 3:
        return [1, 2, 3]
    raise InputError(
        f"{path}: {dataset.count} channels, and none says which are red, green and blue; expected "
        "a colour image: extract three channels"
    )


def _palette(dataset: DatasetReader) -> NDArray[np.uint8] | None:
    """Return (256, 3) uint8 BGR, the colours of an image with a palette; None of any other."""
    if dataset.count != 1 or dataset.dtypes[0] != "uint8":
        return None
    try:
        colours = dataset.colormap(1)
    except ValueError:
        return None
    table = np.zeros((256, 3), np.uint8)
    for value, (red, green, blue, *_) in colours.items():
        table[value] = blue, green, red
    return table


@dataclass(frozen=True)
class GeoReference:
    """Where the pixels of an image lie on the Earth.

    Attributes:
        transform: a, b, c, d, e, f: x = a * column + b * row + c, y = d * column + e * row + f.
        crs: the coordinate system of x and y, as WKT or as EPSG:number.
    """

    transform: tuple[float, float, float, float, float, float]
    crs: str

    def polygons(self, boxes: NDArray[np.float32]) -> list[dict[str, object]]:
        """Return GeoJSON polygons, in degrees of WGS 84, longitude first.

        Args:
            boxes: (D, 4) xyxy in pixels of the image as its file has it.
        """
        from rasterio.warp import transform_geom

        a, b, c, d, e, f = self.transform
        rings = []
        for x1, y1, x2, y2 in boxes.astype(np.float64).tolist():
            # Against the clock where north is up, as RFC 7946 asks for.
            corners = ((x1, y1), (x1, y2), (x2, y2), (x2, y1), (x1, y1))
            ring = [(a * x + b * y + c, d * x + e * y + f) for x, y in corners]
            rings.append({"type": "Polygon", "coordinates": [ring]})
        return transform_geom(self.crs, WGS84, rings) if rings else []


def read_georeference(path: str | Path, crs: str | None = None) -> GeoReference:
    """Read where an image lies, from its GeoTIFF tags or its world file.

    Args:
        path: of the file.
        crs: the coordinate system, such as EPSG:32632, where the file names none.

    Raises:
        DeviceError: rasterio is not installed.
        InputError: the file says nothing of it, or GDAL does not read it.
        ToodError: no such coordinate system.
    """
    with open_raster(str(path)) as dataset:
        from rasterio.crs import CRS
        from rasterio.errors import CRSError

        if dataset.transform.is_identity:
            raise InputError(
                f"{path}: is not georeferenced; expected GeoTIFF tags or a world file beside it, "
                "as --geojson needs them"
            )
        a, b, c, d, e, f = tuple(dataset.transform)[:6]
        named = dataset.crs.to_wkt() if dataset.crs else crs
        if named is None:
            raise InputError(
                f"{path}: its world file says where it lies, but nothing in which coordinate "
                "system; give it, such as --crs EPSG:32632"
            )
        try:
            CRS.from_user_input(named)
        except CRSError as error:
            raise ToodError(
                f"--crs is {named}; expected a coordinate system such as EPSG:4326 ({error})"
            ) from error
    return GeoReference((a, b, c, d, e, f), named)
