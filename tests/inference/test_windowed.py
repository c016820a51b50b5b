"""Images read by window: the same pixels as decoded at once, however they lie in the file."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from inference.test_sliced_pipeline import SquaresEngine, scene
from numpy.typing import NDArray
from PIL import Image

from tood_deploy import Detector, Slicing, ToodError
from tood_deploy.data.image_file import decode_image
from tood_deploy.data.images import header_of
from tood_deploy.errors import InputError
from tood_deploy.inference.detector import Detections
from tood_deploy.inference.run import Outputs, run_inference
from tood_deploy.inference.source import open_source
from tood_deploy.inference.windowed import RasterReader
from tood_deploy.reporter import Reporter

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
UTM = "EPSG:32632"
RGB = {"photometric": "RGB"}


def write_tiff(path: Path, planes: NDArray[Any], **profile: Any) -> Path:
    """Write channels (C, H, W) as a tiled TIFF."""
    layout = {"tiled": True, "blockxsize": 64, "blockysize": 64} | profile
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=len(planes),
        height=planes.shape[1],
        width=planes.shape[2],
        dtype=planes.dtype,
        **layout,
    ) as file:
        file.write(planes)
    return path


def planes_of(image_bgr: NDArray[Any]) -> NDArray[Any]:
    return np.moveaxis(image_bgr[..., ::-1], 2, 0)


def write_oriented(path: Path, orientation: int, image: NDArray[np.uint8]) -> Path:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(image[..., ::-1]).save(path, exif=exif, quality=95, subsampling=0)
    return path


def reader_of(path: Path, **options: Any) -> RasterReader:
    header = header_of(path)
    assert header is not None
    return RasterReader(str(path), header, **options)


def assert_windows_equal(path: Path, mean: float = 0.0, **options: Any) -> None:
    """Every window has the pixels that decoding the file at once gives, but for a mean."""
    whole, reader = decode_image(path.read_bytes(), str(path)), reader_of(path, **options)
    assert reader.size_hw == whole.shape[:2]
    windows = Slicing((70, 90), 0.2).windows(reader.size_hw)
    seen = set()
    for number, pixels in reader.read_windows(windows):
        left, top, right, bottom = windows[number].tolist()
        difference = np.abs(pixels.astype(int) - whole[top:bottom, left:right])
        assert difference.mean() <= mean
        seen.add(number)
    assert seen == set(range(len(windows)))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "jpg"])
def test_common_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    # The two decoders differ in how they scale colours up that are stored at half the size.
    every_colour = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    cv2.imwrite(str(path), scene(), every_colour if suffix == "jpg" else [])
    assert_windows_equal(path, mean=1.0 if suffix == "jpg" else 0.0)  # another build of libjpeg


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_exif_applies(tmp_path: Path, orientation: int) -> None:
    path = write_oriented(tmp_path / "a.png", orientation, scene(210, 300))
    assert_windows_equal(path)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_channels_of_tiled_tiff(tmp_path: Path, count: int) -> None:
    planes = planes_of(scene())
    planes = np.concatenate([planes, planes[:1]])[:count]
    photometric = RGB if count >= 3 else {}
    assert_windows_equal(write_tiff(tmp_path / "a.tif", planes, compress="deflate", **photometric))


def test_palette(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(scene()[..., ::-1]).quantize(32).save(path)
    assert_windows_equal(path)


def test_sixteen_bits(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", planes_of(scene()).astype(np.uint16) * 257, **RGB)
    assert_windows_equal(path)
    dark = write_tiff(tmp_path / "b.tif", planes_of(scene()).astype(np.uint16) * 4, **RGB)
    _, pixels = next(iter(reader_of(dark, bit_depth=10).read_windows(np.array([[0, 0, 50, 50]]))))
    assert np.abs(pixels.astype(int) - scene()[:50, :50]).max() <= 1


def test_what_it_cannot_read_is_one_line(tmp_path: Path) -> None:
    for planes, named in (
        (np.zeros((3, 64, 64), np.float32), "float32"),
        (np.zeros((7, 64, 64), np.uint8), "7 channels"),
    ):
        path = write_tiff(tmp_path / "a.tif", planes)
        with pytest.raises(InputError, match=named):
            reader_of(path)
    cut = tmp_path / "cut.tif"
    cut.write_bytes(write_tiff(tmp_path / "b.tif", planes_of(scene())).read_bytes()[:30_000])
    with pytest.raises(InputError, match="by window"):
        list(reader_of(cut).read_windows(np.array([[0, 0, 400, 290]])))


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_whole_is_scaled_down(tmp_path: Path, orientation: int) -> None:
    path = write_oriented(tmp_path / "a.png", orientation, scene(600, 800))
    small = reader_of(path).read_to_fit((96, 128))
    whole = decode_image(path.read_bytes(), "a")
    expected = cv2.resize(whole, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert min(small.shape[:2]) == 96
    assert np.abs(small.astype(int) - expected).mean() < 1


def sliced() -> Detector:
    return Detector(SquaresEngine(), imgsz=(96, 96), slicing=Slicing(96, 0.25, whole=False))


def rows(detections: Detections) -> list[tuple[float, ...]]:
    return sorted(map(tuple, np.column_stack([detections.boxes, detections.scores]).tolist()))


def test_by_window_detects_what_is_detected_at_once(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", planes_of(scene()))
    plain = list(sliced().stream(path))
    by_window = list(sliced().stream(path, batch=4, max_pixels=1000))
    assert rows(by_window[0][1]) == rows(plain[0][1])
    frame = by_window[0][0]
    assert frame.size_hw == plain[0][0].size_hw == (300, 420)
    assert frame.reader is not None
    assert frame.image_bgr.size == 0
    with pytest.raises(InputError, match="more than 1,000"):  # unsliced nothing changes
        list(Detector(SquaresEngine(), imgsz=(96, 96)).stream(path, max_pixels=1000))


def test_what_needs_all_pixels_is_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", planes_of(scene()))
    source = open_source(path, 1000)
    with pytest.raises(ToodError, match="--crops"):
        run_inference(sliced(), source, Outputs(crops=tmp_path / "c"), Reporter(True))


def georeferenced(path: Path, **profile: Any) -> Path:
    """A scene whose pixels are half a metre, its corner at 500000, 5300000 of zone 32."""
    transform = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_300_000)
    options = {"crs": UTM, "transform": transform} | profile
    return write_tiff(path, planes_of(scene()), **options)


def test_geojson_lies_where_the_image_lies(tmp_path: Path) -> None:
    from rasterio.warp import transform_geom

    path, out = georeferenced(tmp_path / "a.tif"), tmp_path / "out.geojson"
    run_inference(sliced(), open_source(path), Outputs(geojson=out), Reporter(True))
    content = json.loads(out.read_text(encoding="utf-8"))
    found = sliced()(scene())
    assert content["type"] == "FeatureCollection"
    assert len(content["features"]) == len(found)
    for feature, box in zip(content["features"], found.boxes.tolist(), strict=True):
        assert feature["properties"]["box"] == box
        ring = transform_geom("EPSG:4326", UTM, feature["geometry"])["coordinates"][0]
        x, y = np.array(ring).T
        expected = [500_000 + box[0] / 2, 500_000 + box[2] / 2]
        np.testing.assert_allclose([x.min(), x.max()], expected, atol=1e-3)
        expected = [5_300_000 - box[3] / 2, 5_300_000 - box[1] / 2]
        np.testing.assert_allclose([y.min(), y.max()], expected, atol=1e-3)
        area = np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])
        assert area > 0, "against the clock"
        longitude, latitude = feature["geometry"]["coordinates"][0][0]
        assert (round(longitude), round(latitude)) == (9, 48)


def test_world_file_needs_a_coordinate_system(tmp_path: Path) -> None:
    path, out = tmp_path / "a.png", tmp_path / "out.geojson"
    cv2.imwrite(str(path), scene())
    with pytest.raises(InputError, match="not georeferenced"):
        run_inference(sliced(), open_source(path), Outputs(geojson=out), Reporter(True))
    world = ["0.5", "0", "0", "-0.5", "500000.25", "5299999.75"]
    path.with_suffix(".pgw").write_text("\n".join(world), encoding="utf-8")
    with pytest.raises(InputError, match="--crs"):
        run_inference(sliced(), open_source(path), Outputs(geojson=out), Reporter(True))
    with pytest.raises(ToodError, match="EPSG:4326"):
        run_inference(
            sliced(), open_source(path), Outputs(geojson=out, crs="somewhere"), Reporter(True)
        )
    assert not out.exists()
    outputs = Outputs(geojson=out, crs=UTM)
    run_inference(sliced(), open_source(path), outputs, Reporter(True))
    other = tmp_path / "other.geojson"
    tiff = georeferenced(tmp_path / "a.tif")
    run_inference(sliced(), open_source(tiff), Outputs(geojson=other), Reporter(True))
    one, two = (json.loads(file.read_text(encoding="utf-8")) for file in (out, other))
    assert [f["geometry"] for f in one["features"]] == [f["geometry"] for f in two["features"]]
