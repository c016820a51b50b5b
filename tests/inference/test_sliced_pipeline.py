"""Sliced detection: windows in batches, across frames, and what a user sees of it."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from inference.fakes import CLASSES, RedEngine, red_image
from numpy.typing import NDArray

from tood_deploy import Detections, Detector, Slicing, ToodError
from tood_deploy.data.images import read_images
from tood_deploy.engines import BatchDetections
from tood_deploy.inference.frame import Frame, Source
from tood_deploy.inference.pipeline import Timings, detect_frames
from tood_deploy.inference.slicing import merge_windows, shift
from tood_deploy.manifest import Manifest
from tood_deploy.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 96


class SquaresEngine(RedEngine):
    """Finds every red square: the greener or smaller, the lower its score; odd greens: class 1."""

    in_flight = 1

    def __init__(self, seconds_per_image: float = 0.0, fail_at_call: int | None = None) -> None:
        super().__init__(seconds_per_image, fail_at_call)
        preset = replace(PRESETS["tiny"], class_names=CLASSES)
        self.manifest = Manifest(preset, max_det=50)

    def _run(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        super()._run(images, valid_hw, score_threshold, iou_threshold)
        count = len(images)
        result = BatchDetections(
            np.zeros(count, np.int32),
            np.zeros((count, 50, 4), np.float32),
            np.zeros((count, 50), np.float32),
            np.zeros((count, 50), np.int32),
        )
        for i, image in enumerate(images):
            mask = ((image[..., 0] > 150) & (image[..., 1] < 140)).astype(np.uint8)
            _, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
            for n, (x, y, w, h, _) in enumerate(stats[1:51].tolist()):
                green = round(float(image[..., 1][labels == n + 1].mean()))
                result.boxes_net[i, n] = x, y, x + w, y + h
                result.scores[i, n] = (1 - green / 255) * min(1, w * h / 144)  # slivers less
                result.labels[i, n] = green % 2
            found = result.scores[i] > score_threshold
            order = np.argsort(-np.where(found, result.scores[i], -1), kind="stable")
            result.num_dets[i] = found.sum()
            for column in (result.boxes_net, result.scores, result.labels):
                column[i] = column[i][order]
        return result


def scene(height: int = 300, width: int = 420, seed: int = 0) -> NDArray[np.uint8]:
    """A grey image with red squares of 12 to 20 pixels, far from one another."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 60, np.uint8)
    for top in range(4, height - 30, 40):
        for left in range(4, width - 30, 40):
            side, green = int(rng.integers(12, 21)), int(rng.integers(0, 60))
            dy, dx = rng.integers(0, 12, 2)
            image[top + dy : top + dy + side, left + dx : left + dx + side] = (0, green, 250)
    return image


class Images(Source):
    kind = "images"

    def __init__(self, images: list[NDArray[np.uint8]]) -> None:
        super().__init__(("memory",), len(images))
        self.images, self.read = images, 0

    def __iter__(self) -> Iterator[Frame]:
        for i, image in enumerate(self.images):
            self.read += 1
            yield Frame(image, f"memory {i}", i)


def detector(engine: RedEngine | None = None, slicing: Slicing | None = None) -> Detector:
    slicing = slicing or Slicing(WINDOW)
    return Detector(engine or SquaresEngine(), imgsz=(WINDOW, WINDOW), slicing=slicing)


def rows(detections: Detections) -> list[tuple[float, ...]]:
    columns = (detections.boxes, detections.scores[:, None], detections.class_ids[:, None])
    return list(map(tuple, np.concatenate(columns, axis=1).tolist()))


def test_every_object_is_found_once_where_it_is() -> None:
    image = scene()
    mask = ((image[..., 2] > 150) & (image[..., 1] < 140)).astype(np.uint8)
    stats = cv2.connectedComponentsWithStats(mask)[2][1:]
    expected = sorted((x, y, x + w, y + h) for x, y, w, h, _ in stats.tolist())
    found = detector(slicing=Slicing(WINDOW, 0.25, whole=False))(image)
    assert sorted(map(tuple, found.boxes.tolist())) == expected
    assert (np.diff(found.scores) <= 0).all()


def test_a_window_gives_what_its_crop_gives_alone() -> None:
    image, slicing = scene(), Slicing(WINDOW, whole=False)
    plain = Detector(SquaresEngine(), imgsz=(WINDOW, WINDOW))
    parts = [
        shift(plain(np.ascontiguousarray(image[top:bottom, left:right])), np.array(window))
        for window in slicing.windows((300, 420)).tolist()
        for left, top, right, bottom in [window]
    ]
    assert rows(detector(slicing=slicing)(image)) == rows(merge_windows(parts, slicing))


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_results_do_not_depend_on_the_batch_and_come_in_order(batch: int) -> None:
    images = [scene(200 + 30 * (i % 3), 260, seed=i) for i in range(7)]
    images[3] = scene(50, 60)  # smaller than a window
    alone = [rows(detector()(image)) for image in images]
    engine = SquaresEngine()
    results = list(detect_frames(detector(engine), Images(images), batch))
    assert [frame.index for frame, _ in results] == list(range(7))
    assert [rows(found) for _, found in results] == alone
    assert max(engine.batches) <= batch


def test_batches_go_across_images_and_are_the_same_in_every_run() -> None:
    images = [scene(100, 180, seed=i) for i in range(8)]  # 4 windows and the whole
    runs = []
    for _ in range(2):
        engine = SquaresEngine()
        list(detect_frames(detector(engine), Images(images), 8))
        runs.append(engine.batches)
    assert runs[0] == runs[1]
    windows = len(Slicing(WINDOW).windows((100, 180)))
    assert windows < 8
    assert 8 in runs[0]
    assert sum(runs[0]) == 8 * (windows + 1)


def test_the_window_that_is_the_networks_input_is_not_resized() -> None:
    image = scene()
    prepared = detector().prepare(image[:WINDOW, :WINDOW])
    assert prepared.transform.resized_hw == prepared.transform.net_hw == (WINDOW, WINDOW)
    assert (prepared.image[..., ::-1] == image[:WINDOW, :WINDOW]).all()


def test_one_window_is_said_once() -> None:
    sliced = detector()
    for _ in range(3):
        assert rows(sliced(scene(50, 60))) == rows(
            Detector(SquaresEngine(), imgsz=(WINDOW, WINDOW))(scene(50, 60))
        )
    assert len(sliced.slice_notes) == 1
    assert "96 x 96" in sliced.slice_notes[0]


def test_whole_finds_what_no_window_holds() -> None:
    image = red_image(300, 420, left=20, top=20, side=240)
    alone = detector(slicing=Slicing(WINDOW, whole=False, merge="nms"))(image)
    both = detector(slicing=Slicing(WINDOW, merge="nms", metric="iou"))(image)
    assert not (np.ptp(alone.boxes[:, ::2], axis=1) > 200).any()
    assert (np.ptp(both.boxes[:, ::2], axis=1) > 200).any()


def test_times_of_a_frame_are_those_of_all_its_windows() -> None:
    timings = Timings()
    engine = SquaresEngine(seconds_per_image=0.004)
    list(detect_frames(detector(engine), Images([scene(), scene()]), 4, timings))
    parts = sum(engine.batches) // 2
    assert timings.frames == 2
    assert timings.mean_ms("infer") >= 4 * parts
    assert timings.mean_ms("pre") > 0


@pytest.mark.parametrize("fail_at_call", [0, 3])
def test_errors_of_the_engine_come_out_and_no_thread_stays(fail_at_call: int) -> None:
    before = threading.active_count()
    sliced = detector(SquaresEngine(fail_at_call=fail_at_call))
    with pytest.raises(RuntimeError, match="the engine broke"):
        list(detect_frames(sliced, Images([scene()] * 20), 2))
    assert threading.active_count() == before


def test_closing_early_ends_the_threads_and_reads_no_more() -> None:
    before, source = threading.active_count(), Images([scene()] * 200)
    results = detect_frames(detector(), source, 4)
    next(results)
    results.close()
    assert threading.active_count() == before
    assert source.read < 30


def test_a_camera_does_not_wait_for_a_batch_to_fill() -> None:
    source = Images([scene(100, 180)] * 3)
    source.kind = "live"
    reached = time.monotonic()
    frames = iter(source)

    def slowly() -> Iterator[Frame]:
        for frame in frames:
            yield frame
            time.sleep(0.2)

    source.__class__ = type("Slow", (Images,), {"__iter__": lambda self: slowly()})
    results = detect_frames(detector(), source, 64)
    next(results)
    assert time.monotonic() - reached < 0.18
    results.close()


def test_classes_have_thresholds_of_their_own_and_can_be_left_out() -> None:
    image, imgsz = scene(90, 90), (WINDOW, WINDOW)
    every = Detector(SquaresEngine(), imgsz=imgsz, conf=0)(image)
    assert set(every.class_ids.tolist()) == {0, 1}
    scores = sorted(every.scores[every.class_ids == 1].tolist())
    conf = f"0,{CLASSES[1]}={scores[0]}"
    chosen = Detector(SquaresEngine(), imgsz=imgsz, conf=conf)(image)
    assert rows(chosen) == [row for row in rows(every) if row[5] == 0 or row[4] > scores[0]]
    only = Detector(SquaresEngine(), imgsz=imgsz, conf=0, only=[CLASSES[1]])(image)
    without = Detector(SquaresEngine(), imgsz=imgsz, conf=0, exclude=[CLASSES[0]])(image)
    assert rows(only) == rows(without) == [row for row in rows(every) if row[5] == 1]
    assert len(Detector(SquaresEngine(), imgsz=imgsz, only=CLASSES, max_det=1)(image)) == 1


def test_slices_need_all_pixels() -> None:
    with pytest.raises(ToodError, match="fast_decode"):
        Detector(SquaresEngine(), slicing=Slicing(8), fast_decode=True)


@pytest.mark.slow
@pytest.mark.shared
def test_windows_of_a_mosaic_of_photographs_are_their_crops(shared: Path) -> None:
    """A real network on a 4K image: in slices and batches it gives what crops give alone."""
    photographs = read_images(shared / "data" / "coco_mini" / "images" / "train2017", 12)
    tiles = [np.asarray(cv2.resize(image, (960, 720)), np.uint8) for image in photographs]
    rows_of_tiles = [np.concatenate(tiles[4 * i : 4 * i + 4], axis=1) for i in range(3)]
    mosaic = np.concatenate(rows_of_tiles)
    assert mosaic.shape == (2160, 3840, 3)
    slicing = Slicing((640, 960), whole=False)
    weights = ROOT / "tood_deploy" / "weights" / "tiny-demo.safetensors"
    with Detector(weights, conf=0.1) as plain:
        parts = [
            shift(plain(np.ascontiguousarray(mosaic[top:bottom, left:right])), np.array(window))
            for window in slicing.windows((2160, 3840)).tolist()
            for left, top, right, bottom in [window]
        ]
        plain.slicing = slicing
        alone, batched = merge_windows(parts, slicing), plain(mosaic, batch=4)
    assert len(alone) > 10
    assert len(batched) == len(alone)
    np.testing.assert_allclose(batched.scores, alone.scores, atol=1e-5)
    for column in ("boxes", "class_ids"):
        one, other = getattr(batched, column), getattr(alone, column)
        order, other_order = (
            np.lexsort(batched.boxes.T.round(1)),
            np.lexsort(alone.boxes.T.round(1)),
        )
        np.testing.assert_allclose(one[order], other[other_order], atol=0.05)
