"""A fake machine with a GPU and a plan file on it, for tests of the TensorRT engine."""

from __future__ import annotations

import gc
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines.fake_cuda import FakeDriver
from engines.fake_tensorrt import MAX_DET, FakePlan, answers
from manifest_values import changed, stated

from tood_deploy.engines import BatchDetections
from tood_deploy.engines.tensorrt import cuda as cuda_device
from tood_deploy.engines.tensorrt import cuda as cuda_memory
from tood_deploy.engines.tensorrt import engine as tensorrt_engine
from tood_deploy.engines.tensorrt import library as tensorrt_flavour
from tood_deploy.engines.tensorrt.engine import TensorRTEngine
from tood_deploy.engines.tensorrt.library import Flavour
from tood_deploy.manifest import Manifest, manifest_path

PROFILES = [((64, 96), (1, 2, 4)), ((96, 32), (1, 1, 2))]


@dataclass
class Bench:
    """A fake machine with a plan file on it."""

    driver: FakeDriver
    plan: FakePlan
    path: Path
    manifest: Manifest

    def open(self, *, warm_up: bool = False, **options: Any) -> TensorRTEngine:
        """Open it, without a warm-up where not asked for: most tests look at the first batches."""
        return TensorRTEngine(self.path, warm_up=warm_up, **options)

    def write(self, **fields: Any) -> None:
        """Changes the manifest."""
        self.manifest = changed(self.manifest, **fields)
        manifest_path(self.path).write_text(self.manifest.to_json())


@contextmanager
def fake_bench(name: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Either flavour, whatever is installed; in the end nothing of the GPU's may be held."""
    monkeypatch.setenv("TOOD_HOME", str(folder / "home"))
    driver = FakeDriver()
    monkeypatch.setattr(cuda_device, "driver", driver)
    monkeypatch.setattr(cuda_memory, "driver", driver)
    logger = tensorrt_flavour.load_flavour("tensorrt_rtx").logger
    plan = FakePlan(driver, logger, PROFILES, rtx=name == "tensorrt_rtx")
    flavour = Flavour(name, plan.module, "10.13.3.9", logger)
    monkeypatch.setattr(tensorrt_engine, "load_flavour", lambda name: flavour)
    path = folder / "model.engine"
    path.write_bytes(b"plan")
    target = {
        "flavour": name,
        "version": "10.13.3.9",
        "platform": f"{sys.platform}-{platform.machine()}".lower(),
        "compute_capabilities": ["8.9"],
        "profiles": [
            {"size_hw": list(size_hw), "batch": list(batches)} for size_hw, batches in PROFILES
        ],
    }
    made = Bench(driver, plan, path, stated(max_det=MAX_DET, target=target).with_artefact(path))
    made.write()
    yield made
    if driver.held() or plan.contexts or plan.engines:
        gc.collect()  # what only a cycle holds goes now, what leaks does not
    assert driver.held() == {}
    assert not plan.contexts
    assert not plan.engines
    assert not driver.stack


def make_images(
    batch: int, seed: int = 0, size_hw: tuple[int, int] = (64, 96)
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (batch, *size_hw, 3), np.uint8)
    return images, np.stack([generator.integers(1, side + 1, batch) for side in size_hw], 1).astype(
        np.int32
    )


def assert_answers(
    found: BatchDetections,
    images: np.ndarray,
    valid_hw: np.ndarray,
    conf: float = 0.25,
    iou: float = 0.5,
) -> None:
    expected = answers(images, valid_hw, conf, iou)
    for name, array in zip(
        expected, (found.num_dets, found.boxes_net, found.scores, found.labels), strict=True
    ):
        assert array.dtype == expected[name].dtype
        assert np.array_equal(array, expected[name]), name
