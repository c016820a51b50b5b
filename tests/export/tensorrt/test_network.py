"""The parser: what TensorRT-RTX takes, and that what it lacks is named, with the option that avoids it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from export.small_graph import save_small
from onnx import TensorProto, helper

from tood_deploy.engines.tensorrt.library import load_flavour
from tood_deploy.errors import ArtefactError
from tood_deploy.export.tensorrt.build import ParsedNetwork, parse_network
from tood_deploy.onnx_file import read_onnx

pytest.importorskip("tensorrt_rtx")


def parse(path: Path) -> ParsedNetwork:
    return parse_network(load_flavour("tensorrt_rtx"), read_onnx(path))


def node(operator: str, *inputs: str) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, ["more"], name=f"the_{operator}")


def constant(name: str, values: Sequence[int]) -> onnx.NodeProto:
    return helper.make_node(
        "Constant", [], [name], value=onnx.numpy_helper.from_array(np.array(values, np.int64))
    )


def in_loop(body_node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A loop of one round around a node."""
    values = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (("i", 7, []), ("go", 9, []), ("done", 9, []))
    ]
    body = helper.make_graph(
        [body_node, helper.make_node("Identity", ["go"], ["done"])], "body", values[:2], values[2:]
    )
    once = helper.make_node(
        "Constant", [], ["once"], value=helper.make_tensor("", TensorProto.INT64, [], [1])
    )
    return [once, helper.make_node("Loop", ["once", ""], [], body=body)]


DEFORM = (
    "pixels",
    "weight",
    "convolved",
)  # the shapes do not matter: the parser does not come so far


def test_ours_is_taken(tmp_path: Path) -> None:
    network = parse(save_small(tmp_path / "a.onnx")).network
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    assert names == ["images", "valid_hw", "score_threshold", "iou_threshold"]
    assert network.get_output(1).shape[1:] == (100, 4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            [node("DeformConv", *DEFORM)],
            r"1\.7.* has no operator DeformConv; export the ONNX with --deform gather$",
        ),
        ([node("Det", "pixels")], "has no operator Det; export the ONNX again with tood-export$"),
        (
            [node("DeformConv", *DEFORM), node("Unique", "pixels")],
            "has no operator DeformConv, Unique; export .* --deform gather$",
        ),
        (in_loop(node("DeformConv", *DEFORM)), "has no operator DeformConv; "),
    ],
)
def test_a_missing_operator_is_named(
    extra: list[onnx.NodeProto], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtefactError, match=message):
        parse(save_small(tmp_path / "a.onnx", extra=extra))


def test_a_refused_use_of_an_operator_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few, many = (
        constant("few", [1, 2]),
        constant("many", [0, 1, 0, 1]),
    )  # more indices than there are places to write to
    with pytest.raises(
        ArtefactError,
        match=r"cannot take it: operator ScatterElements at node the_ScatterElements: .*[Ii]ndices",
    ):
        parse(
            save_small(
                tmp_path / "a.onnx",
                extra=[few, many, node("ScatterElements", "few", "many", "many")],
            )
        )
    assert capfd.readouterr() == ("", "")
