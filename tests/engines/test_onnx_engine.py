"""ONNX Runtime works on two batches at a time."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tood_deploy import Detector
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import BatchDetections, onnx_engine, open_engine
from tood_deploy.engines.onnx_engine import PROVIDERS, OnnxEngine
from tood_deploy.errors import ToodError
from tood_deploy.graph_io import OUTPUTS, graph_feeds
from tood_deploy.inference.pipeline import detect_frames
from tood_deploy.inference.source import open_source
from tood_deploy.onnx_file import open_session, run_session

CALL = (np.array([[64, 96]], np.int32), 0.05, 0.6)


def callers() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith("onnxruntime")
    ]


def same(one: BatchDetections, other: BatchDetections) -> None:
    np.testing.assert_array_equal(one.num_dets, other.num_dets)
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_allclose(one.boxes_net, other.boxes_net, atol=1e-3)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_what_is_submitted_together_comes_back_as_if_alone(tiny_artefact: Path) -> None:
    images = [synthetic_image(64, 96, seed)[None] for seed in range(5)]
    with (
        open_engine(tiny_artefact, threads=2) as alone,
        open_engine(tiny_artefact, threads=2, hint="throughput") as engine,
    ):
        assert (alone.in_flight, engine.in_flight) == (1, 2)
        tickets = [engine.submit(image, *CALL) for image in images]
        for image, ticket in reversed(list(zip(images, tickets, strict=True))):
            same(engine.collect(ticket), alone.infer(image, *CALL))
        same(engine.infer(images[0], *CALL), alone.infer(images[0], *CALL))


def test_two_run_at_the_same_time(tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=10)  # breaks, and so raises, where one waits for the other
    with OnnxEngine(tiny_artefact, threads=2, hint="throughput") as engine:
        run = engine._run
        monkeypatch.setattr(engine, "_run", lambda *call: both.wait() + 1 and run(*call))
        tickets = [engine.submit(synthetic_image(64, 96, seed)[None], *CALL) for seed in range(2)]
        assert all(len(engine.collect(ticket).num_dets) == 1 for ticket in tickets)


@pytest.mark.parametrize(("threads", "in_flight"), [(1, 1), (2, 2), (5, 2), (13, 3)])
def test_threads_are_shared(tiny_artefact: Path, threads: int, in_flight: int) -> None:
    with OnnxEngine(tiny_artefact, threads=threads, hint="throughput") as engine:
        assert engine.in_flight == in_flight
        own = engine.session.get_session_options().intra_op_num_threads
        assert own - 1 + in_flight == threads


def test_closing_ends_its_threads(tiny_artefact: Path) -> None:
    engine = open_engine(tiny_artefact, threads=2, hint="throughput")
    assert engine.collect(engine.submit(synthetic_image(64, 96, 0)[None], *CALL)).num_dets[0] > 0
    assert callers()
    engine.close()
    engine.close()
    assert callers() == []
    with pytest.raises(ToodError, match="was closed"):
        engine.submit(synthetic_image(64, 96, 0)[None], *CALL)


def test_frames_stay_in_order(tiny_artefact: Path, tmp_path: Path) -> None:
    import cv2

    for i in range(9):
        size_hw = (64, 96) if i % 4 else (96, 64)
        cv2.imwrite(str(tmp_path / f"{i}.png"), synthetic_image(*size_hw, i))
    with Detector(
        tiny_artefact, imgsz=(64, 96), conf=0.1, threads=2, hint="throughput"
    ) as detector:
        for batch in (1, 2):
            for i, (frame, found) in enumerate(
                detect_frames(detector, open_source(tmp_path), batch)
            ):
                assert Path(frame.name).stem == str(i)
                alone = detector(frame.image_bgr)
                np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-2)
                np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hint": "speed"}, "hint is 'speed'; expected latency or throughput"),
        ({"hint": "throughput", "device": "cuda"}, "which ONNX Runtime has on the CPU"),
        ({"hint": "throughput", "threads": 0}, "threads is 0"),
        ({"nhwc": True}, "nhwc is for GPUs"),
    ],
)
def test_senseless_values_are_named(tiny_artefact: Path, options: dict, message: str) -> None:
    with pytest.raises(ToodError, match=message):
        OnnxEngine(tiny_artefact, **options)


class FakeValue:
    """An input on a GPU that is not there."""

    made = 0

    def __init__(self, array: np.ndarray) -> None:
        type(self).made += 1
        self.array = array.copy()

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray, device: str, ordinal: int) -> "FakeValue":
        assert (device, ordinal) == ("cuda", 0)
        return cls(array)

    def shape(self) -> list[int]:
        return list(self.array.shape)

    def update_inplace(self, array: np.ndarray) -> None:
        self.array[...] = array


class FakeSession:
    """Says it is on a GPU; binds inputs and computes on the CPU with a real session."""

    def __init__(self, real: Any) -> None:
        self.real, self.bound = real, dict[str, FakeValue]()
        self.get_modelmeta, self.get_inputs = real.get_modelmeta, real.get_inputs
        self.get_outputs, self.outputs = real.get_outputs, list[str]()

    def get_providers(self) -> list[str]:
        return [PROVIDERS["cuda"]]

    def io_binding(self) -> Any:
        return self

    def bind_ortvalue_input(self, name: str, value: FakeValue) -> None:
        self.bound[name] = value

    def bind_output(self, name: str, device: str) -> None:
        assert device == "cpu"
        self.outputs = [*(one for one in self.outputs if one != name), name]

    def run_with_iobinding(self, binding: Any) -> None:
        feeds = {name: value.array for name, value in binding.bound.items()}
        self.results = self.real.run(self.outputs, feeds)

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        return self.results


class TestOnAGpuThatIsNotThere:
    @pytest.fixture
    def opened(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Put the fakes in place; what the session was opened with, once it was."""
        seen: dict[str, Any] = {"preloaded": False}

        def open_fake(path: Path, *, provider: str, provider_options: Any, **options: Any) -> Any:
            seen.update(provider=provider, options=provider_options)
            return FakeSession(open_session(path, threads=1))

        monkeypatch.setattr(
            onnx_engine.ort, "get_available_providers", lambda: list(PROVIDERS.values())
        )
        monkeypatch.setattr(
            onnx_engine.ort, "preload_dlls", lambda: seen.update(preloaded=True), raising=False
        )
        monkeypatch.setattr(onnx_engine.ort, "OrtValue", FakeValue)
        monkeypatch.setattr(onnx_engine, "open_session", open_fake)
        monkeypatch.setattr(FakeValue, "made", 0)
        return seen

    def test_inputs_stay_bound_while_shapes_do(
        self, tiny_artefact: Path, opened: dict[str, Any]
    ) -> None:
        real = open_session(tiny_artefact, threads=1)
        with OnnxEngine(tiny_artefact, device="cuda") as engine:
            for seed in range(2):
                image = synthetic_image(64, 96, seed)[None]
                same(
                    engine.infer(image, *CALL),
                    BatchDetections(*run_session(real, OUTPUTS, graph_feeds(image, *CALL))),
                )
            assert FakeValue.made == 4
            two = np.stack([synthetic_image(64, 96, seed) for seed in range(2)])
            sizes = np.repeat(CALL[0], 2, 0)
            assert len(engine.infer(two, sizes, *CALL[1:]).num_dets) == 2
            assert FakeValue.made == 6, "images and sizes anew, thresholds as they are"

    @pytest.mark.parametrize(("nhwc", "expected"), [(False, None), (True, {"prefer_nhwc": "1"})])
    def test_libraries_and_provider_options(
        self, tiny_artefact: Path, opened: dict[str, Any], nhwc: bool, expected: object
    ) -> None:
        with OnnxEngine(tiny_artefact, device="cuda", nhwc=nhwc):
            assert opened == {"preloaded": True, "provider": PROVIDERS["cuda"], "options": expected}
