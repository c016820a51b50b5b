"""What a checkpoint alone can tell is asked for once it is loaded, before it is exported."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark.truths import annotation, coco, write_json
from inference.fakes import red_image, write_image

from tood_deploy.cli.export import main
from tood_deploy.export import export as carry_out
from tood_deploy.export.tensorrt.options import Profiles
from tood_deploy.export.triton.config import config_text, triton_config
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.manifest import Manifest
from tood_deploy.presets import PRESETS

INT8 = ("--precision", "int8", "--calib-data", "images")


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`tood.pth`, a deformable network of 80 classes once it is loaded; to export it would be long work."""
    monkeypatch.chdir(tmp_path)
    Path("tood.pth").write_bytes(b"weights")
    for number in range(1, 3):
        write_image(Path("images") / f"{number}.png", red_image())
    state = {
        "backbone.conv1.weight": None,
        "backbone.bn1.bias": None,
        "neck.fpn_convs.0.conv.weight": None,
    }
    model = SimpleNamespace(preset=PRESETS["r101-dcn-2x"], state_dict=lambda: state)
    monkeypatch.setattr(carry_out, "load_checkpoint", lambda *_, **__: model)
    monkeypatch.setattr(carry_out, "export_onnx", None)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refuse(*arguments: str) -> str:
        assert main(["tood.pth", *arguments, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return refuse


def test_deformable_convolutions_in_another_form(refused: Callable[..., str]) -> None:
    assert "which OpenVINO lacks; leave --deform out" in refused(
        "--to", "openvino", "--deform", "op"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--to", "openvino"),
        ("--to", "onnx", "--deform", "op"),
        ("--to", "openvino", "--deform", "gather"),
    ],
)
def test_forms_that_fit_go_on(arguments: tuple[str, ...]) -> None:
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        main(["tood.pth", *arguments, "--quiet"])


def test_patterns_that_fit_no_layer(refused: Callable[..., str]) -> None:
    assert (
        "--keep head.* fits no layer; expected patterns of names such as backbone.conv1"
        in refused(*INT8, "--keep", "backbone.*,head.*")
    )


def test_classes_that_are_not_annotated(refused: Callable[..., str]) -> None:
    write_json(
        Path("truth.json"), coco([annotation(1, 1, (4, 8, 16, 16))], names=("okapi",), images=2)
    )
    assert "truth.json" in refused(
        *INT8, "--max-ap-drop", "1", "--annotations", "truth.json", "--images", "images"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"class_names": ("okapi",)}, "has other classes"), ({"max_det": 300}, "has another output")],
)
def test_a_served_model_of_the_same_name(
    fields: dict[str, Any], message: str, refused: Callable[..., str]
) -> None:
    preset = replace(
        PRESETS["r101-dcn-2x"],
        class_names=fields.get("class_names", PRESETS["r101-dcn-2x"].class_names),
    )
    other = Manifest(preset, max_det=fields.get("max_det", 100))
    Path("repo/tood").mkdir(parents=True)
    config = triton_config(other, "onnxruntime", TritonOptions(name="tood"), Profiles(((64, 96),)))
    Path("repo/tood/config.pbtxt").write_text(config_text(config))
    assert message in refused("--to", "triton", "--output", "repo")
