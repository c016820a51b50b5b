"""PyTorch's fast form: equal answers, on a GPU that is a stand-in too, and clear refusals."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import fake_torch_cuda
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import BatchDetections, open_engine, torch_fast, torch_graphs
from tood_deploy.engines.torch_engine import TorchEngine
from tood_deploy.engines.torch_fast import FastTorchEngine, check_compiler, check_precision
from tood_deploy.errors import DeviceError, ToodError
from tood_deploy.inference.detector import Detector
from tood_deploy.matching import match_boxes, split_batch
from tood_deploy.model import load_checkpoint
from tood_deploy.model.detector import DenseDetector
from tood_deploy.parity.tolerances import DETECTION_LIMITS

CONF, IOU = 0.05, 0.6
HAS_BF16 = any(map(torch.cpu.get_capabilities().get, torch_fast.BF16_CPU))


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> DenseDetector:
    return load_checkpoint(tiny_checkpoint).requires_grad_(False)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[fake_torch_cuda.WatchedRecorded]:
    return fake_torch_cuda.install(monkeypatch)


def batch_of(
    count: int, height: int = 64, width: int = 96
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    images = np.stack([synthetic_image(height, width, seed) for seed in range(count)])
    return images, np.array([[height - 4, width - 6]] * count, np.int32)


def assert_equal(batch: BatchDetections, expected: BatchDetections) -> None:
    np.testing.assert_array_equal(batch.num_dets, expected.num_dets)
    np.testing.assert_array_equal(batch.labels, expected.labels)
    np.testing.assert_allclose(batch.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(batch.boxes_net, expected.boxes_net, atol=0.05)


class TestOnTheCpu:
    @pytest.mark.parametrize("size_hw", [(64, 64), (64, 96), (96, 32)])
    def test_float32_equals_the_eager_engine(
        self, model: DenseDetector, size_hw: tuple[int, int]
    ) -> None:
        batch = batch_of(2, *size_hw)
        with FastTorchEngine(model) as fast, TorchEngine(model) as eager:
            assert_equal(fast.infer(*batch, CONF, IOU), eager.infer(*batch, CONF, IOU))

    @pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16")
    def test_bf16_stays_within_its_limits(self, model: DenseDetector) -> None:
        batch, limits = batch_of(2, 160, 224), DETECTION_LIMITS["bf16"]
        with FastTorchEngine(model, precision="bf16") as fast, TorchEngine(model) as eager:
            assert fast.precision == "bf16"
            results = [engine.infer(*batch, CONF, IOU) for engine in (fast, eager)]
        rows = [
            split_batch((one.num_dets, one.boxes_net, one.scores, one.labels)) for one in results
        ]
        for first, second in zip(*rows, strict=True):
            counts = match_boxes(
                first, second, min_iou=limits.iou, max_score_difference=limits.score
            ).counts
            # Stand-in weights put many scores side by side: more is exchanged than a user sees.
            assert counts.matched > 0.8 * counts.reference > 0

    def test_opened_by_runtime_or_by_its_options(self, tiny_checkpoint: Path) -> None:
        with open_engine(tiny_checkpoint, runtime="torch") as engine:
            assert isinstance(engine, FastTorchEngine)
            assert engine.manifest.checkpoint_sha256
        with open_engine(tiny_checkpoint, precision="fp32") as engine:
            assert isinstance(engine, FastTorchEngine)
        with open_engine(tiny_checkpoint) as engine:
            assert isinstance(engine, TorchEngine)

    def test_detector_takes_its_options(self, tiny_checkpoint: Path) -> None:
        image = synthetic_image(60, 90, 1)
        with (
            Detector(tiny_checkpoint, conf=CONF, runtime="torch") as fast,
            Detector(tiny_checkpoint, conf=CONF) as eager,
        ):
            assert len(fast(image)) == len(eager(image)) > 0

    def test_closed(self, model: DenseDetector) -> None:
        engine = FastTorchEngine(model)
        engine.close()
        engine.close()
        with pytest.raises(ToodError, match="closed"):
            engine.infer(*batch_of(1), CONF, IOU)

    def test_only_so_many_shapes_are_compiled(
        self, model: DenseDetector, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes = set()

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(images: torch.Tensor, *others: torch.Tensor) -> Any:
                shapes.add(tuple(images.shape))
                return function(images, *others)

            return call

        monkeypatch.setattr(torch_fast, "_compile", compiled)
        monkeypatch.setattr(torch_fast, "MAX_COMPILED", 2)
        with FastTorchEngine(model, compile=True) as engine:
            for width in (32, 64, 96, 64):
                engine.infer(*batch_of(1, 32, width), CONF, IOU)
            assert shapes == {(1, 32, 32, 3), (1, 32, 64, 3)}
            assert len(engine.notes) == 1

    @pytest.mark.slow
    @pytest.mark.filterwarnings(
        "ignore:`torch.jit:DeprecationWarning"
    )  # PyTorch's own, in its compiler
    def test_compiled(self, model: DenseDetector) -> None:
        check_compiler("cpu", needed=True)
        batch = batch_of(1)
        with FastTorchEngine(model, compile=True) as fast, TorchEngine(model) as eager:
            assert fast.name.endswith(", compiled")
            assert_equal(fast.infer(*batch, CONF, IOU), eager.infer(*batch, CONF, IOU))
        torch.compiler.reset()


class TestOnAStandInForAGpu:
    @pytest.fixture
    def engine(self, model: DenseDetector, recordings: Any) -> Iterator[FastTorchEngine]:
        with FastTorchEngine(model, device="cuda") as opened:
            yield opened

    def test_equals_the_eager_engine_when_recorded_and_when_replayed(
        self, engine: FastTorchEngine, model: DenseDetector, recordings: Any
    ) -> None:
        with TorchEngine(model) as eager:
            for batch in (batch_of(2), batch_of(1), (batch_of(2)[0][::-1].copy(), batch_of(2)[1])):
                assert_equal(engine.infer(*batch, CONF, IOU), eager.infer(*batch, CONF, IOU))
        assert len(recordings) == 1, "the single image runs in the recording for two"
        assert recordings[0].graph.replays == 3

    def test_a_smaller_batch_is_recorded_once_it_has_come_again(
        self, engine: FastTorchEngine, model: DenseDetector, recordings: Any
    ) -> None:
        """And then of a power of two, so that recordings are few."""
        images, valid_hw = batch_of(1)
        five, three = (
            (np.repeat(images, count, axis=0), np.repeat(valid_hw, count, axis=0))
            for count in (5, 3)
        )
        with TorchEngine(model) as eager:
            expected = eager.infer(*three, CONF, IOU)
        engine.infer(*five, CONF, IOU)
        for _ in range(4):
            assert_equal(engine.infer(*three, CONF, IOU), expected)
        assert [len(recorded.inputs[0]) for recorded in recordings] == [5, 4]
        assert recordings[1].graph.replays == 2

    def test_two_batches_are_under_way(self, engine: FastTorchEngine, model: DenseDetector) -> None:
        assert engine.in_flight == 2
        batches = [batch_of(1)[0], synthetic_image(64, 96, 9)[None]]
        valid_hw = batch_of(1)[1]
        tickets = [engine.submit(images, valid_hw, CONF, IOU) for images in batches]
        with TorchEngine(model) as eager:
            for ticket, images in zip(tickets, batches, strict=True):
                expected = eager.infer(images, valid_hw, CONF, IOU)
                assert_equal(engine.collect(ticket), expected)

    def test_thresholds_are_inputs_of_the_recording(
        self, engine: FastTorchEngine, recordings: Any
    ) -> None:
        batch = batch_of(1)
        many, few = (int(engine.infer(*batch, conf, IOU).num_dets[0]) for conf in (0.02, 0.1))
        assert many > few > 0
        assert len(recordings) == 1

    def test_suppression_that_did_not_settle_is_done_again(
        self, model: DenseDetector, recordings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = torch_fast.StaticDetector.forward

        def unsettled(detector: Any, *inputs: torch.Tensor) -> Any:
            result = original(detector, *inputs)
            wrong = result.detections._replace(boxes_net=result.detections.boxes_net * 0)
            return result._replace(detections=wrong, exact=result.exact & (inputs[0] < 0).any())

        monkeypatch.setattr(torch_fast.StaticDetector, "forward", unsettled)
        with FastTorchEngine(model, device="cuda") as engine, TorchEngine(model) as eager:
            batches = [batch_of(1)[0], synthetic_image(64, 96, 9)[None]]
            tickets = [engine.submit(one, batch_of(1)[1], CONF, IOU) for one in batches]
            for ticket, images in zip(tickets, batches, strict=True):
                expected = eager.infer(images, batch_of(1)[1], CONF, IOU)
                assert_equal(engine.collect(ticket), expected)
            assert engine.repeated == 2

    def test_recordings_are_bounded(
        self, engine: FastTorchEngine, recordings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch_graphs, "MAX_GRAPHS", 2)
        for width in (32, 64, 32, 96, 32):  # the last but one drops 64, not the one in use
            engine.infer(*batch_of(1, 32, width), CONF, IOU)
        assert [recorded.inputs[0].shape[2] for recorded in recordings] == [32, 64, 96]
        assert len(engine.notes) == 1

    def test_without_graphs_nothing_is_recorded(
        self, model: DenseDetector, recordings: Any
    ) -> None:
        with FastTorchEngine(model, device="cuda", cuda_graph=False) as engine:
            assert engine.infer(*batch_of(1), CONF, IOU).num_dets[0] > 0
        assert recordings == []

    def test_a_failed_batch_gives_its_buffers_back(
        self, engine: FastTorchEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "_function", None)
            for _ in range(3):
                with pytest.raises(TypeError):
                    engine.infer(*batch_of(1), CONF, IOU)
        assert engine.infer(*batch_of(1), CONF, IOU).num_dets[0] > 0

    def test_inputs_that_are_on_the_device(self, engine: FastTorchEngine) -> None:
        batch = batch_of(2)
        call = engine.resident(*batch, CONF, IOU)
        assert_equal(call(), engine.infer(*batch, CONF, IOU))

    def test_a_frame_behind_the_other_in_a_stream(
        self, engine: FastTorchEngine, tmp_path: Path
    ) -> None:
        import cv2

        for number in range(5):
            image = synthetic_image(64, 96, number)
            cv2.imwrite(str(tmp_path / f"{number}.png"), image)
        detector = Detector(engine, conf=CONF, imgsz=(64, 96))
        streamed = [found for _, found in detector.stream(tmp_path)]
        for number, found in enumerate(streamed):
            np.testing.assert_allclose(
                found.scores, detector(synthetic_image(64, 96, number)).scores, atol=1e-6
            )
        assert len(streamed) == 5


class TestRefusals:
    def test_no_gpu(self, tiny_checkpoint: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is one")
        with pytest.raises(DeviceError, match="device cuda"):
            open_engine(tiny_checkpoint, device="cuda", precision="bf16")

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_a_cpu_without_it(self, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": False}
        )
        with pytest.raises(DeviceError, match=f"precision {precision} needs a CPU"):
            check_precision(precision, "cpu")
        check_precision("fp32", "cpu")

    def test_a_gpu_without_bf16(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        with pytest.raises(DeviceError, match=r"this one has 7\.5"):
            check_precision("bf16", "cuda")
        check_precision("fp16", "cuda")

    def test_no_such_precision(self, tiny_checkpoint: Path) -> None:
        with pytest.raises(ToodError, match="int8"):
            open_engine(tiny_checkpoint, precision="int8")

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_no_compiler(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor import cpp_builder
        from torch._inductor.exc import InvalidCxxCompiler

        def fail() -> str:
            raise InvalidCxxCompiler

        monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fail)
        monkeypatch.setattr(torch_fast.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(DeviceError, match="compile needs"):
            check_compiler(device, needed=True)

    def test_threads(self, model: DenseDetector) -> None:
        with pytest.raises(ToodError, match="threads is 0"):
            FastTorchEngine(model, threads=0)
