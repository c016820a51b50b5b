import json
from pathlib import Path

import pytest
from data.small_coco import annotation, random_rows, result, truth_of
from inference.fakes import write_image

from tood_deploy.benchmark.evaluation.evaluate import evaluate_results
from tood_deploy.benchmark.evaluation.notes import category_notes, size_notes, unlisted_notes
from tood_deploy.benchmark.evaluation.report import write_evaluation
from tood_deploy.benchmark.html_report import Table
from tood_deploy.cli.eval import summary
from tood_deploy.data.coco_metrics import NUMBERS
from tood_deploy.data.image_set import list_image_files
from tood_deploy.data.results import empty_results, results_from_rows
from tood_deploy.reporter import Reporter


def write(folder: Path, *arguments, **options) -> tuple[str, str, dict]:
    write_evaluation(evaluate_results(*arguments, **options), folder)
    html, markdown = (
        (folder / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "md")
    )
    return html, markdown, json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_report_of_a_data_set_with_images(tmp_path: Path) -> None:
    annotations, rows = random_rows(1)
    truth = truth_of(tmp_path, annotations, images=12)
    for image in truth.images.values():
        write_image(tmp_path / "p" / image.file_name)
    files = list_image_files(truth, tmp_path / "p")
    facts = {"command": "tood-eval x"}
    html, markdown, values = write(
        tmp_path,
        "x.onnx",
        truth,
        results_from_rows(rows, truth),
        conf=0.05,
        iou=0.6,
        files=files,
        facts=facts,
        notes=["careful"],
    )
    assert tuple(values["numbers"]) == NUMBERS
    assert 0 < values["numbers"]["AP"] < 1
    assert set(values["classes"]) == {"cat", "dog"}
    assert (
        values["classes"]["cat"]["best_cut"]["f1"]
        >= values["classes"]["cat"]["best_cut_as_run"]["f1"]
    )
    assert len(values["precision_recall"]["mean_precision"]["0.50"]) == 101
    assert sum(each["missed"] for each in values["mistakes"]) > 0
    assert values["mistakes"][0]["file"] == "1.png"
    ap = f"{100 * values['numbers']['AP']:.2f}"
    for text in (html, markdown):
        assert ap in text
        assert "careful" in text
        assert "tood-eval x" in text
    assert html.count("data:image/jpeg") == 2 * sum(
        min(8, sum(each[kind] > 0 for each in values["mistakes"])) for kind in ("missed", "false")
    )


def test_report_of_no_detections(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (1, 1, 40, 40))])
    html, markdown, values = write(tmp_path, "x", truth, empty_results())
    assert values["numbers"]["AP"] == values["numbers"]["AR100"] == 0
    assert values["best_for_all_classes"] is None
    assert "no detections at all: every AP is 0" in html
    assert "no detections at all: every AP is 0" in markdown
    assert "not given (--images)" in html


def test_report_where_nothing_is_right_and_scores_are_no_probabilities(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (1, 1, 40, 40))])
    html, _, values = write(
        tmp_path, "x", truth, results_from_rows([result(2, 1, (1, 1, 4, 4), 7.0)], truth)
    )
    assert "Not one detection is right" in html
    assert "no probabilities" in html
    assert values["calibration"] is None


def test_classes_without_objects_are_named(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (1, 1, 40, 40))])
    evaluation = evaluate_results(
        "x", truth, results_from_rows([result(1, 1, (1, 1, 40, 40), 0.5)], truth)
    )
    assert evaluation.notes == [
        "Classes without objects in the annotations have no AP and do not count in the mean: dog."
    ]
    assert evaluation.size_counts() == {"all": 1, "small": 0, "medium": 1, "large": 0}


@pytest.mark.parametrize(
    ("size_hw", "words"),
    [((48, 64), None), ((24, 32), "1.png is 32 x 24, the annotations say 64 x 48")],
)
def test_images_of_another_size_are_told(
    tmp_path: Path, size_hw: tuple[int, int], words: str | None
) -> None:
    notes = size_notes(
        truth_of(tmp_path, [annotation(1, 1, (1, 1, 4, 4))]), {1: size_hw, 2: (48, 64)}
    )
    assert len(notes) == (words is not None)
    assert all(words in note for note in notes if words)


def test_images_that_are_not_annotated_are_told(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (1, 1, 4, 4))], images=1)
    write_image(tmp_path / "p" / "1.png")
    assert unlisted_notes(truth, list_image_files(truth, tmp_path / "p")) == []
    write_image(tmp_path / "p" / "2.png")
    assert (
        "1 images beside the 1 of"
        in unlisted_notes(truth, list_image_files(truth, tmp_path / "p"))[0]
    )


def test_what_a_mapping_leaves_out_is_told(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, [annotation(1, 1, (1, 1, 4, 4))])
    assert category_notes(truth, ["a", "b"], [1, 2]) == []
    assert [note.rpartition(" ")[2] for note in category_notes(truth, ["a", "b"], [2, None])] == [
        "b.",
        "cat.",
    ]
    (note,) = category_notes(truth, ["a", "b\nc"], [1, None])[:1]
    assert note.splitlines() == [note]
    assert "b\\x0ac" in note


HOSTILE_NAMES = (
    "$x$ and $",
    "[/]",
    "[red]b",
    "a\x1b[31mb",
    "a\nb",
    "caf\udce9",
    "_hidden",
    "<i>b</i>",
    "a|b",
    "`c` *d*",
    "{{ e }}",
)


def test_class_names_are_shown_literally(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(HOSTILE_NAMES)
    annotations, rows = random_rows(1, categories=count)
    truth = truth_of(tmp_path, annotations, images=12, names=HOSTILE_NAMES)
    for image in truth.images.values():
        write_image(tmp_path / "p" / image.file_name)
    evaluation = evaluate_results(
        "[bold]$m$",
        truth,
        results_from_rows(rows, truth),
        files=list_image_files(truth, tmp_path / "p"),
    )
    write_evaluation(evaluation, tmp_path)
    html, markdown = (
        (tmp_path / f"report.{kind}").read_bytes().decode() for kind in ("html", "md")
    )
    for shown in ("$x$ and $", "[/]", "[red]b", r"a\x1b[31mb", r"a\x0ab", r"caf\xe9", "_hidden"):
        assert shown in html
    assert "&lt;i&gt;b&lt;/i&gt;" in html
    assert "<i>b" not in html
    assert "{{ e }}" in html
    assert r"\[red\]b" in markdown
    assert r"a\|b" in markdown
    rows_of_table = [line for line in markdown.splitlines() if "x0ab" in line]
    assert rows_of_table
    assert all(line.startswith("| ") and line.endswith(" |") for line in rows_of_table)
    for text in (html, markdown):
        assert "\x1b" not in text
    values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert set(values["classes"]) == set(HOSTILE_NAMES)
    table = Table(("class", "n"), [(name, 1) for name in HOSTILE_NAMES], note="[x] $y$")
    Reporter().table(table.rich())
    Reporter().result(summary(evaluation))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for shown in ("$x$ and $", "[/]", "[red]b", r"a\x1b[31mb", r"a\x0ab", r"caf\xe9"):
        assert shown in out
