"""The search for the fastest mixture, with invented latencies and qualities; and how latencies are
measured, with an invented clock."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from benchmark.small_artefact import for_size
from export.small_graph import save_small
from manifest_values import plain
from recording import RecordingReporter

from tood_deploy.benchmark import precision_search as search_module
from tood_deploy.benchmark.precision_search import (
    LatencyBench,
    Opener,
    PrecisionSearch,
    Target,
    graph_precision,
)
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import Engine
from tood_deploy.errors import DeviceError, ToodError
from tood_deploy.export.config import PrecisionOptions
from tood_deploy.export.precision.convert import ConvertedGraph, Int8Options, convert_precision
from tood_deploy.export.precision.search import SearchResult
from tood_deploy.export.precision.sensitivity import network_parts
from tood_deploy.manifest_sections import Int8Build
from tood_deploy.onnx_file import OnnxArtefact, read_onnx
from tood_deploy.reporter import Reporter

pytestmark = pytest.mark.usefixtures("stand_in_limits")

INT8 = Int8Options(method="minmax", max_drop=1.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(2):
        cv2.imwrite(str(folder / f"{seed}.png"), synthetic_image(64, 96, seed))
    return folder


@pytest.fixture(scope="module")
def artefact(tiny_artefact: Path) -> OnnxArtefact:
    """The exported network, for small images."""
    return for_size(read_onnx(tiny_artefact), (64, 96))


def weights_in_8_bits(model: onnx.ModelProto) -> list[str]:
    return [
        value.name
        for value in model.graph.initializer
        if value.data_type == onnx.TensorProto.INT8 and len(value.dims) > 1
    ]


class InventedBench:
    """Every layer in 8 bits saves a hundredth of the time."""

    runtime = "invented"

    def __init__(self, reference: onnx.ModelProto, open_file: Opener, image: Any) -> None:
        self.reference = reference

    def __call__(self, model: onnx.ModelProto) -> float:
        return 10 - 0.1 * len(weights_in_8_bits(model))

    def __enter__(self) -> "InventedBench":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def neck_is_sensitive(artefact: OnnxArtefact) -> Any:
    """Quality that only the neck in 8 bits costs."""
    return lambda model: 5.0 * any(".neck." in name for name in weights_in_8_bits(model))


def some_parts(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Enough to search among; the rest stays float32."""
    parts = network_parts(model)
    return {
        name: parts[name]
        for name in (
            "backbone.conv1",
            "neck.fpn_convs",
            "bbox_head.inter_convs",
            "bbox_head.tood_cls",
        )
    }


def search(
    monkeypatch: pytest.MonkeyPatch, artefact: OnnxArtefact, images: Path
) -> tuple[ConvertedGraph, RecordingReporter]:
    monkeypatch.setattr(search_module, "LatencyBench", InventedBench)
    monkeypatch.setattr(search_module, "network_parts", some_parts)
    reporter = RecordingReporter()
    find = PrecisionSearch(Opener("onnx"), images, INT8, quality=neck_is_sensitive)
    return find(artefact, reporter), reporter


@pytest.mark.slow
def test_finds_what_may_be_in_8_bits(
    monkeypatch: pytest.MonkeyPatch, artefact: OnnxArtefact, images: Path
) -> None:
    lowered, reporter = search(monkeypatch, artefact, images)
    assert lowered.mixture is not None
    found: dict[str, Any] = dict(lowered.mixture.details)
    assert found["best"]["mixture"] == {
        "backbone.conv1": "int8",
        "neck.fpn_convs": "fp32",
        "bbox_head.inter_convs": "int8",
    }
    assert lowered.precision == graph_precision(lowered.model) == "int8"
    assert not any(".neck." in name for name in weights_in_8_bits(lowered.model))
    assert {
        name: found[name] for name in ("target", "runtime", "unit", "max_drop", "precisions")
    } == {
        "target": "onnx",
        "runtime": "invented",
        "unit": "points of AP",
        "max_drop": 1.0,
        "precisions": ("fp32", "int8"),
    }
    lines = [line for line in reporter.lines if line.startswith("trial ")]
    assert len(lines) == len(found["trials"])
    assert "fp32; 10.000 ms" in lines[0]
    assert reporter.tables[-1].row_count == len(lines)
    assert json.loads(json.dumps(found))["best"] == found["best"]
    again, _ = search(monkeypatch, artefact, images)
    assert again.mixture == lowered.mixture
    assert again.model.SerializeToString(deterministic=True) == lowered.model.SerializeToString(
        deterministic=True
    )


def test_half_precision_beside_8_bits(
    monkeypatch: pytest.MonkeyPatch, artefact: OnnxArtefact, images: Path
) -> None:
    monkeypatch.setattr(Opener, "check", lambda self: None)
    built: list[onnx.ModelProto] = []

    def build_all(groups: Any, precisions: Any, hands: Any, **options: Any) -> SearchResult:
        assert (precisions, options) == (("fp32", "fp16", "int8"), {"max_drop": 1.0})
        built.extend(hands.build(dict.fromkeys(groups, precision)) for precision in precisions)
        return real(groups, ("fp32",), hands, max_drop=1.0)

    real = search_module.autotune
    monkeypatch.setattr(search_module, "autotune", build_all)
    monkeypatch.setattr(search_module, "network_parts", some_parts)
    monkeypatch.setattr(search_module, "LatencyBench", InventedBench)
    lowered = PrecisionSearch(Opener("engine"), images, INT8, "fp16", neck_is_sensitive)(
        artefact, Reporter.silent()
    )
    assert [graph_precision(model) for model in built] == ["fp32", "fp16", "int8"]
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in built[2].graph.initializer}
    assert built[0] is artefact.model
    assert lowered.precision == "fp32"


def test_a_mixture_becomes_an_artefact(artefact: OnnxArtefact) -> None:
    def mix(source: OnnxArtefact, reporter: Reporter) -> ConvertedGraph:
        return ConvertedGraph(source.model, "fp32", mixture=Int8Build(details={"trials": [1]}))

    wanted = PrecisionOptions(autotune=True, max_drop=1.0)
    mixed = convert_precision(artefact, wanted, "u8s7", search=mix, reporter=Reporter.silent())
    assert plain(mixed.manifest)["options"]["autotune"]["trials"] == [1]
    assert (
        plain(mixed.manifest)["options"]["deform"] == plain(artefact.manifest)["options"]["deform"]
    )


class Clock:
    """Seconds that pass only where someone works; ever more of them, as on a machine that becomes
    hot."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.calls += 1
        self.now += seconds * (1 + self.calls / 400)


class WorkingEngine:
    """Takes as many milliseconds as its graph's producer says."""

    name, device = "working", "cpu"
    opened = 0

    def __init__(self, path: Path, clock: Clock) -> None:
        self.seconds, self.clock = float(onnx.load(path).producer_name) / 1000, clock

    def infer(self, images: np.ndarray, valid_hw: np.ndarray, *thresholds: float) -> None:
        assert (images.shape, valid_hw.tolist()) == ((1, 64, 96, 3), [[60, 90]])
        self.clock.work(self.seconds)

    def __enter__(self) -> "WorkingEngine":
        type(self).opened += 1
        return self

    def __exit__(self, *_: object) -> None:
        type(self).opened -= 1


def test_drift_cancels() -> None:
    clock = Clock()
    slow, fast = (onnx.ModelProto(ir_version=10, producer_name=name) for name in ("20", "10"))
    image = np.zeros((64, 96, 3), np.uint8), (60, 90)

    def open_file(path: Path, net_hw: tuple[int, int]) -> Any:
        assert net_hw == (64, 96)
        return WorkingEngine(path, clock)

    with LatencyBench(slow, open_file, image, clock) as bench:
        assert bench(slow) == bench.reference_ms > 20
        ratios = [bench(fast) / bench.reference_ms for _ in range(3)]
        assert bench.runtime == "working, cpu"
        assert WorkingEngine.opened == 1
    assert clock.calls > 400  # so a call takes twice as long as at first
    assert ratios == pytest.approx([0.5] * 3, rel=0.05)
    assert WorkingEngine.opened == 0


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_runtimes_on_the_cpu(target: Target, tmp_path: Path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    Opener(target).check()
    engine = Opener(target)(save_small(tmp_path / "a.onnx"), (64, 96))
    assert isinstance(engine, Engine)
    with engine:
        assert engine.device == "cpu"
        found = engine.infer(
            np.zeros((1, 64, 96, 3), np.uint8), np.array([[60, 90]], np.int32), 0.05, 0.6
        )
    assert found.boxes_net.shape == (1, 100, 4)


class TestBadInput:
    def test_no_gpu(self, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def check_driver() -> None:
            raise DeviceError("no NVIDIA driver found")

        monkeypatch.setitem(
            sys.modules,
            "tood_deploy.engines.tensorrt.cuda",
            SimpleNamespace(check_driver=check_driver),
        )
        with pytest.raises(DeviceError, match="no NVIDIA driver"):
            PrecisionSearch(Opener("engine"), images, INT8, "fp16")

    def test_no_limit(self, images: Path) -> None:
        with pytest.raises(ToodError, match="give --max-ap-drop"):
            PrecisionSearch(Opener("onnx"), images, Int8Options())

    def test_half_precision_on_the_cpu(self, images: Path) -> None:
        with pytest.raises(ToodError, match="bf16 takes part in the search for openvino"):
            PrecisionSearch(Opener("openvino"), images, INT8, "bf16")
