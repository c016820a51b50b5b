"""The TensorRT engine on a real GPU: a small plan is built, and held against ONNX Runtime."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import BatchDetections, open_engine
from tood_deploy.errors import InputError, ToodError
from tood_deploy.matching import NetDetections, match_boxes, split_batch

pytestmark = pytest.mark.gpu

SIZES_HW = ((256, 320), (320, 256))
MOST = 4
CONF, IOU = 0.03, 0.6


@pytest.fixture(scope="module")
def plan(tiny_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` in float32, by the TensorRT that is installed."""
    from tood_deploy.export.tensorrt.options import Profiles
    from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx

    path = tmp_path_factory.mktemp("plan") / "tiny.engine"
    engine_from_onnx(tiny_artefact, path, profiles=Profiles(SIZES_HW, (1, 2, MOST)))
    try:
        open_on_gpu(path).close()
    except ToodError as error:
        refused = "compute capability" in str(error) or "UNSUPPORTED_CC" in str(error)
        if refused and not os.environ.get("TOOD_EXPECT_GPU"):
            pytest.skip(str(error))
        raise
    return path


def open_on_gpu(path: Path, **options: Any) -> Any:
    return open_engine(path, device="cuda", self_test=False, **options)


def make_images(
    batch: int, size_hw: tuple[int, int] = SIZES_HW[0], seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    images = np.stack([synthetic_image(*size_hw, seed + number) for number in range(batch)])
    return images, np.array(
        [[size_hw[0] - number, size_hw[1] - 3 * number] for number in range(batch)], np.int32
    )


def image_rows(found: BatchDetections) -> list[NetDetections]:
    return split_batch((found.num_dets, found.boxes_net, found.scores, found.labels))


def assert_close(expected: BatchDetections, found: BatchDetections, score: float = 0.02) -> None:
    """Most detections are the same: GPUs compute float32 convolutions with 10 bits of mantissa."""
    for left, right in zip(image_rows(expected), image_rows(found), strict=True):
        pairs = match_boxes(left, right).pairs
        near = (
            np.abs(left.scores[pairs[:, 0]] - right.scores[pairs[:, 1]])
            <= score * left.scores.max()
        )
        assert near.sum() >= 0.8 * max(len(left), len(right)) > 5


def assert_same(expected: BatchDetections, found: BatchDetections) -> None:
    for left, right in zip(vars(expected).values(), vars(found).values(), strict=True):
        assert np.array_equal(left, right)


@pytest.mark.parametrize("cuda_graph", ["auto", False])
def test_agrees_with_onnx_runtime_at_every_shape(
    plan: Path, tiny_artefact: Path, cuda_graph: Any
) -> None:
    with (
        open_on_gpu(plan, cuda_graph=cuda_graph) as engine,
        open_engine(tiny_artefact) as reference,
    ):
        assert engine.input_shapes_hw == SIZES_HW
        for size_hw in SIZES_HW:
            for batch in range(1, MOST + 1):
                inputs = make_images(batch, size_hw, batch)
                expected = reference.infer(*inputs, CONF, IOU)
                for _ in range(3):  # the first runs, the second replays
                    assert_close(expected, engine.infer(*inputs, CONF, IOU))


def test_two_in_flight_give_what_one_at_a_time_gives(plan: Path) -> None:
    batches = [make_images(1 + number % MOST, SIZES_HW[number % 2], number) for number in range(8)]
    with open_on_gpu(plan) as engine:
        expected = [engine.infer(*batch, CONF, IOU) for batch in batches]
        tickets = [engine.submit(*batches[0], CONF, IOU)]
        for number in range(1, len(batches) + 1):
            if number < len(batches):
                tickets.append(engine.submit(*batches[number], CONF, IOU))
            assert_same(expected[number - 1], engine.collect(tickets[number - 1]))


@pytest.mark.parametrize("cuda_graph", ["auto", False])
def test_parts_of_a_call_fill_it(plan: Path, cuda_graph: Any) -> None:
    inputs = make_images(MOST)
    with open_on_gpu(plan, cuda_graph=cuda_graph) as engine:
        expected = engine.infer(*inputs, CONF, IOU)
        for _ in range(5):
            begun = time.perf_counter()
            found, seconds = engine.infer_in_parts(*inputs, CONF, IOU)
            whole = time.perf_counter() - begun
            assert_same(expected, found)
            assert min(seconds) > 0
            assert sum(seconds) == pytest.approx(whole, rel=0.05, abs=2e-4)
            assert seconds.inference > 1e-4


def test_engines_and_threads_of_one_process(plan: Path) -> None:
    batches = [make_images(1 + number % 2, SIZES_HW[0], number) for number in range(4)]
    failures: list[BaseException] = []
    with open_on_gpu(plan) as first, open_on_gpu(plan) as second:
        expected = [first.infer(*batch, CONF, IOU) for batch in batches]

        def work(engine: Any) -> None:
            try:
                for turn in range(40):
                    assert_same(expected[turn % 4], engine.infer(*batches[turn % 4], CONF, IOU))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(engine,)) for engine in (first, second) * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def used_mib() -> tuple[float, float]:
    """Of the GPU's memory, in all, and of this process's main memory."""
    from contextlib import closing

    from tood_deploy.engines.tensorrt.cuda import Gpu

    with closing(Gpu()) as gpu, gpu.current():
        free, total = gpu.free_bytes()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (total - free) / 2**20, pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_ten_thousand_calls_need_no_more_memory_than_a_hundred(plan: Path) -> None:
    inputs = make_images(1)
    with open_on_gpu(plan) as engine:
        for _ in range(100):
            engine.infer(*inputs, CONF, IOU)
        before = used_mib()
        for _ in range(10_000):
            engine.infer(*inputs, CONF, IOU)
        after = used_mib()
    assert after[0] - before[0] < 8
    assert after[1] - before[1] < 16


def test_opening_and_closing_leaves_nothing(plan: Path) -> None:
    def once() -> None:
        with open_on_gpu(plan) as engine:
            engine.infer(*make_images(2), CONF, IOU)

    for _ in range(3):
        once()
    gc.collect()
    before = used_mib()
    for _ in range(20):
        once()
    gc.collect()
    assert used_mib()[0] - before[0] < 8


@pytest.mark.parametrize("cuda_graph", ["auto", False])
@pytest.mark.parametrize("offered", ["dlpack", "cuda_array_interface"])
def test_images_that_lie_on_the_gpu(plan: Path, cuda_graph: Any, offered: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    images, valid_hw = make_images(2)
    on_gpu = torch.from_numpy(images).cuda()
    given: Any = on_gpu
    if offered == "cuda_array_interface":
        described = {
            "shape": images.shape,
            "typestr": "|u1",
            "data": (on_gpu.data_ptr(), False),
            "version": 3,
            "strides": None,
        }
        stream = torch.cuda.current_stream().cuda_stream or 1  # 1: the legacy default stream
        given = type("Offered", (), {"__cuda_array_interface__": described | {"stream": stream}})()
    with open_on_gpu(plan, cuda_graph=cuda_graph) as engine:
        expected = engine.infer(images, valid_hw, CONF, IOU)
        for _ in range(3):
            assert_same(expected, engine.infer(given, valid_hw, CONF, IOU))
        with pytest.raises(InputError, match="expected uint8"):
            engine.infer(on_gpu.float(), valid_hw, CONF, IOU)
        with pytest.raises(InputError, match="expected rows without gaps"):
            engine.infer(
                on_gpu.flip(3).transpose(1, 2).contiguous().transpose(1, 2), valid_hw, CONF, IOU
            )


def test_the_self_test_passes_in_every_slot(
    plan: Path, tiny_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the export gives an engine its self-test.

    From the ONNX artefact, on the engine's canvases.
    """
    from tood_deploy.engines.self_test import self_test_from
    from tood_deploy.export.tensorrt.options import Profiles
    from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx
    from tood_deploy.parity.onnx_reference import OnnxRunner

    monkeypatch.setenv("TOOD_HOME", str(tmp_path / "home"))
    path = tmp_path / "tiny.engine"
    self_test = self_test_from(OnnxRunner(tiny_artefact), SIZES_HW)
    engine_from_onnx(
        tiny_artefact, path, profiles=Profiles(SIZES_HW, (1, 2, MOST)), self_test=self_test
    )
    open_engine(path, device="cuda").close()
    assert list((tmp_path / "home").rglob("*.json")), "no record of it"
