"""Options of quality and search that do not go together, and what right ones become."""

from pathlib import Path

import pytest
from benchmark.truths import annotation, coco, write_json
from inference.fakes import CLASSES, red_image, write_image
from tood_deploy.export.option_rules import check_options

from tood_deploy.benchmark.precision_search import PrecisionSearch
from tood_deploy.cli.export import main, open_annotated, order_from, parser, precision_from
from tood_deploy.export.precision.convert import PrecisionOptions

INT8 = ("--precision", "int8", "--calib-data", "images")
TUNED = ("--autotune-precision", "--calib-data", "images")
ANNOTATED = ("--annotations", "truth.json", "--images", "images")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with truth.json and images/ to work in."""
    monkeypatch.chdir(tmp_path)
    for i in range(1, 3):
        write_image(tmp_path / "images" / f"{i}.png", red_image(left=4 * i))
    write_json(
        tmp_path / "truth.json", coco([annotation(1, 1, (4, 8, 16, 16))], names=CLASSES, images=2)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-ap-drop", "0.5"), "--max-ap-drop needs --precision int8 or --autotune-precision"),
        ((*INT8, "--max-ap-drop", "0.5"), "--max-ap-drop needs --annotations FILE"),
        (
            (*INT8, "--max-ap-drop", "0.5", "--annotations", "truth.json"),
            "--annotations needs --images DIR",
        ),
        (ANNOTATED, "--annotations needs --precision bf16, fp16 or int8, or --max-ap-drop"),
        ((*INT8, "--images", "images"), "--images needs --shapes auto or --annotations"),
        ((*INT8, "--max-drop", "1", "--max-ap-drop", "0", *ANNOTATED), "two limits of one quality"),
        (
            (*INT8, "--max-ap-drop", "-1", *ANNOTATED),
            "the largest drop is -1.0; expected 0 or more",
        ),
        (
            (*INT8, "--max-ap-drop", "1", "--annotations", "absent.json", "--images", "images"),
            "absent.json: cannot be read",
        ),
        (
            (*INT8, "--max-ap-drop", "1", "--annotations", "truth.json", "--images", "."),
            "2 of the 2 images of truth.json are missing",
        ),
        (
            TUNED,
            "--autotune-precision needs --max-ap-drop D with --annotations and --images, or --max-drop D",
        ),
        (
            ("--autotune-precision", "--max-drop", "1"),
            "--autotune-precision needs --calib-data DIR",
        ),
        (
            (*TUNED, "--max-drop", "1", "--precision", "int8"),
            "--precision beside --autotune-precision",
        ),
        ((*TUNED, "--max-drop", "1", "--keep", "neck.*"), "--keep beside --autotune-precision"),
        ((*TUNED, "--max-drop", "1", "--rest", "bf16"), "--rest needs --to engine"),
        ((*TUNED, "--max-drop", "1", "--to", "triton"), "does not make --to triton"),
    ],
)
def test_wrong_together(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model.onnx", *arguments, "--output", "out.onnx"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def precision_options(*arguments: str) -> PrecisionOptions:
    parsed = parser().parse_args(["model.onnx", *arguments])
    check_options(vars(parsed))
    data = open_annotated(parsed)
    return precision_from(parsed, order_from(parsed, "", data), data)


def test_quality_in_ap() -> None:
    options = precision_options(*INT8, "--max-ap-drop", "0", *ANNOTATED)
    assert (options.precision, options.int8.max_drop, options.wanted) == ("int8", 0.0, "int8")
    assert options.quality is not None


@pytest.mark.parametrize("how", [("--max-ap-drop", "0.2", *ANNOTATED), ("--max-drop", "0.2")])
def test_a_search(how: tuple[str, ...]) -> None:
    options = precision_options(*TUNED, *how, "--quiet")
    assert options.wanted == "the best mixture of precisions"
    assert isinstance(options.lower, PrecisionSearch)
    assert (options.lower.int8.max_drop, options.lower.int8.scheme, options.lower.half) == (
        0.2,
        "u8s7",
        None,
    )
    assert (options.lower.quality is None) == (how[0] == "--max-drop")
