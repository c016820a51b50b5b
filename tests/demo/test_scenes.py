"""Generated images: the same from the same seed, with boxes that hold their shapes."""

import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from tood_deploy.demo.scenes import RADII, SCENE_CLASSES, main, make_scene, write_scenes


def test_a_seed_is_an_image() -> None:
    first, again, other = make_scene(4), make_scene(4), make_scene(5)
    np.testing.assert_array_equal(first.image_bgr, again.image_bgr)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert not np.array_equal(first.image_bgr, other.image_bgr)


def test_boxes_lie_in_the_image_and_classes_vary() -> None:
    scenes = [make_scene((1, i)) for i in range(60)]
    boxes = np.concatenate([scene.boxes for scene in scenes])
    labels = np.concatenate([scene.labels for scene in scenes])
    assert all(
        scene.image_bgr.shape == (240, 320, 3) and scene.image_bgr.dtype == np.uint8
        for scene in scenes
    )
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [320, 240]).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() > RADII[0]
    assert sides.max() <= 2 * RADII[1] + 2
    assert np.bincount(labels, minlength=5).min() > 20
    assert {len(scene.boxes) for scene in scenes} >= {2, 3, 4, 5, 6}


def test_other_sizes() -> None:
    scene = make_scene(0, (150, 400))
    assert scene.image_bgr.shape == (150, 400, 3)
    assert (scene.boxes[:, 2:] <= [400, 150]).all()


def test_written_sets_are_coco(tmp_path: Path) -> None:
    path = write_scenes(tmp_path / "a", 5, seed=9)
    content = json.loads(path.read_text())
    assert [entry["name"] for entry in content["categories"]] == list(SCENE_CLASSES)
    assert len(content["images"]) == 5
    for number, entry in enumerate(content["images"]):
        image = cv2.imread(str(tmp_path / "a" / "images" / entry["file_name"]))
        assert image is not None
        assert np.abs(image.astype(int) - make_scene((9, number)).image_bgr).mean() < 12
    scene = make_scene((9, 0))
    first = [entry["bbox"] for entry in content["annotations"] if entry["image_id"] == 0]
    np.testing.assert_array_equal(
        first, np.concatenate((scene.boxes[:, :2], scene.boxes[:, 2:] - scene.boxes[:, :2]), axis=1)
    )


def test_hundreds_a_second() -> None:
    make_scene(0)  # makes the textures
    start = time.process_time()
    for i in range(40):
        make_scene((2, i))
    assert (time.process_time() - start) / 40 < 0.01


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "set"), "--count", "2", "--seed", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "set" / "annotations.json")
    assert len(list((tmp_path / "set" / "images").iterdir())) == 2
    assert main([str(tmp_path / "set"), "--count", "0"]) == 2
    assert main(["/proc/scenes", "--count", "1"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
