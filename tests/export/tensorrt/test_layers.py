"""The report on precision: exact shares of a known network, the inspector's JSON of two versions,
and a precision that is not there."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from export.small_graph import MACS_A_PIXEL, save_small
from onnx import helper
from rich.console import Console

from tood_deploy.engines.tensorrt.library import load_flavour
from tood_deploy.errors import ArtefactError
from tood_deploy.export.tensorrt.build import parse_network
from tood_deploy.export.tensorrt.layers import (
    Layer,
    LayerReport,
    engine_layers,
    inspect_plan,
    layers_table,
    network_layers,
    shares,
    shares_table,
)
from tood_deploy.onnx_file import read_onnx

pytest.importorskip("tensorrt_rtx")
SIZE = (64, 96)


def layers_of(path: Path) -> tuple[Layer, ...]:
    flavour = load_flavour("tensorrt_rtx")
    return network_layers(flavour, parse_network(flavour, read_onnx(path)).network, SIZE)


class TestNetwork:
    @pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
    def test_the_convolution_is_counted_in_its_precision(
        self, precision: str, tmp_path: Path
    ) -> None:
        layers = layers_of(save_small(tmp_path / "a.onnx", precision))
        (convolution,) = (layer for layer in layers if layer.kind == "CONVOLUTION")
        assert convolution == Layer(
            "the_conv", "CONVOLUTION", precision, MACS_A_PIXEL * SIZE[0] * SIZE[1]
        )
        assert shares(layers)[precision].mac_share == 1.0
        LayerReport(layers).check(precision)

    def test_quantised_activations_on_full_weights_are_not_int8(self, tmp_path: Path) -> None:
        path = save_small(
            tmp_path / "a.onnx",
            "int8",
            extra=[helper.make_node("Conv", ["low_pixels", "weight"], ["more"], name="half_way")],
        )
        (layer,) = (layer for layer in layers_of(path) if layer.name == "half_way")
        assert layer.precision == "fp32"

    def test_matrix_products_count_their_inner_side(self, tmp_path: Path) -> None:
        turned = helper.make_node("Transpose", ["pixels"], ["turned"], perm=[0, 1, 3, 2])
        layers = layers_of(
            save_small(
                tmp_path / "a.onnx",
                extra=[turned, helper.make_node("MatMul", ["pixels", "turned"], ["more"])],
            )
        )
        (product,) = (layer for layer in layers if layer.kind == "MATRIX_MULTIPLY")
        assert (product.precision, product.macs) == ("fp32", 3 * 64 * 96 * 64)

    def test_whole_numbers_and_conversions_have_no_precision(self, tmp_path: Path) -> None:
        layers = layers_of(save_small(tmp_path / "a.onnx", "fp16"))
        assert {
            layer.precision for layer in layers if layer.kind in ("CAST", "CONSTANT", "SHAPE")
        } == {""}
        assert sum(share.layers for share in shares(layers).values()) == sum(
            bool(layer.precision) for layer in layers
        )


class TestReport:
    MIXED = (
        Layer("a", "CONVOLUTION", "fp16", 30),
        Layer("b", "CONVOLUTION", "fp32", 10),
        Layer("c", "ACTIVATION", "fp32", 0),
        Layer("d", "CAST", "", 0),
    )

    def test_shares(self) -> None:
        assert LayerReport(self.MIXED).to_dict() == {
            "fp16": {"layers": round(1 / 3, 4), "arithmetic": 0.75},
            "fp32": {"layers": round(2 / 3, 4), "arithmetic": 0.25},
        }
        assert shares(()) == {}

    def test_a_precision_that_computes_nothing_is_an_error(self) -> None:
        LayerReport(self.MIXED).check("fp16")
        LayerReport(()).check("fp32")
        for asked in ("int8", "bf16"):
            with pytest.raises(
                ArtefactError,
                match=rf"{asked} was asked for and no arithmetic .* \(found: fp16 75%, fp32 25%\)",
            ):
                LayerReport(self.MIXED).check(asked)
        idle = (Layer("a", "CONVOLUTION", "fp32", 10), Layer("b", "ACTIVATION", "fp16", 0))
        with pytest.raises(ArtefactError, match="fp16 was asked for"):
            LayerReport(idle).check("fp16")

    def test_the_table_says_what_the_engine_is(self) -> None:
        def show(report: LayerReport) -> str:
            console = Console(width=140, file=io.StringIO())
            console.print(shares_table(report))
            return console.file.getvalue()  # type: ignore[attr-defined]

        assert "75.0%" in show(LayerReport(self.MIXED, note="no GPU"))
        assert "no GPU" in show(LayerReport(self.MIXED, note="no GPU"))
        assert "has 4 layers after fusing: 1 fp16, 2 fp32" in show(LayerReport((), self.MIXED))


def inspected(
    kind: str, inputs: list[dict[str, str]], outputs: list[dict[str, str]]
) -> dict[str, Any]:
    return {"Name": "a layer", "LayerType": kind, "Inputs": inputs, "Outputs": outputs}


def test_a_list_of_layers_has_their_whole_names() -> None:
    names = ["node_conv2d " + "backbone.layer3.22." * 6 + "conv2", "a:fire:b[red]"]
    # as tood-export's, into a file
    written = io.StringIO()
    console = Console(width=80, file=written, soft_wrap=True, markup=False)
    console.print(layers_table([Layer(name, "CONVOLUTION", "fp16", 10**9) for name in names]))
    lines = written.getvalue().splitlines()
    said = "".join(line.split("│")[1].strip() for line in lines if "│" in line)
    assert said == "".join(names).replace(" ", "")
    assert "fp16" in console.file.getvalue()  # type: ignore[attr-defined]


class TestInspector:
    # As the documents of TensorRT give it: 10.x has one field for format and type, 11.x two.
    @pytest.mark.parametrize(
        ("layer", "precision"),
        [
            (
                inspected(
                    "CaskConvolution", [{"Format/Datatype": "Half"}], [{"Format/Datatype": "Float"}]
                ),
                "fp16",
            ),
            (
                inspected(
                    "conv",
                    [
                        {
                            "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."  # noqa: E501
                        }
                    ],
                    [],
                ),
                "int8",
            ),
            (inspected("pool", [], [{"Format/Datatype": "Row major linear FP32 format"}]), "fp32"),
            (
                inspected("gemm", [{"DataType": "BFloat16", "Format": "Row major linear"}], []),
                "bf16",
            ),
            (
                inspected(
                    "shape_call",
                    [{"DataType": "Int64"}],
                    [{"Format/Datatype": "N/A due to dynamic shapes"}],
                ),
                "",
            ),
        ],
    )
    def test_the_lowest_precision_at_a_layer(self, layer: dict[str, Any], precision: str) -> None:
        (found,) = engine_layers(json.dumps({"Layers": [layer]}))
        assert (found.name, found.kind, found.precision) == (
            layer["Name"],
            layer["LayerType"],
            precision,
        )

    def test_names_alone_tell_no_precision(self) -> None:
        assert list(engine_layers('{"Layers": ["conv1"]}')) == [Layer("conv1", "", "", 0)]

    def test_a_plan_that_cannot_be_opened_gives_the_reason(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        layers, note = inspect_plan(load_flavour("tensorrt_rtx"), b"no plan")
        assert layers is None
        assert note.startswith("the built engine was not inspected: TensorRT-RTX")
        assert capfd.readouterr() == ("", "")
