"""AP that a graph in memory loses; the truth is what the float32 graph itself finds, so it has
nearly all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from benchmark.small_artefact import for_size
from data.small_coco import annotation, coco, write_json
from onnx import numpy_helper

from tood_deploy.benchmark.evaluation.evaluate import DataSet, open_data_set
from tood_deploy.benchmark.precision_search import ApDrop
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import InputError, ToodError
from tood_deploy.export.precision.half import lower_precision
from tood_deploy.inference.detector import Detector
from tood_deploy.onnx_file import OnnxArtefact, read_onnx


@pytest.fixture(scope="module")
def reference(tiny_artefact: Path) -> OnnxArtefact:
    """The exported network, for small images."""
    return for_size(read_onnx(tiny_artefact), (64, 96))


@pytest.fixture(scope="module")
def data(tiny_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder, found = tmp_path_factory.mktemp("annotated"), []
    with Detector(
        tiny_artefact, imgsz=(64, 96), conf=0.05, max_det=10, self_test=False
    ) as detector:
        for i in range(1, 3):
            image = synthetic_image(64, 96, i)
            cv2.imwrite(str(folder / f"{i}.png"), image)
            rows = detector(image).to_coco(i, range(1, 81))
            found += [annotation(i, row["category_id"], row["bbox"]) for row in rows]
    return open_data_set(
        write_json(folder / "truth.json", coco(found, names=detector.class_names, images=2)), folder
    )


@pytest.fixture(scope="module")
def drop(data: DataSet, reference: OnnxArtefact) -> ApDrop:
    return ApDrop(data, reference)


def changed(model: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> onnx.ModelProto:
    """A copy of a graph with one constant changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(tensor for tensor in copy.graph.initializer if tensor.name.endswith(name))
    tensor.CopyFrom(
        numpy_helper.from_array(
            change(numpy_helper.to_array(tensor)).astype(np.float32), tensor.name
        )
    )
    return copy


def test_the_reference_loses_nothing(drop: ApDrop, reference: OnnxArtefact) -> None:
    assert drop.reference_ap > 50
    assert drop(reference.model) == 0


def test_half_precision_runs_and_costs_little(drop: ApDrop, reference: OnnxArtefact) -> None:
    bf16, _ = lower_precision(
        reference.model, "bf16"
    )  # ONNX Runtime has no such convolution on the CPU
    assert 0 < abs(drop(bf16)) < 0.5 * drop.reference_ap


def test_what_is_not_a_number_loses_all(drop: ApDrop, reference: OnnxArtefact) -> None:
    broken = changed(reference.model, "bbox_head.tood_reg.bias", lambda bias: bias * np.nan)
    assert drop(broken) == drop.reference_ap


def test_other_weights_lose_much(drop: ApDrop, reference: OnnxArtefact) -> None:
    assert (
        drop(changed(reference.model, "bbox_head.tood_reg.bias", lambda bias: bias + 1))
        > 0.3 * drop.reference_ap
    )


class TestBadInput:
    def test_other_classes(self, reference: OnnxArtefact, data: DataSet, tmp_path: Path) -> None:
        path = write_json(tmp_path / "truth.json", coco([annotation(1, 1, (1, 1, 9, 9))], images=2))
        with pytest.raises(ToodError, match="its 2 categories are not the model's 80 classes"):
            ApDrop(open_data_set(path, data.truth.path.parent), reference)

    def test_nothing_to_lose(self, reference: OnnxArtefact, data: DataSet, tmp_path: Path) -> None:
        names = reference.manifest.preset.class_names
        path = write_json(
            tmp_path / "truth.json",
            coco([annotation(1, 1, (95, 63, 0.5, 0.5))], names=names, images=2),
        )
        drop = ApDrop(open_data_set(path, data.truth.path.parent), reference)
        with pytest.raises(InputError, match=r"no AP on its 2 images.*give annotated images"):
            drop(reference.model)
