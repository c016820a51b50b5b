"""The GPU benchmark's flow, run on the CPU at the smallest size: rows, verdicts and failures."""

import itertools
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the benchmarks are no part of the package

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import run as run_module
from benchmarks.gpu import variants
from benchmarks.gpu.facts import network_gflop
from benchmarks.gpu.failures import note_of, status_of
from benchmarks.gpu.parity import Reference, verdict
from benchmarks.gpu.runtime_variants import check_onnx, check_tensorrt
from benchmarks.gpu.settings import Cell, Settings, cells
from benchmarks.gpu.torch_variants import EagerVariant, open_variant, resident
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import torch_fast
from tood_deploy.errors import ArtefactError, DeviceError, ToodError
from tood_deploy.model import load_checkpoint
from tood_deploy.model.detector import DenseDetector
from tood_deploy.presets import PRESETS

SIZE_HW = (64, 96)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> DenseDetector:
    return load_checkpoint(tiny_checkpoint).requires_grad_(False)


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tiny_artefact: Path) -> Iterator[Callable[..., int]]:
    """Yield a function that runs the benchmark, small; PyTorch's settings are put back."""
    settings = [
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
    ]
    before = [getattr(place, name) for place, name in settings]

    def start(stem: Path, *arguments: str) -> int:
        files = ["--checkpoint", str(tiny_checkpoint), "--onnx", str(tiny_artefact)]
        small = ["--batches", "2", "--rounds", "1", "--seconds", "0.01", "--image-count", "2"]
        return command.main(["--device", "cpu", *files, "--output", str(stem), *small, *arguments])

    yield start
    for (place, name), value in zip(settings, before, strict=True):
        setattr(place, name, value)


@pytest.fixture(scope="module")
def report(run: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the report of a run in float32 and bf16, of which float32 has to pass.

    Stand-in weights put many scores side by side, so that bf16 may exchange more than its limit;
    what it costs on trained networks is the matter of exports and of the genuine checkpoints.
    """
    stem = tmp_path_factory.mktemp("report") / "gpu"
    code = run(stem, "--precisions", "fp32", "bf16", "--batches", "2,1")
    text = stem.with_suffix(".md").read_text(encoding="utf-8")
    values = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    assert [line for line in values["failures"] if "bf16: parity" not in line] == []
    assert code == bool(values["failures"])
    return values | {"text": text}


def row_of(
    report: dict[str, Any], how: str, precision: str, cell: str = "64x96, batch 2"
) -> dict[str, Any]:
    key = (how, precision, cell)
    rows = [row for row in report["rows"] if (row["how"], row["precision"], row["cell"]) == key]
    assert len(rows) == 1
    return rows[0]


@pytest.mark.slow
class TestFlow:
    def test_every_variant_has_a_row_in_every_cell(self, report: dict[str, Any]) -> None:
        names = [(row["how"], row["precision"], row["cell"]) for row in report["rows"]]
        hows = ("eager", "folded, channels last", "CPU", "engine")
        cells = ("64x96, batch 2", "64x96, batch 1")
        assert sorted(names) == sorted(itertools.product(hows, ("fp32", "bf16"), cells))

    def test_measured_rows(self, report: dict[str, Any]) -> None:
        for how in ("eager", "folded, channels last", "CPU"):
            row = row_of(report, how, "fp32")
            assert row["status"] == "ok"
            assert len(row["call_ms"]) == len(row["whole_ms"]) == 1
            assert 0 < row["summary"]["call"]["median"] <= row["summary"]["call"]["p90"]
            assert row["open_seconds"] > 0
        kernels = row_of(report, "folded, channels last", "fp32")["kernels"]
        assert 10 < len(kernels) <= 60
        assert kernels[0]["ms"] >= kernels[1]["ms"] > 0
        assert any("conv" in kernel["name"] for kernel in kernels)
        summary = row_of(report, "eager", "fp32")["summary"]
        assert summary["times_faster_than_eager_fp32"]["value"] == 1

    @pytest.mark.parametrize(
        ("how", "precision", "reason"),
        [("engine", "fp32", "TensorRT runs on GPUs"), ("CPU", "bf16", "no bf16 convolutions")],
    )
    def test_refusals_of_a_runtime_are_no_faults(
        self, how: str, precision: str, reason: str, report: dict[str, Any]
    ) -> None:
        row = row_of(report, how, precision)
        assert row["status"] == "refused"
        assert reason in row["note"]

    def test_parity_in_the_first_cell(self, report: dict[str, Any]) -> None:
        for how in ("eager", "folded, channels last", "CPU"):
            parity = row_of(report, how, "fp32")["parity"]
            assert parity["matched"] == parity["reference"] > 20
            assert parity["images"] == 2
            assert parity["images_outside"] == parity["slots_that_differ"] == 0
        assert row_of(report, "eager", "bf16")["parity"]["score_deviation"] > 0
        assert not row_of(report, "eager", "fp32", "64x96, batch 1")["parity"]

    def test_folded_in_bf16(self, report: dict[str, Any]) -> None:
        row = row_of(report, "folded, channels last", "bf16")
        if row["status"] == "refused":
            assert "needs a CPU with avx512_bf16" in row["note"]
            return
        assert row["parity"]["matched"] > 0.9 * row["parity"]["reference"]
        assert 0 < row["parity"]["score_deviation"] < 0.1

    def test_suppression_alone(self, report: dict[str, Any]) -> None:
        rows = {(row["how"], row["batch"]): row for row in report["nms"]}
        assert {batch for _, batch in rows} == {1, 2}
        for how in ("exact loop", "unrolled"):
            assert rows[how, 2]["times_ms"][0]
            assert rows[how, 2]["images_that_differ"] == 0
        assert rows["torchvision, an image at a time", 1]["status"] in ("ok", "absent")

    def test_markdown(self, report: dict[str, Any]) -> None:
        text = report["text"]
        assert "# The GPU benchmark's flow, on a CPU" in text
        assert "## 64x96, batch 2" in text
        assert "## Parity, 64x96, batch 2" in text
        assert "## Suppression alone" in text
        assert "## Operators of" in text
        how = [row["how"] for row in report["rows"]]
        others = min(how.index("CPU"), how.index("engine"))
        assert {"eager", "folded, channels last"} == set(how[:others])
        assert not {"eager", "folded, channels last"} & set(how[others:])
        assert "- command: python -m benchmarks.gpu --device cpu" in text
        assert "**refused**. device is cpu; TensorRT runs on GPUs" in text


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (ImportError("no module"), "absent"),
            (DeviceError("no GPU"), "refused"),
            (ArtefactError("compute capability 9.0 is not supported"), "refused"),
            (torch.OutOfMemoryError("CUDA out of memory"), "refused"),
            (ToodError("a wrong argument of ours"), "failed"),
            (RuntimeError("illegal memory access"), "failed"),
        ],
    )
    def test_status_of_an_error(self, error: Exception, status: str) -> None:
        assert status_of(error) == status
        assert str(error) in note_of(error)

    @pytest.mark.slow
    def test_a_fault_is_listed_the_run_goes_on_and_fails(
        self,
        run: Callable[..., int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("broken\nin two lines")

        monkeypatch.setattr(variants, "open_onnx", fail)
        assert run(tmp_path / "gpu", "--precisions", "fp32") == 1
        report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
        row = row_of(report, "CPU", "fp32")
        assert (row["status"], row["note"]) == ("failed", "RuntimeError: broken in two lines")
        assert row_of(report, "eager", "fp32")["status"] == "ok"
        assert "failed: 64x96, batch 2: ONNX Runtime, CPU, fp32" in capsys.readouterr().err

    @pytest.mark.slow
    def test_what_pytorch_gave_is_written_before_other_runtimes_are_tried(
        self, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: Any) -> None:
            raise ToodError("the machine is gone; take another one")

        monkeypatch.setattr(run_module, "runtime_variants", stop)
        assert run(tmp_path / "gpu", "--precisions", "fp32") == 2
        report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
        assert row_of(report, "eager", "fp32")["status"] == "ok"
        assert report["nms"]

    def test_nothing_is_exported_for_a_runtime_that_is_not_there(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnxruntime

        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"]
        )
        with pytest.raises(DeviceError, match=r"has CPUExecutionProvider; .*onnxruntime-gpu"):
            check_onnx("cuda")
        check_onnx("cpu")
        with pytest.raises(DeviceError, match="TensorRT runs on GPUs"):
            check_tensorrt("cpu")

    @pytest.mark.slow
    def test_wrong_boxes_fail_the_run(
        self, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = torch_fast.finish_exactly

        def shifted(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            return result._replace(boxes_net=result.boxes_net + 8)

        monkeypatch.setattr(torch_fast, "finish_exactly", shifted)
        one_variant = ("--precisions", "fp32", "--backends", "torch", "--modes", "static")
        assert run(tmp_path / "gpu", *one_variant) == 1
        text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
        assert "parity: 2 of 2 images outside the tolerance" in text

    def test_nothing_is_started_without_time(self, run: Callable[..., int], tmp_path: Path) -> None:
        assert run(tmp_path / "gpu", "--budget-seconds", "0") == 0
        report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
        assert {row["status"] for row in (*report["rows"], *report["nms"])} == {"skipped"}
        assert "0 s of the budget were left" in report["rows"][0]["note"]

    @pytest.mark.parametrize(
        "arguments",
        [["--batches", "1,x"], ["--batches", "0"], ["--sizes", "64by96"], ["--rounds", "0"]],
    )
    def test_wrong_use(
        self,
        run: Callable[..., int],
        tmp_path: Path,
        arguments: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(tmp_path / "gpu", *arguments) == 2
        assert "expected" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_no_gpu_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is one")
        assert command.main(["--output", str(tmp_path / "gpu")]) == 2
        assert capsys.readouterr().err.startswith("error: device cuda is not there")


@pytest.mark.parametrize("mode", ["eager", "static"])
def test_call_on_inputs_that_are_on_the_device(model: DenseDetector, mode: Any) -> None:
    images = np.stack([synthetic_image(*SIZE_HW, seed) for seed in range(2)])
    valid_hw = np.array([[60, 90], [64, 96]], np.int32)
    engine = open_variant(model, mode, "fp32", Cell(SIZE_HW, 2), "cpu")
    expected = engine.infer(images, valid_hw, 0.05, 0.6)
    batch = resident(engine, images, valid_hw, 0.05, 0.6)()
    np.testing.assert_array_equal(batch.boxes_net, expected.boxes_net)


def test_parity_notices_damage_and_slots(model: DenseDetector) -> None:
    class Shifted(EagerVariant):
        shift = np.zeros((2, 1, 1), np.float32)

        def _run(
            self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
        ) -> Any:
            batch = super()._run(images, valid_hw, score_threshold, iou_threshold)
            return replace(batch, boxes_net=batch.boxes_net + self.shift)

    variant = Shifted(model, "fp32", Cell(SIZE_HW, 2), "cpu")
    reference = Reference(model, [synthetic_image(*SIZE_HW, 0)], SIZE_HW)
    assert verdict(reference.compare(variant, 2, "fp32")) == ""
    variant.shift = np.array([0, 9], np.float32).reshape(2, 1, 1)
    assert "depend on the batch slot" in verdict(reference.compare(variant, 2, "fp32"))
    variant.shift = np.full((2, 1, 1), 9, np.float32)
    assert "outside the tolerance" in verdict(reference.compare(variant, 2, "fp32"))


def test_floor_counts_the_networks_arithmetic() -> None:
    """DESIGN: R50 at 800x1344 is 421 GFLOP."""
    assert network_gflop(PRESETS["r50-1x"], Cell((800, 1344), 1)) == pytest.approx(421, abs=1)


def test_least_important_cells_come_last() -> None:
    settings = Settings("cuda", "r50-1x", ((800, 1344), (640, 640)), (1, 8), Path())
    expected = [((800, 1344), 1), ((640, 640), 1), ((800, 1344), 8), ((640, 640), 8)]
    assert [(cell.size_hw, cell.batch) for cell in cells(settings)] == expected
    assert [cell.first for cell in cells(settings)] == [True, False, False, False]


def run_script(arguments: list[Any], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run benchmarks/gpu.sh to its end, which must be a good one."""
    process = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", *arguments],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process


def test_script_unpacks_carried_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel, a shared library and an archive in parts, none of them real; then the help."""
    monkeypatch.chdir(tmp_path)
    carried = tmp_path / "carried"
    (carried / "1").mkdir(parents=True)
    (carried / "2").mkdir()
    with zipfile.ZipFile(carried / "tensorrt_rtx_cu13_bindings-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tensorrt_rtx_bindings/__init__.py", "__version__ = '0'\n")
    (carried / "libnothing.so.1.xz").write_bytes(lzma.compress(b"not a library"))
    (tmp_path / "onnxscript").mkdir()
    (tmp_path / "onnxscript" / "__init__.py").write_text("")
    with tarfile.open(tmp_path / "all.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "onnxscript", "onnxscript")
    packed = (tmp_path / "all.tar.xz").read_bytes()
    (carried / "1" / "part.0").write_bytes(packed[:100])
    (carried / "2" / "part.1").write_bytes(packed[100:])
    process = run_script(["--wheels", "carried", "--help"])
    assert process.stdout.startswith("usage: python -m benchmarks.gpu")
    for part in ("tensorrt_rtx: there", "onnxscript: there", "2 parts in carried", "libnothing"):
        assert part in process.stderr


@pytest.mark.slow
def test_script_runs_without_what_a_bare_machine_lacks(
    tiny_checkpoint: Path, tiny_artefact: Path, tmp_path: Path
) -> None:
    """Neither av nor pycocotools: modules of their names fail when imported."""
    for name in ("av", "pycocotools"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not to be needed')\n")
    files = ["--checkpoint", tiny_checkpoint, "--onnx", tiny_artefact]
    small = "--precisions fp32 --batches 1 --rounds 1 --seconds 0.01 --image-count 1".split()
    place = ["--output", tmp_path / "out" / "gpu"]
    run_script(["--device", "cpu", *files, *place, *small], PYTHONPATH=str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md"]
    assert "is not to be needed" not in (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
