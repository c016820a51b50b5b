"""Which options of `tood-export` go together, by their names; that the parser's are checked, tests/cli/ says."""

from typing import Any

import pytest
from tood_deploy.export.option_rules import (
    OF_BUILDS,
    OF_CHECKPOINTS,
    OF_INT8,
    OF_PROFILES,
    OF_TRITON,
    as_flag,
    check_options,
)

from tood_deploy.cli.export import parser
from tood_deploy.errors import ToodError


def options(checkpoint: str = "tood.pth", **given: Any) -> dict[str, Any]:
    return vars(parser().parse_args([checkpoint])) | given


def test_nothing_asked_for_passes() -> None:
    check_options(options())
    check_options(options("tood.onnx", to="engine"))


@pytest.mark.parametrize("name", [*OF_PROFILES, *OF_BUILDS, *OF_INT8, *OF_TRITON, *OF_CHECKPOINTS])
def test_every_name_is_an_option(name: str) -> None:
    assert name in options()


@pytest.mark.parametrize("name", OF_BUILDS)
def test_options_of_a_build_need_one(name: str) -> None:
    check_options(options(to="engine", **{name: "1"}))
    check_options(options(to="triton", backend="tensorrt", **{name: "1"}))
    for more in (
        {"to": "onnx"},
        {"to": "openvino"},
        {"to": "triton"},
        {"to": "triton", "backend": "onnxruntime"},
    ):
        with pytest.raises(
            ToodError,
            match=f"^{as_flag(name)} needs --to engine, or --to triton with --backend tensorrt$",
        ):
            check_options(options(**more, **{name: "1"}))


def test_several_strangers_are_named_together() -> None:
    with pytest.raises(
        ToodError, match=r"^--imgsz, --max-det need a checkpoint, the \.onnx has them inside$"
    ):
        check_options(options("tood.ONNX", to="openvino", max_det=5, imgsz=[64, 96]))


def test_what_is_not_enough_is_said() -> None:
    with pytest.raises(
        ToodError,
        match=r"^--shapes auto needs --images DIR: a folder of images like those to come$",
    ):
        check_options(options(to="engine", shapes="auto"))
