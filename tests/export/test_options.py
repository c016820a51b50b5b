"""Options of `tood-export`: which go together, what they become, and their names of the last
release."""

from pathlib import Path

import pytest
from data.small_coco import annotation, coco, write_json
from inference.fakes import CLASSES, red_image, write_image

from tood_deploy.benchmark.precision_search import PrecisionSearch
from tood_deploy.cli.export import config_from, main, open_annotated, parser, search_from
from tood_deploy.errors import ToodError
from tood_deploy.export.config import SECTIONS, ExportConfig
from tood_deploy.export.options import Option, When, options_of
from tood_deploy.export.tensorrt.options import EngineOptions
from tood_deploy.export.triton.options import TritonOptions

INT8 = ("--precision", "int8", "--calib-data", "images")
TUNED = ("--autotune-precision", "--calib-data", "images")
ANNOTATED = ("--annotations", "truth.json", "--images", "images")


def config(*arguments: str, source: str = "tood.pth") -> ExportConfig:
    return config_from(parser().parse_args([source, *arguments]))


def sample(option: Option) -> list[str]:
    """The option with some value."""
    if option.parse is None:
        return [option.flag]
    texts = {"--batch": "1,2,4", "--shapes": "64x96"}
    return [option.flag, option.choices[0] if option.choices else texts.get(option.flag, "1")]


ENGINE_OPTIONS = [pytest.param(option, id=name) for name, option in options_of(EngineOptions)]


class TestRules:
    def test_nothing_asked_for_passes(self) -> None:
        assert config() == ExportConfig("tood.pth")
        assert config("--to", "engine", source="tood.onnx").builds_engine

    @pytest.mark.parametrize("option", ENGINE_OPTIONS)
    def test_options_of_a_build_need_one(self, option: Option) -> None:
        config("--to", "engine", *sample(option))
        config("--to", "triton", "--backend", "tensorrt", *sample(option))
        for target in (
            ("onnx",),
            ("openvino",),
            ("triton",),
            ("triton", "--backend", "onnxruntime"),
        ):
            with pytest.raises(
                ToodError, match=rf"^{option.flag} needs --to engine, or --to triton"
            ):
                config("--to", *target, *sample(option))

    @pytest.mark.parametrize(
        "option", [pytest.param(option, id=name) for name, option in options_of(TritonOptions)]
    )
    def test_options_of_a_server_need_one(self, option: Option) -> None:
        config("--to", "triton", *sample(option))
        with pytest.raises(ToodError, match=rf"^{option.flag} needs --to triton$"):
            config("--to", "engine", *sample(option))

    def test_several_options_are_named_together(self) -> None:
        given = ("--max-det", "5", "--imgsz", "64", "96", "--preset", "tiny")
        with pytest.raises(ToodError, match=r"^--imgsz, --max-det, --preset need a checkpoint"):
            config("--to", "openvino", *given, source="tood.ONNX")

    def test_what_is_not_enough(self) -> None:
        with pytest.raises(ToodError, match=r"^--shapes auto needs --images DIR"):
            config("--to", "engine", "--shapes", "auto")

    def test_every_option_has_a_field_of_its_own(self) -> None:
        flags = [option.flag for section in SECTIONS for _, option in options_of(section)]
        assert len(set(flags)) == len(flags) >= 40

    def test_conditions_name_options_that_there_are(self) -> None:
        every = [option for section in SECTIONS for _, option in options_of(section)]
        known = {option.flag for option in every}
        conditions: set[When] = {
            when for one in every for when in (*one.only, *one.never, *one.required)
        }
        words = {word.strip(",:") for when in conditions for word in when.text.split()}
        assert {word for word in words if word.startswith("--")} <= known


class TestOldNames:
    @pytest.mark.parametrize(
        ("old", "now"),
        [
            (("--rest", "bf16"), ("--fallback-precision", "bf16")),
            (("--keep", "a,b"), ("--keep-fp32", "a,b")),
            (("--calib-pictures", "7"), ("--calib-images", "7")),
        ],
    )
    def test_they_mean_the_same_with_a_note(
        self, old: tuple[str, ...], now: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = config("--to", "openvino", *INT8, *old)
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert now[0] in err
        assert made == config("--to", "openvino", *INT8, *now)
        assert capsys.readouterr().err == ""

    def test_an_old_value(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert config("--to", "triton", "--device", "gpu").triton.device == "cuda"
        assert "cuda" in capsys.readouterr().err

    def test_help_leaves_them_out(self) -> None:
        text = parser().format_help()
        assert "--fallback-precision" in text
        assert "--rest" not in text
        assert "--calib-pictures" not in text


class TestValues:
    @pytest.mark.parametrize(
        ("arguments", "batches"),
        [
            ((), (1, 1, 8)),
            (("--max-batch", "4"), (1, 4, 4)),
            (("--batch", "2,3,4"), (2, 3, 4)),
            (("--batch", "4"), (1, 4, 4)),
        ],
    )
    def test_batches(self, arguments: tuple[str, ...], batches: tuple[int, int, int]) -> None:
        assert config("--to", "engine", *arguments).sizes.batches == batches

    def test_two_largest_batches(self) -> None:
        with pytest.raises(ToodError, match="--max-batch beside --batch"):
            config("--to", "engine", "--max-batch", "4", "--batch", "1,2,4")

    @pytest.mark.parametrize(
        ("arguments", "scheme"),
        [((), "u8s7"), (("--target-cpu", "native"), "u8s8"), (("--to", "engine"), "s8s8")],
    )
    def test_8_bits_are_those_of_the_target(self, arguments: tuple[str, ...], scheme: str) -> None:
        assert config(*INT8, *arguments).int8_scheme == scheme

    @pytest.mark.parametrize(
        ("source", "arguments", "place"),
        [
            ("a/tood.pth", (), "tood.onnx"),
            ("r50-1x", ("--to", "engine"), "r50-1x.engine"),
            ("a/tood.onnx", INT8, "tood-int8.onnx"),
            ("tood.onnx", ("--to", "openvino", *INT8), "tood-openvino-int8.xml"),
            ("tood.onnx", (*TUNED, "--max-drop", "1"), "tood-tuned.onnx"),
            ("tood.onnx", ("--to", "triton"), "tood"),
        ],
    )
    def test_where_the_result_goes(
        self, source: str, arguments: tuple[str, ...], place: str
    ) -> None:
        assert config(*arguments, source=source).place == Path(place)

    def test_warm_up(self) -> None:
        assert config("--to", "triton", "--warm-up", "1,4").triton.warm_up_batches == (1, 4)
        assert config("--to", "triton", "--warm-up", "none").triton.warm_up_batches == ()
        with pytest.raises(ToodError, match=r"^--warm-up: "):
            config("--to", "triton", "--warm-up", "two")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with truth.json and images/ to work in."""
    monkeypatch.chdir(tmp_path)
    for i in range(1, 3):
        write_image(tmp_path / "images" / f"{i}.png", red_image(left=4 * i))
    write_json(
        tmp_path / "truth.json", coco([annotation(1, 1, (4, 8, 16, 16))], names=CLASSES, images=2)
    )


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--max-ap-drop", "0.5"),
            "--max-ap-drop needs --precision int8 or auto, or --autotune-precision",
        ),
        ((*INT8, "--max-ap-drop", "0.5"), "--max-ap-drop needs --annotations FILE"),
        (
            (*INT8, "--max-ap-drop", "0.5", "--annotations", "truth.json"),
            "--annotations needs --images DIR",
        ),
        (ANNOTATED, "--annotations needs --precision bf16, fp16, int8 or auto, or --max-ap-drop"),
        ((*INT8, "--images", "images"), "--images needs --shapes auto or --annotations"),
        (
            (*INT8, "--max-drop", "1", "--max-ap-drop", "0", *ANNOTATED),
            "--max-drop beside --max-ap-drop",
        ),
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
            "--autotune-precision needs --max-ap-drop D with --annotations and --images, "
            "or --max-drop D",
        ),
        (
            ("--autotune-precision", "--max-drop", "1"),
            "--autotune-precision needs --calib-data DIR",
        ),
        (
            (*TUNED, "--max-drop", "1", "--precision", "int8"),
            "--precision beside --autotune-precision",
        ),
        (
            (*TUNED, "--max-drop", "1", "--keep-fp32", "neck.*"),
            "--keep-fp32 beside --autotune-precision",
        ),
        (
            (*TUNED, "--max-drop", "1", "--fallback-precision", "bf16"),
            "--fallback-precision needs --to engine",
        ),
        ((*TUNED, "--max-drop", "1", "--to", "triton"), "--autotune-precision beside --to triton"),
    ],
)
def test_wrong_together(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model.onnx", *arguments, "--output", "out.onnx"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("limit", [("--max-ap-drop", "0.2", *ANNOTATED), ("--max-drop", "0.2")])
def test_a_search(limit: tuple[str, ...]) -> None:
    asked = config(*TUNED, *limit, "--quiet", source="model.onnx")
    search = search_from(asked, open_annotated(asked))
    assert isinstance(search, PrecisionSearch)
    assert (search.int8.max_drop, search.int8.scheme, search.half) == (0.2, "u8s7", None)
    assert (search.quality is None) == (limit[0] == "--max-drop")
