"""The detector: from an image to detections in its own pixels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from inference.fakes import RedEngine, red_image
from PIL import Image

from tood_deploy import Detections, Detector
from tood_deploy.errors import InputError, ToodError


@pytest.mark.parametrize("size_hw", [(48, 64), (480, 640), (96, 33), (1000, 40)])
def test_boxes_are_in_pixels_of_the_image(size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    side = min(height, width) // 2
    found = Detector(RedEngine(), imgsz=(96, 128))(
        red_image(height, width, left=4, top=8, side=side)
    )
    assert isinstance(found, Detections)
    assert found.names() == ["red thing"]
    scale = max(
        height / found_size(size_hw)[0], 1
    )  # one pixel of the network's input, in pixels of the image
    np.testing.assert_allclose(found.boxes[0], [4, 8, 4 + side, 8 + side], atol=1.5 * scale)


def found_size(size_hw: tuple[int, int]) -> tuple[int, int]:
    scale = min(96 / min(size_hw), 128 / max(size_hw))
    return round(size_hw[0] * scale), round(size_hw[1] * scale)


def test_nothing_found_is_empty_not_none() -> None:
    found = Detector(RedEngine())(np.zeros((50, 50, 3), np.uint8))
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conf": -0.1}, "conf is -0.1; expected a number from 0 to 1"),
        ({"conf": 1.5}, "conf is 1.5"),
        ({"iou": 2}, "iou is 2"),
        ({"conf": float("nan")}, "conf is nan"),
        ({"max_det": 0}, "max_det is 0; expected 1 to 4"),
        ({"max_det": 5}, "max_det is 5; expected 1 to 4"),
        ({"imgsz": (0, 10)}, "imgsz is 0 10; expected two positive"),
        ({"imgsz": (10,)}, "imgsz is 10; expected two"),
    ],
)
def test_values_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(ToodError, match=message):
        Detector(RedEngine(), **options)


def test_max_det_keeps_the_best() -> None:
    assert Detector(RedEngine(), max_det=1).max_det == 1
    assert Detector(RedEngine()).max_det == 4


def test_a_missing_model_is_named() -> None:
    for model, kind in ((None, "None"), (7, "of type int"), ([], "of type list")):
        with pytest.raises(
            InputError, match=f"the model is {kind}; expected the path of an exported artefact"
        ):
            Detector(model)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "image", [None, "a.jpg", np.zeros((50, 50, 3), np.float32), np.zeros((0, 50, 3), np.uint8)]
)
def test_what_is_no_image_is_an_input_error(image: Any) -> None:
    with pytest.raises(InputError, match=r"an image is due|expected uint8"):
        Detector(RedEngine())(image)


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 1), (48, 64, 4)])
def test_every_kind_of_array_is_prepared_as_its_bgr_form(shape: tuple[int, ...]) -> None:
    detector, image = (
        Detector(RedEngine(), imgsz=(96, 128)),
        np.random.default_rng(0).integers(0, 256, shape, np.uint8),
    )
    bgr = np.ascontiguousarray(
        image[..., :3]
        if shape[2:] == (4,)
        else np.broadcast_to(image.reshape(48, 64, 1), (48, 64, 3))
    )
    np.testing.assert_array_equal(detector.prepare(image).image, detector.prepare(bgr).image)


def test_rgb_by_the_detector_or_by_the_call() -> None:
    image_bgr = red_image()
    image_rgb = image_bgr[..., ::-1]
    expected = Detector(RedEngine(), imgsz=(96, 128))(image_bgr)
    of_detector = Detector(RedEngine(), imgsz=(96, 128), color="rgb")
    assert len(expected) == 1
    assert len(of_detector(image_bgr)) == 0  # the square is blue to it
    for found in (
        of_detector(image_rgb),
        Detector(RedEngine(), imgsz=(96, 128))(image_rgb, color="rgb"),
        of_detector(image_bgr, color="bgr"),
    ):
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_pillow_images_are_rgb_whatever_the_colour_of_arrays() -> None:
    image = Image.fromarray(np.ascontiguousarray(red_image()[..., ::-1]))
    expected = Detector(RedEngine(), imgsz=(96, 128))(red_image())
    for color in ("bgr", "rgb"):
        np.testing.assert_array_equal(
            Detector(RedEngine(), imgsz=(96, 128), color=color)(image).boxes, expected.boxes
        )


def test_an_unknown_order_of_channels_is_named() -> None:
    for make in (
        lambda color: Detector(RedEngine(), color=color),
        lambda color: Detector(RedEngine())(red_image(), color=color),
    ):
        for color in ("gbr", ""):
            with pytest.raises(ToodError, match=f"color is '{color}'; expected bgr"):
                make(color)


def test_frames_of_a_stream_are_bgr_also_for_a_detector_of_rgb(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), red_image())
    with Detector(RedEngine(), imgsz=(48, 64), color="rgb") as detector:
        assert [len(found) for _, found in detector.stream(tmp_path)] == [1]


def test_batches_hold_one_padded_size() -> None:
    detector = Detector(RedEngine(), imgsz=(96, 128))
    prepared = [detector.prepare(red_image(48, 64)), detector.prepare(red_image(64, 48))]
    with pytest.raises(ToodError, match=r"group by transform\.net_hw"):
        detector.infer(prepared)
    assert [len(found) for found in detector.infer([prepared[0]] * 3)] == [1, 1, 1]


def test_one_image_is_not_copied_on_its_way_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    given, engine = [], RedEngine()
    run = engine._run
    monkeypatch.setattr(
        engine, "_run", lambda images, *rest: given.append(images) or run(images, *rest)
    )
    detector = Detector(engine, imgsz=(96, 128))
    prepared = [detector.prepare(red_image(left=left)) for left in (4, 8)]
    assert (detector.infer(prepared[:1])[0].boxes == detector.infer(prepared)[0].boxes).all()
    assert np.shares_memory(given[0], prepared[0].image)
    assert [images.shape for images in given] == [(1, 96, 128, 3), (2, 96, 128, 3)]


def test_stream_gives_frames_in_order(tmp_path: Path) -> None:
    for number in range(5):
        cv2.imwrite(str(tmp_path / f"{number}.png"), red_image(left=4 * number))
    with Detector(RedEngine(), imgsz=(48, 64)) as detector:
        lefts = [found.boxes[0, 0] for _, found in detector.stream(tmp_path, batch=2)]
    np.testing.assert_allclose(lefts, [0, 4, 8, 12, 16], atol=1)


def test_real_artefact_finds_the_same_in_a_batch_and_alone(tiny_artefact: Path) -> None:
    with Detector(tiny_artefact, conf=0.1, imgsz=(96, 128)) as detector:
        image = red_image(120, 160, side=60)
        alone = detector(image)
        for found in detector.infer([detector.prepare(image)] * 3):
            np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)
            np.testing.assert_array_equal(found.class_ids, alone.class_ids)


def test_real_artefact_finds_the_same_in_every_form_of_an_image(tiny_artefact: Path) -> None:
    grey = cv2.cvtColor(red_image(120, 160, side=60), cv2.COLOR_BGR2GRAY)
    bgr = red_image(120, 160, side=60)
    rgb = np.ascontiguousarray(bgr[..., ::-1])
    with Detector(tiny_artefact, conf=0.1, imgsz=(96, 128)) as detector:
        of_colour, of_grey = detector(bgr), detector(cv2.merge([grey] * 3))
        assert len(of_colour) > 0 < len(of_grey)
        for found in (
            detector(rgb, color="rgb"),
            detector(Image.fromarray(rgb)),
            detector(np.dstack([bgr, grey])),
        ):
            assert_same(found, of_colour)
        for found in (detector(grey), detector(grey[..., None]), detector(Image.fromarray(grey))):
            assert_same(found, of_grey)


def assert_same(found: Detections, expected: Detections) -> None:
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.class_ids, expected.class_ids)


class TestOfItsManifest:
    def engine(self, **fields: Any) -> RedEngine:
        engine = RedEngine()
        engine.manifest = replace(engine.manifest, preset=replace(engine.manifest.preset, **fields))
        return engine

    def test_iou_is_the_models_unless_given(self) -> None:
        assert Detector(RedEngine()).iou == 0.6
        assert Detector(self.engine(iou_threshold=0.3)).iou == 0.3
        assert Detector(self.engine(iou_threshold=0.3), iou=0.0).iou == 0.0

    @pytest.mark.parametrize("size_hw", [(48, 64), (200, 100), (96, 33)])
    @pytest.mark.parametrize(
        "fields",
        [
            {"resize": "stretch", "imgsz": (128, 128)},
            {"resize": "stretch", "imgsz": (100, 200)},
            {"resize": "stretch", "scale_factor": (2.0, 1.0)},
            {"imgsz": (128, 128), "canvas_hw": (128, 160)},
            {"imgsz": (96, 128), "pad_divisor": 64},
        ],
    )
    def test_boxes_come_back_whatever_the_resizing(
        self, fields: dict[str, Any], size_hw: tuple[int, int]
    ) -> None:
        height, width = size_hw
        side = min(height, width) // 2
        detector = Detector(self.engine(**fields))
        image = red_image(height, width, left=4, top=8, side=side)
        transform = detector.prepare(image).transform
        if fields.get("canvas_hw"):
            assert transform.net_hw == fields["canvas_hw"]
        pixel = max(
            original / resized
            for original, resized in zip(size_hw, transform.resized_hw, strict=True)
        )
        np.testing.assert_allclose(
            detector(image).boxes[0], [4, 8, 4 + side, 8 + side], atol=1.5 * max(pixel, 1)
        )
