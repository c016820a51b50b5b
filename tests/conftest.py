"""What all tests share.

Thread limits, the folder of goldens, the synthetic image, the stand-in weights, `tiny` exported.
"""

import hashlib
import os

# Before anything imports torch: more threads only wait for each other on small maps, and where the
# tests run in several processes these share the cores already.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads leave the core to the others

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import benchmark  # noqa: F401  before onnxruntime.quantization brings a folder with another benchmark.py onto the path
import numpy as np
import pytest
from numpy.typing import NDArray
from reference import seeded_family, seeded_weights, synth_image
from reported_once import pytest_runtest_makereport  # noqa: F401 - a hook

ROOT = Path(__file__).resolve().parents[1]
VERIFIED_HW = {"landscape": (128, 192), "portrait": (192, 128)}
SHARED = Path(os.environ.get("TOOD_SHARED") or ROOT / ".." / "shared").resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine has no folder or no GPU for; files of long tests come first.

    Processes that share the files then end at about the same time.
    """
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
    absent = {
        "shared": None if SHARED.is_dir() else f"{SHARED} is absent",
        # Where the environment says that there is one, its absence is a failure.
        "gpu": None
        if os.environ.get("TOOD_EXPECT_GPU") or shutil.which("nvidia-smi")
        else "no NVIDIA GPU",
    }
    for item in items:
        for name, reason in absent.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def own_home(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[None]:
    """Caches of the tests stay theirs.

    Graphs, whose keys hold our sources, serve later sessions.
    """
    home = tmp_path_factory.mktemp("home")
    if pytestconfig.cache is not None:
        (home / "graphs").symlink_to(pytestconfig.cache.mkdir("graphs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOD_HOME", str(home))
        yield


@pytest.fixture(scope="session", autouse=True)
def small_verification() -> Iterator[dict[str, tuple[int, int]]]:
    """Exports are verified on small images, a fifth of the work; gives the sizes of users'."""
    from tood_deploy.parity import verify

    shipped = verify.SIZES_HW
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "SIZES_HW", VERIFIED_HW)
        yield shipped


@pytest.fixture
def full_sizes(
    small_verification: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exports are verified as users' are."""
    from tood_deploy.parity import verify

    monkeypatch.setattr(verify, "SIZES_HW", small_verification)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Makes a write beyond so many bytes of a file fail, below Python too, as on a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        resource = pytest.importorskip("resource")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """PyTorch has as many threads as before a test; a command's --threads holds for the process."""
    yield
    if torch := sys.modules.get("torch"):
        threads = int(os.environ["OMP_NUM_THREADS"])
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Signals do what they did before a test; a command that ends its process gives them up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens, checkpoints and images."""
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
def synth_image_bgr() -> Callable[[int, int], NDArray[np.uint8]]:
    """A function of height and width.

    The seeded test image (H, W, 3) uint8, RGB or BGR as one likes.
    """
    return synth_image.image


@pytest.fixture(scope="session")
def seeded_fill() -> Callable[[dict[str, tuple[int, ...]]], dict[str, NDArray[Any]]]:
    """A function of shapes by state-dict key.

    The deterministic stand-in weights behind the goldens.
    """
    return seeded_weights.fill


@pytest.fixture(scope="session")
def seeded_model() -> Callable[..., Any]:
    """A function of a preset's name, with fields to replace.

    Its network with the stand-in weights.
    """

    def build(name: str, **fields: Any) -> Any:
        import torch

        from tood_deploy.model import build_model
        from tood_deploy.presets import PRESETS

        with torch.device("meta"):
            model = build_model(replace(PRESETS[name], **fields))
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        weights = stand_in_weights(shapes, model.preset.detector)
        # Copies: the weights are kept, and a test may change its model's.
        model.load_state_dict(
            {key: torch.tensor(value) for key, value in weights.items()}, assign=True
        )
        return model.requires_grad_(True)

    return build


def stand_in_weights(shapes: dict[str, tuple[int, ...]], detector: str) -> dict[str, NDArray[Any]]:
    """Return a detector's stand-in weights by state-dict key, from the shapes."""
    if detector == "tood":
        return seeded_weights.fill(shapes)
    return seeded_family.fill(shapes, "retina" if detector == "retinanet" else detector)


@pytest.fixture(scope="session")
def tiny_checkpoint(
    seeded_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny` with stand-in weights: it finds a hundred objects in the synthetic image."""
    from tood_deploy.model import save_checkpoint

    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_checkpoint(seeded_model("tiny"), path)
    return path


@pytest.fixture(scope="session")
def tiny_artefact(tiny_checkpoint: Path, pytestconfig: pytest.Config) -> Path:
    """The same, exported and verified once for all tests. Copy it before changing it.

    One process makes it for the others, and for later runs of the same sources.
    """
    path = tiny_checkpoint.with_suffix(".onnx")
    if pytestconfig.cache is None:
        export_tiny(tiny_checkpoint, path)
        return path
    from filelock import FileLock

    folder = pytestconfig.cache.mkdir("artefacts")
    kept = folder / f"{sources_sha256(tiny_checkpoint)}.onnx"
    with FileLock(folder / "lock"):
        if not kept.with_suffix(".json").is_file():
            for older in (*folder.glob("*.onnx"), *folder.glob("*.json")):
                older.unlink()
            export_tiny(tiny_checkpoint, kept)
        for suffix in (".onnx", ".json"):
            shutil.copy(kept.with_suffix(suffix), path.with_suffix(suffix))
    return path


def export_tiny(checkpoint: Path, path: Path) -> None:
    """Export and verify a checkpoint."""
    from tood_deploy.export.export import export_onnx
    from tood_deploy.model import load_checkpoint

    export_onnx(load_checkpoint(checkpoint), path)


def sources_sha256(checkpoint: Path) -> str:
    """Return the hash of all that decides what becomes of a checkpoint."""
    names = ("numpy", "onnx", "onnxruntime", "onnxscript", "torch")
    digest = hashlib.sha256(repr([version(name) for name in names]).encode())
    for path in (checkpoint, Path(__file__), *sorted((ROOT / "tood_deploy").rglob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


@pytest.fixture(scope="session")
def tiny_reference(tiny_checkpoint: Path) -> Any:
    """The same in PyTorch, as what exports are compared with.

    What is measured of an input is measured once.
    """
    from tood_deploy.model import load_checkpoint
    from tood_deploy.parity.torch_reference import torch_reference

    measured: dict[bytes, Any] = {}
    reference = torch_reference(load_checkpoint(tiny_checkpoint), 100)

    def measure(images: NDArray[np.uint8], *others: Any) -> Any:
        key = repr((images.shape, others)).encode() + images.tobytes()
        if key not in measured:
            measured[key] = reference.measure(images, *others)
        return measured[key]

    return replace(reference, measure=measure)


@pytest.fixture
def stand_in_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits for stand-in weights.

    No detection of theirs stands out, so that roundings exchange more of them.
    """
    from tood_deploy.parity.tolerances import DETECTION_LIMITS

    for precision, limits in list(DETECTION_LIMITS.items()):
        monkeypatch.setitem(DETECTION_LIMITS, precision, replace(limits, lost=0.5, added=0.5))
