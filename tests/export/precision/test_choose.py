"""The choice of the fastest precision: candidates, times, and what is left where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from manifest_values import stated

from tood_deploy.errors import CheckFailed, ToodError
from tood_deploy.export.config import ExportConfig, PrecisionOptions
from tood_deploy.export.precision import choose
from tood_deploy.export.result import ExportResult
from tood_deploy.manifest import manifest_path
from tood_deploy.preprocess import ImageSize
from tood_deploy.presets import PRESETS
from tood_deploy.reporter import Reporter

SILENT = Reporter.silent()
SIZING = PRESETS["tiny"].sizing
TIMES = {"fp32": 10.0, "bf16": 6.0, "int8 beside fp32": 4.0, "int8 beside bf16": 3.95}


@pytest.fixture
def config(tmp_path: Path) -> ExportConfig:
    precision = PrecisionOptions("auto", calib_data=tmp_path / "images")
    return ExportConfig("m.pth", "openvino", tmp_path / "out" / "m.xml", precision=precision)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU with bf16, and times that are always the same."""
    (tmp_path / "out").mkdir()

    def times(artefacts: dict[str, Path], image: object, sizing: ImageSize) -> dict[str, list]:
        return {name: [TIMES[name]] * 3 for name in artefacts}

    monkeypatch.setattr(choose, "time_engines", times)
    monkeypatch.setattr(choose, "has_bf16", lambda: True)
    monkeypatch.setattr(choose, "images_to_verify", lambda *_: [None])


def export_of(*failing: str) -> Callable[[ExportConfig], ExportResult]:
    """A function that writes three files, or fails for these names."""

    def export(one: ExportConfig) -> ExportResult:
        name = one.place.stem.replace("-", " ")
        if name in failing:
            raise CheckFailed(f"{name} is too far off")
        manifest = stated(precision=one.precision.precision)
        for path in (one.place, one.place.with_suffix(".bin"), manifest_path(one.place)):
            path.write_text(name)
        return ExportResult(one.place, manifest)

    return export


class TestCandidates:
    def test_all(self, config: ExportConfig) -> None:
        candidates = choose.candidate_precisions(config.precision, has_bf16=True, reporter=SILENT)
        assert {name: (one.precision, one.fallback) for name, one in candidates.items()} == {
            "fp32": ("fp32", None),
            "bf16": ("bf16", None),
            "int8 beside fp32": ("int8", "fp32"),
            "int8 beside bf16": ("int8", "bf16"),
        }

    def test_nothing_is_left_out_in_silence(self, capsys: pytest.CaptureFixture[str]) -> None:
        asked = PrecisionOptions("auto")
        candidates = choose.candidate_precisions(asked, has_bf16=False, reporter=Reporter())
        assert list(candidates) == ["fp32"]
        said = capsys.readouterr().err
        assert "bf16 is left out" in said
        assert "int8 is left out" in said


class TestChoice:
    def test_the_fastest(self) -> None:
        assert choose.choose_fastest({"fp32": [9, 9, 1], "bf16": [5, 6, 6]}) == "bf16"

    def test_a_lower_precision_must_be_worth_it(self) -> None:
        assert choose.choose_fastest({"fp32": [10.0], "bf16": [9.8]}) == "fp32"

    def test_never_a_slower_one(self) -> None:
        assert choose.choose_fastest({"fp32": [10.0], "bf16": [8.0], "int8": [30.0]}) == "bf16"


class TestExport:
    def run(self, config: ExportConfig, *failing: str) -> ExportResult:
        return choose.export_fastest(config, export_of(*failing), sizing=SIZING, reporter=SILENT)

    def test_the_chosen_one_is_written_and_no_other(self, config: ExportConfig) -> None:
        result = self.run(config)
        assert result.path == config.place
        folder = config.place.parent
        assert sorted(path.name for path in folder.iterdir()) == ["m.bin", "m.json", "m.xml"]
        assert {path.read_text() for path in folder.iterdir()} == {"int8 beside fp32"}

    def test_one_outside_its_limits_is_passed_over_and_named(
        self, config: ExportConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        refused = ("int8 beside fp32", "int8 beside bf16")
        result = choose.export_fastest(
            config, export_of(*refused), sizing=SIZING, reporter=Reporter()
        )
        assert result.manifest.precision == "bf16"
        shown = capsys.readouterr()
        assert "too far off" in " ".join((shown.out + shown.err).split())

    def test_float32_outside_its_limits_ends_it(self, config: ExportConfig) -> None:
        with pytest.raises(CheckFailed, match="fp32"):
            self.run(config, "fp32")
        assert not list(config.place.parent.iterdir())

    def test_is_for_openvino(self, config: ExportConfig) -> None:
        with pytest.raises(ToodError, match="--to openvino"):
            replace(config, to="onnx")
