"""ONNX Runtime works on two batches at a time."""

import threading
from pathlib import Path

import numpy as np
import pytest

from tood_deploy import Detector
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import BatchDetections, open_engine
from tood_deploy.engines.onnx_engine import OnnxEngine
from tood_deploy.errors import ToodError
from tood_deploy.inference.pipeline import detect_frames
from tood_deploy.inference.source import open_source

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
    ],
)
def test_senseless_values_are_named(tiny_artefact: Path, options: dict, message: str) -> None:
    with pytest.raises(ToodError, match=message):
        OnnxEngine(tiny_artefact, **options)
