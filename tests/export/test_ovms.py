"""The folder of OpenVINO Model Server: versions, the configuration, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from tood_deploy import Detector
from tood_deploy.cli.export import main
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import OutputError, ToodError
from tood_deploy.export.ovms import plan_ovms


def test_a_repository_grows_by_models_and_versions(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    for source, name, expected in (
        ("x/a.onnx", None, "a/1"),
        ("x/a.onnx", None, "a/2"),
        ("x/a.onnx", "b", "b/1"),
    ):
        planned = plan_ovms(source, repository, name)
        assert planned.path == repository / expected / "model.xml"
        planned.path.parent.mkdir(parents=True)
        planned.path.touch()
        config = json.loads(planned.write_config().read_text(encoding="utf-8"))
    served = [one["config"] for one in config["model_config_list"]]
    assert served == [{"name": "a", "base_path": "a"}, {"name": "b", "base_path": "b"}]


def test_a_failed_export_leaves_no_model_in_the_configuration(tmp_path: Path) -> None:
    planned = plan_ovms("a.onnx", tmp_path / "repo", None)
    (tmp_path / "repo" / "other" / "1").mkdir(parents=True)
    config = json.loads(planned.write_config().read_text(encoding="utf-8"))
    assert config == {"model_config_list": []}


@pytest.mark.parametrize("name", ["a/b", "..", ".a"])
def test_names_that_cannot_be_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(ToodError, match="--name"):
        plan_ovms("a.onnx", tmp_path, name)


def test_places_that_are_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputError):
            plan_ovms("a.onnx", place, None)


@pytest.mark.slow
def test_the_command_fills_it(tiny_artefact: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    repository, image = tmp_path / "repo", synthetic_image(120, 160, 0)
    target = ["--to", "ovms", "--output", str(repository), "--name", "tood", "--quiet"]
    assert main([str(tiny_artefact), *target]) == 0
    files = sorted(str(path.relative_to(repository)) for path in repository.rglob("*.*"))
    assert files == ["config.json", "tood/1/model.bin", "tood/1/model.json", "tood/1/model.xml"]
    with (
        Detector(tiny_artefact, conf=0.1) as detector,
        Detector(repository / "tood" / "1" / "model.xml", conf=0.1) as served,
    ):
        expected, detections = detector(image), served(image)
    assert len(detections) == len(expected) > 0
    np.testing.assert_allclose(detections.scores, expected.scores, atol=1e-4)
    assert main([str(tiny_artefact), *target[:3], str(tmp_path), *target[4:]]) == 2


def test_options_of_other_targets_are_refused(tiny_artefact: Path, tmp_path: Path) -> None:
    target = [str(tiny_artefact), "--to", "ovms", "--output", str(tmp_path / "repo")]
    assert main([*target, "--backend", "tensorrt"]) == 2
    assert not (tmp_path / "repo").exists()
