"""What all tests share: thread limits, the folder of goldens, the synthetic picture, the stand-in weights."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before anything imports torch: more threads only wait for each other on small maps

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import seeded_weights, synth_image

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("TOOD_SHARED") or ROOT / ".." / "shared").resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine has no folder or no GPU for."""
    absent = {
        "shared": None if SHARED.is_dir() else f"{SHARED} is absent",
        "gpu": None if shutil.which("nvidia-smi") else "no NVIDIA GPU",
    }
    for item in items:
        for name, reason in absent.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens, checkpoints and pictures."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent")
    return SHARED


@pytest.fixture(scope="session")
def goldens(shared: Path) -> Callable[[str], dict[str, NDArray[Any]]]:
    """A function: the arrays of one golden, by its name without `.npz`."""

    def load(name: str) -> dict[str, NDArray[Any]]:
        with np.load(shared / "reference" / "goldens" / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def synth_picture() -> Callable[[int, int], NDArray[np.uint8]]:
    """A function of height and width: the seeded test picture (H, W, 3) uint8, RGB or BGR as one likes."""
    return synth_image.image


@pytest.fixture(scope="session")
def seeded_fill() -> Callable[[dict[str, tuple[int, ...]]], dict[str, NDArray[Any]]]:
    """A function of shapes by state-dict key: the deterministic stand-in weights behind the goldens."""
    return seeded_weights.fill
