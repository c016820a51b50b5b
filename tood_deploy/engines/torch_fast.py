"""PyTorch, fast: folded batch norms, channels last, half precision, CUDA graphs, `torch.compile`.

Takes a network, or a .pt2 artefact of tood-export. On a GPU all of it is one CUDA graph for each
shape, two batches are under way at a time, and suppression that needs more rounds than were
recorded is done again by the exact loop. On a CPU suppression is the exact loop itself. Frames are
resized and padded on the device: equal to `preprocess.resize_and_pad` within one grey level, as
OpenCV computes with 11 bits of weight and this in float32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.engines.torch_graphs import BUFFERS, Buffers, CudaRunner, Packed
from tood_deploy.engines.torch_program import read_program
from tood_deploy.errors import DeviceError, ToodError
from tood_deploy.manifest import Manifest
from tood_deploy.model.checkpoint import load_checkpoint
from tood_deploy.model.detector import DenseDetector
from tood_deploy.model.postprocess import BatchResult, Candidates
from tood_deploy.model.static_detector import DTYPES, StaticDetector, finish_exactly, pack, unpack
from tood_deploy.preprocess import ImageTransform

Precision = Literal["fp32", "bf16", "fp16"]
MAX_COMPILED = 8  # shapes of images; PyTorch compiles no function more often
BF16_CPU, FP16_CPU = ("avx512_bf16", "amx_bf16", "avx10_2"), ("avx512_fp16", "amx_fp16")


@dataclass(frozen=True)
class Functions:
    """A detector as functions on tensors.

    Attributes:
        find_candidates: of images, rows and columns, score threshold: the input of suppression.
        detect: of these and the overlap threshold: everything, without a loop on the data.
    """

    find_candidates: Callable[[Tensor, Tensor, Tensor], Candidates]
    detect: Callable[[Tensor, Tensor, Tensor, Tensor], Packed]


class FastTorchEngine(Engine):
    """A detector in PyTorch, in the form that runs fastest.

    Attributes:
        repeated: batches whose suppression was done again, exactly.
    """

    def __init__(
        self,
        model: Path | DenseDetector,
        *,
        device: str = "cpu",
        precision: Precision | None = None,
        compile: bool = False,
        cuda_graph: bool = True,
        threads: int | None = None,
    ) -> None:
        """Open the model.

        Args:
            model: a .pt2 file of tood-export, or a network, which is copied.
            device: "cpu" or "cuda".
            precision: of convolutions and group norms: "fp32", "bf16" or "fp16"; float32, and for a
                .pt2 the one it was exported in, where not given.
            compile: let `torch.compile` write kernels for each shape of images, at its first batch;
                takes seconds to minutes.
            cuda_graph: on a GPU, record each shape of images once, and replay it.
            threads: of the CPU; PyTorch's own choice where not given. Holds for the whole process.

        Raises:
            ToodError: a precision or device that is not there, a compiler that is missing, a file
                that is no artefact of tood-export, or a value out of range.
        """
        if threads is not None and threads < 1:
            raise ToodError(f"threads is {threads}; expected a positive number")
        check_device(device)
        check_compiler(device, needed=compile)
        self.device, self._place = device, place_of(device)
        if isinstance(model, Path):
            functions, self.manifest = _open_program(model, precision, self._place)
            check_precision(self.manifest.precision, device)
        else:
            check_precision(precision or "fp32", device)
            functions, self.manifest = _convert(model, precision or "fp32", self._place)
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = f"PyTorch {torch.__version__}{', compiled' if compile else ''}"
        self._notes: list[str] = []
        self.notes = self._notes
        self.repeated = 0
        self._find_candidates = functions.find_candidates
        self._compiled = _compile(functions.find_candidates) if compile else None
        self._shapes: set[tuple[int, ...]] = set()
        self._runner: CudaRunner | None = None
        if device == "cuda":
            detect = _compile(functions.detect) if compile else functions.detect
            self._runner = CudaRunner(detect, self._place, graphs=cuda_graph, notes=self._notes)
            self.in_flight = BUFFERS

    def _run(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        return self._collect(self._submit(images, valid_hw, score_threshold, iou_threshold))

    @torch.no_grad()
    def _submit(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections | tuple[Buffers, float]:
        thresholds = np.array(score_threshold, np.float32), np.array(iou_threshold, np.float32)
        arrays = (images, valid_hw, *thresholds)
        if self._runner is not None:
            return self._runner.submit(arrays), iou_threshold
        return self._start([torch.from_numpy(array) for array in arrays], iou_threshold)

    @torch.no_grad()
    def submit_frames(
        self,
        frames: Sequence[NDArray[np.uint8]],
        transforms: Sequence[ImageTransform],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections | tuple[Buffers, float]:
        """Start a batch of frames, which are resized and padded on the device.

        Args:
            frames: (H, W, 3) uint8 BGR, of any sizes.
            transforms: of the frames, to one padded size.
            score_threshold, iou_threshold: as `infer` takes them.
        """
        shape = (len(frames), *transforms[0].net_hw, 3)
        valid_hw = np.array([transform.resized_hw for transform in transforms], np.int32)
        self._check_call(np.broadcast_to(np.uint8(0), shape), valid_hw)

        def inputs() -> list[Tensor]:
            uploaded = [torch.from_numpy(frame).to(self._place) for frame in frames]
            images, sizes = resize_and_pad_frames(uploaded, transforms)
            thresholds = (torch.tensor(one) for one in (score_threshold, iou_threshold))
            return [images, sizes, *(one.to(self._place) for one in thresholds)]

        if self._runner is not None:
            return self._runner.submit_made(inputs), iou_threshold
        return self._start(inputs(), iou_threshold)

    def _start(
        self, inputs: Sequence[Tensor], iou_threshold: float
    ) -> BatchDetections | tuple[Buffers, float]:
        """Run inputs that are on the device; on a CPU to the end."""
        if self._runner is not None:
            return self._runner.start(inputs), iou_threshold
        candidates = self._function_for(tuple(inputs[0].shape))(*inputs[:3])
        return self._to_host(self._finish(candidates, iou_threshold))

    @torch.no_grad()
    def _collect(self, ticket: BatchDetections | tuple[Buffers, float]) -> BatchDetections:
        if isinstance(ticket, BatchDetections):
            return ticket
        buffers, iou_threshold = ticket
        assert self._runner is not None
        with self._runner.finished(buffers) as (packed, candidates):
            detections, exact = unpack(packed.clone())
            if not exact.all():
                self.repeated += 1
                detections = self._finish(candidates, iou_threshold)
            return self._to_host(detections)

    def resident(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> Callable[[], BatchDetections]:
        """Return a call on inputs that are on the device already, for measuring.

        Args:
            images, valid_hw, score_threshold, iou_threshold: as `infer` takes them.
        """
        self._check_call(images, valid_hw)
        arrays = images, valid_hw, np.array(score_threshold, np.float32)
        inputs = [torch.from_numpy(array).to(self._place) for array in arrays]
        inputs.append(torch.tensor(iou_threshold, device=self._place))

        @torch.no_grad()
        def call() -> BatchDetections:
            ticket = self._start(inputs, iou_threshold)
            return self._collect(ticket)

        return call

    def _function_for(
        self, shape: tuple[int, ...]
    ) -> Callable[[Tensor, Tensor, Tensor], Candidates]:
        """Return the compiled function for the first shapes, and the plain one for all others."""
        if self._compiled is None:
            return self._find_candidates
        if shape in self._shapes or len(self._shapes) < MAX_COMPILED:
            self._shapes.add(shape)
            return self._compiled
        note = (
            f"more than {MAX_COMPILED} sizes and batches: only the first are compiled; give images "
            "of fewer shapes, or leave --compile out"
        )
        if note not in self._notes:
            self._notes.append(note)
        return self._find_candidates

    def _finish(self, candidates: Candidates, iou_threshold: float) -> BatchResult:
        preset = self.manifest.preset
        return finish_exactly(
            candidates, iou_threshold, self.manifest.max_det, voting=preset.score_voting
        )

    @staticmethod
    def _to_host(detections: BatchResult) -> BatchDetections:
        return BatchDetections(*(tensor.cpu().numpy() for tensor in detections))

    def close(self) -> None:
        """Free the network and what was recorded; may be called again."""
        super().close()
        if (runner := vars(self).pop("_runner", None)) is not None:
            runner.close()
        for name in ("_find_candidates", "_compiled"):
            vars(self).pop(name, None)


def open_checkpoint(
    source: str | PathLike[str], loading: Mapping[str, Any], *, device: str, **options: Any
) -> FastTorchEngine:
    """Return a checkpoint in its fast form.

    Args:
        source: a file, or a preset's name.
        loading: what `load_checkpoint` takes beside it.
        device: "cpu" or "cuda"; looked at before anything is loaded.
        **options: as `FastTorchEngine` takes them.

    Raises:
        ToodError: the checkpoint cannot be loaded, or what `FastTorchEngine` raises.
    """
    check_device(device)
    return FastTorchEngine(load_checkpoint(source, **loading), device=device, **options)


def _convert(
    model: DenseDetector, precision: Precision, place: torch.device
) -> tuple[Functions, Manifest]:
    """Return a network's functions on a device, and what it says of itself.

    Args:
        model: the network.
        precision: to run it in.
        place: the device.
    """
    detector = StaticDetector(model, precision).to(place).eval()
    manifest = Manifest(
        model.preset,
        precision=precision,
        max_det=detector.fused.max_det,
        checkpoint_sha256=model.checkpoint_sha256,
    )

    def find_candidates(images: Tensor, valid_hw: Tensor, score: Tensor) -> Candidates:
        return detector.find_candidates(images, valid_hw, score).candidates

    def detect(images: Tensor, valid_hw: Tensor, score: Tensor, iou: Tensor) -> Packed:
        result = detector(images, valid_hw, score, iou)
        return Packed(pack(result.detections, result.exact), result.stages.candidates)

    return Functions(find_candidates, detect), manifest


def _open_program(
    path: Path, precision: Precision | None, place: torch.device
) -> tuple[Functions, Manifest]:
    """Return the functions of a .pt2 artefact on a device, and its manifest.

    Args:
        path: of the file.
        precision: that is asked for, if one is.
        place: the device.
    """
    program = read_program(path, place)
    manifest = program.manifest
    if precision not in (None, manifest.precision):
        raise ToodError(
            f"{path}: was exported in {manifest.precision}, and {precision} is asked for; leave "
            f"the precision out, or export the checkpoint with --to torch --precision {precision}"
        )

    def detect(images: Tensor, valid_hw: Tensor, score: Tensor, iou: Tensor) -> Packed:
        *detections, exact, boxes, scores, labels = program.detect(images, valid_hw, score, iou)
        candidates = Candidates(boxes, scores, labels)
        return Packed(pack(BatchResult(*detections), exact), candidates)

    def find_candidates(images: Tensor, valid_hw: Tensor, score: Tensor) -> Candidates:
        return Candidates(*program.find_candidates(images, valid_hw, score))

    return Functions(find_candidates, detect), manifest


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def place_of(device: str) -> torch.device:
    """Return where tensors go."""
    return torch.device(device)


def check_device(device: str) -> None:
    """Raise DeviceError for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device cuda is not there for PyTorch {torch.__version__}; install a CUDA build "
            "and driver, or use --device cpu"
        )


def check_precision(precision: str, device: str) -> None:
    """Raise DeviceError for a precision that the device computes no faster than float32, if at all.

    Raises:
        ToodError: not a precision of PyTorch's.
    """
    if precision not in DTYPES:
        raise ToodError(f"precision is {precision!r}; PyTorch runs {', '.join(DTYPES)}")
    if device == "cuda":
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise DeviceError(
                "precision bf16 needs a GPU of compute capability 8.0 or later, this one has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability()))}; use fp16 or fp32"
            )
        return
    has = torch.cpu.get_capabilities()
    needed = {"bf16": BF16_CPU, "fp16": FP16_CPU}.get(precision, ())
    if needed and has.get("architecture") == "x86_64" and not any(map(has.get, needed)):
        raise DeviceError(
            f"precision {precision} needs a CPU with {' or '.join(needed)}, this one has none of "
            "them; use fp32, or --device cuda"
        )


def check_compiler(device: str, *, needed: bool) -> None:
    """Raise DeviceError where `torch.compile` is asked for and lacks what it compiles with."""
    if not needed:
        return
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise DeviceError("compile needs triton on a GPU; pip install triton, or leave it out")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise DeviceError(
            "compile needs a C++ compiler, and there is none; install g++ or clang, or leave "
            "--compile out"
        ) from error


def resize_and_pad_frames(
    frames: Sequence[Tensor], transforms: Sequence[ImageTransform]
) -> tuple[Tensor, Tensor]:
    """Return the images of a batch, and the rows and columns of each that hold real pixels.

    Args:
        frames: (H, W, 3) uint8 BGR, of any sizes.
        transforms: of the frames, to one padded size.

    Returns:
        (B, rows, columns, 3) uint8 RGB, zeros where padded; and (B, 2) int32.
    """
    (net_hw,) = {transform.net_hw for transform in transforms}
    images = torch.zeros((len(frames), *net_hw, 3), dtype=torch.uint8, device=frames[0].device)
    for image, frame, transform in zip(images, frames, transforms, strict=True):
        rows, columns = transform.resized_hw
        image[:rows, :columns] = _resize(frame, transform.resized_hw).flip(2)
    sizes = [transform.resized_hw for transform in transforms]
    return images, torch.tensor(sizes, dtype=torch.int32).to(images.device, non_blocking=True)


def _resize(frame: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return a frame (H, W, 3) uint8 in another size, bilinearly between the centres of pixels."""
    if tuple(frame.shape[:2]) == size_hw:
        return frame
    planes = frame.permute(2, 0, 1).unsqueeze(0).float()
    resized = F.interpolate(planes, size=size_hw, mode="bilinear", align_corners=False)
    return resized[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
