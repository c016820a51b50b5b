"""TensorRT or TensorRT-RTX: runs a plan file on an NVIDIA GPU, two batches in flight. No torch.

The plan is checked against its manifest before TensorRT sees it. While the GPU computes one batch,
the other is copied.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tood_deploy.engines.base import BatchDetections, Engine
from tood_deploy.engines.tensorrt.cuda import DeviceBuffer, Gpu, view_array
from tood_deploy.engines.tensorrt.execution import CudaGraph
from tood_deploy.engines.tensorrt.library import TITLES, Flavour, load_flavour
from tood_deploy.engines.tensorrt.plan import AddNote, Plan
from tood_deploy.engines.tensorrt.plan_check import (
    Machine,
    check_plan,
    read_plan_manifest,
    rebuild,
    tuned_elsewhere,
)
from tood_deploy.engines.tensorrt.repair import finish_exactly
from tood_deploy.engines.tensorrt.slot import Slot, Slots, Ticket
from tood_deploy.errors import ArtefactError, DeviceError, InputError, ToodError
from tood_deploy.files import home_folder
from tood_deploy.manifest import Manifest
from tood_deploy.manifest_sections import EngineTarget, OptimizationProfile


class CallSeconds(NamedTuple):
    """Where the time of one call went; together, the whole of it.

    Attributes:
        to_device: until the batch is on the GPU.
        inference: computing there, by the GPU's clock.
        back: until the detections are in the caller's memory.
    """

    to_device: float
    inference: float
    back: float


class TensorRTEngine(Engine):
    """A plan on one GPU. May be called from several threads.

    Attributes:
        notes: remarks for the user, each once: that no CUDA graph could be recorded, for example.
        repaired: images whose suppression was done again on the CPU, exactly.
    """

    in_flight = 2

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cuda",
        gpu: int = 0,
        cuda_graph: CudaGraph = "auto",
        warm_up: bool = True,
    ) -> None:
        """Open the plan.

        Args:
            path: the .engine or .plan file, its manifest beside it.
            device: "cuda".
            gpu: which of the GPUs that CUDA sees.
            cuda_graph: whether to replay each shape, from its second batch on, as a CUDA graph:
                "auto" where that can be recorded (if not, `notes` says so); True, or an error;
                False, never.
            warm_up: prepare every size and batch now, so that none has to wait for it later.

        Raises:
            ArtefactError: the plan is damaged, or was built for another machine; every mismatch is
                named.
            DeviceError: no GPU, driver or TensorRT, or not enough memory.
        """
        if device != "cuda":
            raise DeviceError(
                f"{path}: device is {device}, a TensorRT engine runs on a GPU; give --device cuda, "
                "or use an .onnx artefact"
            )
        if cuda_graph not in ("auto", True, False):
            raise ToodError(f"cuda_graph is {cuda_graph!r}; expected auto, True or False")
        self.manifest, target = read_plan_manifest(path)
        self._path = path
        flavour = _flavour_for(path, target, self.manifest)
        self._notes: list[str] = []
        self.notes = self._notes
        self.repaired = 0
        self._gpu = Gpu(gpu)
        self.device, self.name = device, f"{flavour.title}, {self._gpu.name}"
        resources = ExitStack()
        try:
            blob = self._read_plan(path, target, flavour)
            with self._gpu.current():
                self._open(blob, path, target, flavour, cuda_graph, resources, warm_up=warm_up)
        except BaseException:
            _close(self._gpu, resources)
            raise
        self._slots = Slots(self._buffers, self.name)
        self._launching = threading.Lock()
        self._release = weakref.finalize(self, _close, self._gpu, resources, self._slots)

    def _read_plan(self, path: Path, target: EngineTarget, flavour: Flavour) -> bytes:
        try:
            blob = path.read_bytes()
        except OSError as error:
            raise ArtefactError(
                f"{path}: cannot be read ({error.strerror}); look at its permissions"
            ) from error
        here = f"{sys.platform}-{platform.machine()}".lower()
        flavour.check_gpu(self._gpu.compute_capability, self._gpu.name)
        machine = Machine(
            flavour.name, flavour.version, here, self._gpu.compute_capability, self._gpu.name
        )
        check_plan(path, self.manifest, target, machine, hashlib.sha256(blob).hexdigest())
        if note := tuned_elsewhere(path, target, machine):
            self._notes.append(note)
        return blob

    def _open(
        self,
        blob: bytes,
        path: Path,
        target: EngineTarget,
        flavour: Flavour,
        cuda_graph: CudaGraph,
        resources: ExitStack,
        *,
        warm_up: bool,
    ) -> None:
        remedy = rebuild(path, self.manifest)
        add_note = _once(self._notes)
        kernels = _kernels_file(self.manifest, self._gpu, flavour)
        plan = Plan(
            blob,
            flavour,
            path,
            host_code=target.version_compatible,
            remedy=remedy,
            kernels=kernels,
            add_note=add_note,
        )
        resources.callback(plan.close)
        stated, actual = (target.profiles, self.manifest.max_det), (plan.profiles, plan.max_det)
        if stated != actual:
            raise ArtefactError(
                f"{path}: its manifest states profiles and detections {stated}, the plan has "
                f"{actual}; {remedy}"
            )
        self._profiles = plan.profiles
        self.input_shapes_hw = tuple(dict.fromkeys(profile.size_hw for profile in plan.profiles))
        self.max_batch = max(profile.max_batch for profile in plan.profiles)
        scratch = DeviceBuffer(plan.scratch_bytes, "scratch memory")
        resources.callback(scratch.close)
        self._buffers: list[Slot] = []
        for _ in range(self.in_flight):
            self._buffers.append(Slot(plan, scratch, cuda_graph=cuda_graph, add_note=add_note))
            resources.callback(self._buffers[-1].close)
        self._gives_candidates = plan.candidates > 0
        if warm_up:
            self._warm_up()

    def _warm_up(self) -> None:
        """Run every batch that is padded to, at every size, so that no later one has to wait."""
        for index, profile in enumerate(self._profiles):
            for rows in batch_sizes(profile):
                shape = (rows, *profile.size_hw, 3)
                for slot in self._buffers:
                    slot.fill(
                        np.zeros(shape, np.uint8), np.zeros((rows, 2), np.int32), 0.5, 0.5, rows
                    )
                    slot.start(index, shape, [])
                    slot.done.wait()

    def infer(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> BatchDetections:
        """Run a batch, as every engine does.

        Arrays may be of any library that speaks DLPack or `__cuda_array_interface__`, on the CPU or
        on this GPU.

        Images on the GPU are read where they lie if they begin at a multiple of 256 bytes and no
        CUDA graph is replayed, whose addresses are fixed; otherwise they are copied within the GPU.

        Args:
            images, valid_hw, score_threshold, iou_threshold: as `Engine.infer` takes them.
        """
        return super().infer(images, valid_hw, score_threshold, iou_threshold)

    def infer_in_parts(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> tuple[BatchDetections, CallSeconds]:
        """Run a batch as `infer` does, and measure how long each part took.

        Waiting for a batch that is in flight counts to the inference.

        Args:
            images, valid_hw, score_threshold, iou_threshold: as `infer` takes them.
        """
        begun = time.perf_counter()
        with self._slots.take() as (slot, _), self._gpu.current():
            batch = self._start(slot, images, valid_hw, score_threshold, iou_threshold, timed=True)
            detections = self._checked(self._detections(slot, batch))
            to_device, inference = slot.seconds(begun)
        return detections, CallSeconds(
            to_device, inference, time.perf_counter() - begun - to_device - inference
        )

    def submit(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> Ticket:
        """Start a batch without waiting for it.

        NumPy arrays may change afterwards; arrays on the GPU must stay as they are until `collect`.

        Args:
            images, valid_hw, score_threshold, iou_threshold: as `infer` takes them.
        """
        return super().submit(images, valid_hw, score_threshold, iou_threshold)

    def batches_at(self, net_hw: tuple[int, int]) -> tuple[int, int | None]:
        """Return the smallest and the largest batch that a profile of this size takes."""
        sized = [profile for profile in self._profiles if profile.size_hw == net_hw]
        return min(profile.min_batch for profile in sized), max(
            profile.max_batch for profile in sized
        )

    def _check_call(self, images: Any, valid_hw: Any) -> None:
        """Do nothing yet; `_start` checks.

        An array on a GPU is viewed for the stream that will read it, which comes with the slot.
        """

    def _run(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> BatchDetections:
        with self._slots.take() as (slot, _), self._gpu.current():
            batch = self._start(slot, images, valid_hw, score_threshold, iou_threshold)
            return self._detections(slot, batch)

    def _submit(
        self, images: Any, valid_hw: Any, score_threshold: float, iou_threshold: float
    ) -> Ticket:
        with self._slots.take() as (slot, hold), self._gpu.current():
            return hold(self._start(slot, images, valid_hw, score_threshold, iou_threshold))

    def _collect(self, ticket: Ticket) -> BatchDetections:
        with self._slots.resume(ticket) as slot, self._gpu.current():
            return self._detections(slot, ticket.batch)

    def _detections(self, slot: Slot, batch: int) -> BatchDetections:
        """Return what a slot holds; images that needed more than the engine looks at are finished.

        A negative count marks them.
        """
        detections = slot.detections(batch)
        unfinished = int((detections.num_dets < 0).sum())
        if not unfinished or not self._gives_candidates:
            return detections
        self.repaired += unfinished
        return finish_exactly(
            detections,
            slot.candidates(batch),
            slot.iou_threshold,
            voting=self.manifest.preset.score_voting,
        )

    def _checked(self, detections: BatchDetections) -> BatchDetections:
        if (detections.num_dets < 0).any():
            raise ArtefactError(
                f"{self._path}: {_unsettled(detections.num_dets.tolist(), self.manifest)}"
            )
        return super()._checked(detections)

    def _start(
        self,
        slot: Slot,
        images: Any,
        valid_hw: Any,
        score_threshold: float,
        iou_threshold: float,
        *,
        timed: bool = False,
    ) -> int:
        """Put a batch into a slot, start the GPU, and return how many images there are."""
        views: tuple[Any, Any] = (
            view_array(images, "images", gpu=self._gpu.ordinal, stream=slot.stream.handle),
            view_array(valid_hw, "valid_hw", gpu=self._gpu.ordinal, stream=slot.stream.handle),
        )
        super()._check_call(*views)
        shape = views[0].shape
        profile = choose_profile(self._profiles, shape)
        rows = next(size for size in batch_sizes(self._profiles[profile]) if size >= shape[0])
        slot.fill(*views, score_threshold, iou_threshold, rows)
        with self._launching:
            slot.start(
                profile,
                (rows, *shape[1:]),
                [other.computed for other in self._buffers if other is not slot],
                timed=timed,
            )
        return shape[0]

    def close(self) -> None:
        """Wait for calls at work, then free everything; may be called again.

        Batches that were not collected are lost.
        """
        super().close()
        self._release()


def choose_profile(profiles: Sequence[OptimizationProfile], shape: tuple[int, ...]) -> int:
    """Return the number of the profile that is tuned best for images of a shape (B, H, W, 3).

    Raises:
        InputError: none takes so many images of that size.
    """
    batch, size_hw = shape[0], shape[1:3]
    sized = [
        (index, profile) for index, profile in enumerate(profiles) if profile.size_hw == size_hw
    ]
    fitting = [
        (abs(profile.opt_batch - batch), index)
        for index, profile in sized
        if profile.min_batch <= batch <= profile.max_batch
    ]
    if not fitting:
        takes = " or ".join(f"{profile.min_batch} to {profile.max_batch}" for _, profile in sized)
        size = f"{size_hw[0]} x {size_hw[1]}"
        raise InputError(
            f"a batch of {batch} at {size}, this engine takes {takes}; choose such a --batch, or "
            "build it for others"
        )
    return min(fitting)[1]


def batch_sizes(profile: OptimizationProfile) -> tuple[int, ...]:
    """Return the batches that others of a profile are padded to, smallest first.

    The smallest, the one to be fastest at, the largest, and halves of the largest: few, since each
    holds memory and takes time to prepare, and none is padded to twice its size.
    """
    sizes = {profile.min_batch, profile.opt_batch}
    size = profile.max_batch
    while size > profile.min_batch:
        sizes.add(size)
        size = (size + 1) // 2
    return tuple(sorted(sizes))


def _unsettled(num_dets: Sequence[int], manifest: Manifest) -> str:
    """Return the sentence for suppression that did not end within its rounds.

    A negative count marks such an image.
    """
    rounds = manifest.build.nms_rounds or "a fixed number of"
    images = ", ".join(str(number) for number, count in enumerate(num_dets, 1) if count < 0)
    return (
        f"{rounds} rounds of suppression were too few for image {images} of a batch of "
        f"{len(num_dets)} (num_dets is {min(num_dets)}); "
        "build the engine with more --nms-rounds, or with --nms loop, which takes as many as it "
        "needs"
    )


def _flavour_for(path: Path, target: EngineTarget, manifest: Manifest) -> Flavour:
    try:
        return load_flavour(target.flavour)
    except DeviceError as error:
        built = f"{TITLES[target.flavour]} {target.version}"
        raise DeviceError(
            f"{path}: was built by {built}, and here {error}; or {rebuild(path, manifest)}"
        ) from error


def _kernels_file(manifest: Manifest, gpu: Gpu, flavour: Flavour) -> Path:
    """Return where TensorRT-RTX keeps what it compiles of one plan for one kind of GPU."""
    key = hashlib.sha256(
        f"{manifest.artefact_sha256} {gpu.name} {flavour.version}".encode()
    ).hexdigest()
    return home_folder("kernels") / f"{key[:32]}.bin"


def _once(notes: list[str]) -> AddNote:
    """Return a function that appends a note unless it is in the list already."""

    def add(note: str) -> None:
        if note not in notes:
            notes.append(note)

    return add


def _close(gpu: Gpu, resources: ExitStack, slots: Slots[Slot] | None = None) -> None:
    if slots is not None:
        slots.close()
    try:
        with gpu.current():
            resources.close()
    finally:
        gpu.close()
