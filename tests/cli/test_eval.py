import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data.small_coco import annotation, coco, result, write_json
from inference.fakes import CLASSES, RedEngine, red_image, write_image

from tood_deploy.cli.eval import main
from tood_deploy.inference import detector as detector_module

Run = Callable[..., tuple[int, str, str]]

# The engine finds the first two, and something else in the third image: precision 1 at the recalls
# 0.00 to 0.66, 67 of 101.
OBJECTS = [
    annotation(1, 1, (4, 8, 16, 16)),
    annotation(2, 1, (8, 8, 16, 16)),
    annotation(3, 1, (40, 30, 8, 8)),
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run tood-eval with a stand-in engine in a folder with truth.json and images/.

    Returns exit code, stdout and stderr.
    """
    monkeypatch.chdir(tmp_path)
    for i in range(1, 4):
        write_image(tmp_path / "images" / f"{i}.png", red_image(left=4 * i))
    write_json(tmp_path / "truth.json", coco(OBJECTS, names=CLASSES))
    monkeypatch.setattr(detector_module, "open_engine", lambda model, **options: RedEngine())

    def call(*arguments: str, model: str = "model.pth") -> tuple[int, str, str]:
        code = main([model, "--annotations", "truth.json", *arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def report(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    for word in words:
        assert word in err


def test_a_model(run: Run) -> None:
    code, out, err = run("--images", "images", "--imgsz", "48", "64", "--batch", "2")
    assert code == 0
    assert "AP  66.34" in out
    assert "model-eval/report.html" in out
    assert (
        "note: Classes without objects in the annotations have no AP and do not count in the mean: "
        "other/thing." in err
    )
    assert sorted(path.suffix for path in Path("model-eval").iterdir()) == [
        ".html",
        ".json",
        ".json",
        ".json",
        ".jsonl",
        ".md",
    ]
    assert len(json.loads(Path("model-eval/results.json").read_text())) == 3
    values = report("model-eval")
    assert values["facts"]["detection"].startswith(
        "conf 0.05, iou 0.6, at most 4 an image, 1000 candidates"
    )
    assert values["facts"]["command"].startswith("tood-eval model.pth --annotations truth.json")


def test_the_models_own_thresholds_are_the_default(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_engine(model: str, **options: Any) -> RedEngine:
        engine = RedEngine()
        own = replace(
            engine.manifest.preset, score_threshold=0.2, iou_threshold=0.3, candidates_per_level=500
        )
        engine.manifest = replace(engine.manifest, preset=own)
        return engine

    monkeypatch.setattr(detector_module, "open_engine", open_engine)
    run("--images", "images")
    assert (
        report("model-eval")["facts"]["detection"]
        == "conf 0.2, iou 0.3, at most 4 an image, 500 candidates a level"
    )
    run("--images", "images", "--conf", "0.1", "--iou", "0.5", "--output", "told")
    assert report("told")["facts"]["detection"].startswith("conf 0.1, iou 0.5")


def test_more_detections_than_coco_counts(run: Run) -> None:
    plain = run("--images", "images", "--imgsz", "48", "64", "--output", "first")[1]
    code, out, _ = run("--count", "300", "--output", "second", model="first/results.json")
    assert code == 0
    assert "Of 300 detections of a class in an image: AP 66.34" in out
    assert "Of 300" not in plain
    assert report("second")["numbers"] == report("first")["numbers"]
    assert report("second")["counted"]["detections"] == 300
    assert "More detections" in Path("second/report.md").read_text()
    assert_one_line(run("--images", "images", "--count", "99"), "99", "100")


def test_its_results_file_scores_the_same(run: Run) -> None:
    run("--images", "images", "--imgsz", "48", "64", "--output", "first")
    assert run("--output", "second", model="first/results.json")[0] == 0
    assert report("first")["numbers"] == report("second")["numbers"]


def test_run_again_it_reads_what_is_there(run: Run) -> None:
    arguments = ("--images", "images", "--imgsz", "48", "64")
    run(*arguments)
    assert "3 of 3 images were done by an earlier run" in run(*arguments)[2]
    assert "earlier run" not in run(*arguments, "--conf", "0.06")[2]
    assert "resumed" not in report("model-eval")["facts"]


def test_fast_decode_is_another_run_and_said(run: Run) -> None:
    arguments = ("--images", "images", "--imgsz", "48", "64")
    run(*arguments)
    assert report("model-eval")["facts"]["decoding"] == "all pixels"
    assert "earlier run" not in run(*arguments, "--fast-decode")[2]
    assert "--fast-decode" in report("model-eval")["facts"]["decoding"]


def test_quiet(run: Run) -> None:
    assert run("--images", "images", "--imgsz", "48", "64", "--quiet") == (0, "", "")


def test_a_model_that_finds_nothing_is_zero_and_said(run: Run) -> None:
    for i in range(1, 4):
        write_image(Path("images") / f"{i}.png", red_image(side=0))
    code, out, err = run("--images", "images", "--imgsz", "48", "64")
    assert code == 0
    assert "AP   0.00" in out
    assert "no detections at all" in err


@pytest.mark.parametrize(("least", "code"), [("66", 0), ("67", 1)])
def test_a_gate(run: Run, least: str, code: int) -> None:
    found, _, err = run("--images", "images", "--imgsz", "48", "64", "--min-ap", least)
    assert found == code
    assert ("failed: AP is 66.34, expected at least 67" in err) == bool(code)
    assert Path("model-eval/report.html").is_file()


def test_other_classes_need_a_mapping(run: Run) -> None:
    write_json(Path("truth.json"), coco(OBJECTS, names=("square", "cow")))
    arguments = ("--images", "images", "--imgsz", "48", "64")
    assert_one_line(run(*arguments), "only the model has red thing, other/thing", "--mapping FILE")
    write_json(Path("mapping.json"), {"red thing": "square", "other/thing": None})
    code, out, err = run(*arguments, "--mapping", "mapping.json")
    assert code == 0
    assert "AP  66.34" in out
    assert "Left out by the mapping: the model's other/thing." in err
    assert "the annotations' cow." in err


def test_options_without_effect_are_refused(run: Run) -> None:
    write_json(Path("some.json"), [result(1, 1, (1, 1, 4, 4), 0.5)])
    assert_one_line(
        run("--conf", "0.1", "--max-det", "5", "--mapping", "m.json", model="some.json"),
        "leave --conf, --max-det, --mapping out",
    )
    assert_one_line(run(), "--images is missing")


def test_images_without_annotations_are_one_line(
    run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(["model.pth", "--images", "images"])
    out, err = capfd.readouterr()
    assert_one_line((code, out, err), "--annotations is missing")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--images", "nowhere"), "no such folder"),
        (("--images", "."), "3 of the 3 images"),
        (("--images", "images", "--conf", "2"), "conf is 2.0"),
        (("--images", "images", "--batch", "0"), "batch is 0"),
        (("--images", "images", "--max-det", "5"), "max_det is 5"),
        (("--images", "images", "--output", "truth.json/below"), "truth.json"),
    ],
)
def test_wrong_use_is_one_line(run: Run, arguments: tuple[str, ...], word: str) -> None:
    assert_one_line(run(*arguments), word)


def test_files_that_are_not_coco(run: Run) -> None:
    write_json(Path("manifest.json"), {"format": 1, "preset": {}})
    assert_one_line(
        run(model="manifest.json"), "not COCO results: found an object with format, preset"
    )
    assert_one_line(run(model="absent.json"), "absent.json: cannot be read")
    write_json(Path("none.json"), [])
    assert_one_line(run(model="none.json"), "none.json: the list is empty")
    assert_one_line(
        run("--output", "truth.json", model="absent.json"), "truth.json: cannot be written"
    )
    Path("truth.json").write_text("{}")
    assert_one_line(run("--images", "images"), "not COCO annotations")


def test_a_missing_package_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tood_deploy.benchmark")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    assert_one_line(
        run("--images", "images"), "the package pycocotools is not installed", ".[eval]"
    )


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [("mmdet3", (0.536563, 0.861130, 0.593842)), ("authors", (0.536936, 0.861156, 0.593957))],
)
def test_real_checkpoints_score_as_in_their_own_code(
    shared: Path,
    tmp_path: Path,
    name: str,
    expected: tuple[float, ...],
    capfd: pytest.CaptureFixture[str],
) -> None:
    data, model = (
        shared / "data" / "bccd",
        shared / "reference" / "checkpoints" / f"{name}_bccd_tiny.pth",
    )
    arguments = [
        str(model),
        "--annotations",
        str(data / "val.json"),
        "--images",
        str(data / "val"),
        "--imgsz",
        "240",
        "320",
    ]
    assert main([*arguments, "--batch", "4", "--threads", "1", "--output", str(tmp_path)]) == 0
    assert "AP  53." in capfd.readouterr().out
    numbers = report(str(tmp_path))["numbers"]
    # What is left is the rounding of another runtime's convolutions, which may swap two boxes of
    # nearly equal score.
    assert tuple(numbers[key] for key in ("AP", "AP50", "AP75")) == pytest.approx(
        expected, abs=5e-4
    )


def test_slices_beside_the_whole(run: Run) -> None:
    for i in range(1, 4):
        write_image(Path("images") / f"{i}.png", red_image(left=4 * i))
    code, _, err = run("--images", "images", "--slice", "32", "40", "--imgsz", "48", "64")
    assert code == 0, err
    values = report("model-eval")
    assert values["whole_numbers"]["AP"] == pytest.approx(0.6634, abs=1e-3)
    assert "slices of 32 x 40" in values["facts"]["slices"]
    markdown = Path("model-eval/report.md").read_text(encoding="utf-8")
    assert "Whole against sliced" in markdown
    assert len(list(Path("model-eval").glob("predictions-*.jsonl"))) == 2


def test_its_thresholds_are_taken_back(run: Run) -> None:
    assert run("--images", "images", "--target-precision", "0.9")[0] == 0
    path = Path("model-eval/thresholds.json")
    assert "0.9" in json.loads(path.read_text(encoding="utf-8"))["chosen_for"]
    code, _, err = run("--images", "images", "--conf", str(path), "--output", "again")
    assert code == 0, err
    assert "red thing=" in report("again")["facts"]["detection"]


def test_a_guarantee_needs_images_and_says_so(run: Run) -> None:
    code, _, err = run("--images", "images", "--max-miss-rate", "0.1", "--confidence", "0.9")
    assert code == 0
    assert "too few objects" in err
    assert "22 are needed" in err


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (("--max-miss-rate", "1.5"), "1.5"),
        (("--target-recall", "0"), "0"),
        (("--confidence", "0.9"), "--max-miss-rate"),
        (("--max-miss-rate", "0.1", "--confidence", "2"), "2"),
        (("--merge", "nms"), "--slice"),
    ],
)
def test_wrong_thresholds_are_one_line(run: Run, given: tuple[str, ...], word: str) -> None:
    assert_one_line(run("--images", "images", *given), word)


def test_slices_of_a_results_file_are_refused(run: Run) -> None:
    write_json(Path("found.json"), [result(1, 1, (4, 8, 16, 16), 0.9)])
    assert_one_line(run("--slice", "32", "--except", "x", model="found.json"), "--slice")
