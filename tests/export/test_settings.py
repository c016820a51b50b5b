"""Settings of a checkpoint that are not the published ones, in the exported graph and its manifest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tood_deploy import Detector
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines.torch_engine import TorchEngine
from tood_deploy.export.export import export_onnx
from tood_deploy.manifest import read_manifest

SETTINGS: dict[str, Any] = {
    "anchor": "based",
    "norm_groups": 16,
    "norm_eps": 1e-3,
    "batch_norm_eps": 1e-3,
    "anchor_side": 6.0,
    "anchor_offset": 0.5,
    "delta_means": (0.1, 0.0, 0.0, 0.1),
    "delta_stds": (0.1, 0.2, 0.3, 0.2),
    "channel_order": "bgr",
    "pad_value": (0.5, 0.0, -0.5),
    "resize": "stretch",
    "imgsz": (90, 160),
    "iou_threshold": 0.4,
    "max_det": 50,
    "candidates_per_level": 300,
}


@pytest.mark.slow
def test_every_setting_is_in_the_artefact(seeded_model: Callable[..., Any], tmp_path: Path) -> None:
    """Equal to the network in PyTorch, whose settings are tested apart against naive computations."""
    model, path = seeded_model("tiny", **SETTINGS), tmp_path / "a.onnx"
    export_onnx(model, path)
    manifest = read_manifest(path)
    assert manifest is not None
    assert (manifest.preset, manifest.max_det) == (model.preset, 50)
    norms = [node for node in onnx.load(path).graph.node if node.op_type == "GroupNormalization"]
    assert {
        attribute.i
        for node in norms
        for attribute in node.attribute
        if attribute.name == "num_groups"
    } == {16}
    image = synthetic_image(100, 300, 0)
    with (
        Detector(path, conf=0.05) as exported,
        Detector(TorchEngine(model), conf=0.05) as reference,
    ):
        assert (exported.iou, exported.max_det, exported.sizing) == (0.4, 50, model.preset.sizing)
        prepared = exported.prepare(image).transform
        assert (prepared.resized_hw, prepared.net_hw) == ((90, 160), (96, 160))
        found, expected = exported(image), reference(image)
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(
        np.sort(found.boxes, axis=0), np.sort(expected.boxes, axis=0), atol=0.05
    )
