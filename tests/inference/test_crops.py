from pathlib import Path

import cv2
import numpy as np
from inference.fakes import found, red_image, video_frame, write_all

from tood_deploy.inference.frame import Frame
from tood_deploy.inference.sinks import Crops, crop_box

ONE = found((8, 8, 24, 24))


def test_every_object(tmp_path: Path) -> None:
    sink = Crops(tmp_path / "crops", ["one/v.avi", "one/a.png"])
    write_all(
        sink,
        (video_frame(12, 0, name="one/v.avi"), found((8, 8, 24, 24), (-5, -5, 10, 12))),
        (Frame(red_image(), "one/a.png"), found((40, 30, 90, 90), (-9, -9, -3, -3))),
    )
    files = {path.name: cv2.imread(str(path)) for path in (tmp_path / "crops").iterdir()}
    assert {name: image.shape[:2] for name, image in files.items() if image is not None} == {
        "v_000012_000_red-thing.jpg": (16, 16),
        "v_000012_001_other-thing.jpg": (12, 10),
        "a_000_red-thing.jpg": (18, 24),
    }


def test_inputs_of_one_name(tmp_path: Path) -> None:
    items = [(Frame(red_image(), name), ONE) for name in ("one/a.png", "two/a.png", "two/a.jpg")]
    write_all(Crops(tmp_path, [frame.name for frame, _ in items]), *items)
    assert len(list(tmp_path.rglob("*.jpg"))) == 3


def test_a_box_is_widened_to_whole_pixels() -> None:
    image = np.arange(100, dtype=np.uint8).reshape(10, 10)[..., None].repeat(3, 2)
    assert crop_box(image, np.array([1.6, 2.2, 3.1, 3.9], np.float32)).shape == (2, 3, 3)
    assert crop_box(image, np.array([20, 20, 30, 30], np.float32)).size == 0
