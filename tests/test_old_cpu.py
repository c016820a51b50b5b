"""Exports of this machine, run as on a CPU with AVX2 and no more.

They give the same results, and 8-bit weights that would be wrong are refused. Slow, as emulation
is. Needs QEMU's user mode (Debian's qemu-user) and the shared folder's script that calls it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tood_deploy.cli.export import main as export_main
from tood_deploy.demo.scenes import write_scenes
from tood_deploy.engines import open_engine
from tood_deploy.engines.precision_support import saturates_in_onnxruntime
from tood_deploy.preprocess import resize_and_pad

pytestmark = [pytest.mark.slow, pytest.mark.shared]
WEIGHTS = Path(__file__).resolve().parents[1] / "tood_deploy" / "weights" / "tiny-demo.safetensors"
CALIBRATED = 64
IMGSZ = (120, 160)
CONF, IOU = 0.3, 0.6

OPEN_ALL = """
import json, sys
import numpy as np
from pathlib import Path
from tood_deploy.engines import open_engine
from tood_deploy.errors import ArtefactError

folder, *names = sys.argv[1:]
inputs = np.load(Path(folder) / "inputs.npz")
for name in names:
    try:
        with open_engine(Path(folder) / name, threads=1) as engine:
            batch = engine.infer(inputs["images"], inputs["valid_hw"], 0.3, 0.6)
        arrays = (batch.num_dets, batch.boxes_net, batch.scores, batch.labels)
        np.savez(Path(folder) / f"{name}.npz", *arrays)
        print(json.dumps([name, ""]))
    except ArtefactError as error:
        print(json.dumps([name, str(error)]))
"""

VERIFY = """
import sys
from pathlib import Path
import tood_deploy.parity.verify as module
from tood_deploy.parity.onnx_reference import OnnxRunner
from tood_deploy.model import load_checkpoint
from tood_deploy.parity.torch_reference import torch_reference

module.SIZES_HW = {"landscape": (64, 96), "smallest": (64, 64)}
reference = torch_reference(load_checkpoint(sys.argv[1]), 100)
parity = module.verify_float32(reference, OnnxRunner(Path(sys.argv[2]))).to_dict()
ratios = [verdict["rms_ratio"] for verdict in parity["maps"].values()]
print(max(ratios), parity["detections"]["reference"])
"""


@pytest.fixture(scope="module")
def on_avx2(shared: Path) -> Callable[..., str]:
    """Return a function that runs Python code as on a CPU with AVX2, and returns its output."""
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 is not installed: apt-get install qemu-user")

    def run(code: str, *arguments: object) -> str:
        python = [sys.executable, "-W", "ignore", "-c", code]
        command = [shared / "tools" / "old_cpu.sh", "avx2", *python, *arguments]
        process = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        return process.stdout

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the demo network's artefacts for CPUs, and inputs of two scenes."""
    place = tmp_path_factory.mktemp("artefacts")
    write_scenes(place / "scenes", CALIBRATED, seed=3)
    images = sorted((place / "scenes" / "images").iterdir())
    export(WEIGHTS, "--imgsz", *IMGSZ, "--output", place / "fp32.onnx")
    export(place / "fp32.onnx", "--to", "openvino", "--output", place / "fp32-ov.xml")
    calibrated = ["--precision", "int8", "--calib-data", images[0].parent]
    export(place / "fp32.onnx", *calibrated, "--output", place / "int8.onnx")
    export(place / "fp32.onnx", "--to", "openvino", *calibrated, "--output", place / "int8-ov.xml")
    if not saturates_in_onnxruntime():
        native = ["--target-cpu", "native", "--output", place / "native.onnx"]
        export(place / "fp32.onnx", *calibrated, *native)
        # Its manifest says, wrongly, that the weights are portable: only the answer shows it.
        shutil.copy(place / "native.onnx", place / "lying.onnx")
        manifest = json.loads((place / "native.json").read_text())
        manifest["options"]["int8"]["scheme"] = "u8s7"
        (place / "lying.json").write_text(json.dumps(manifest))
    prepared = [
        resize_and_pad(np.asarray(cv2.imread(str(path)), np.uint8), IMGSZ) for path in images[:2]
    ]
    np.savez(
        place / "inputs.npz",
        images=np.stack([image for image, _ in prepared]),
        valid_hw=np.array([transform.resized_hw for _, transform in prepared], np.int32),
    )
    return place


def export(*arguments: Any) -> None:
    assert export_main([*map(str, arguments), "--quiet"]) == 0


ARTEFACTS = ["fp32.onnx", "fp32-ov.xml", "int8.onnx", "int8-ov.xml"]


@pytest.fixture(scope="module")
def emulated(on_avx2: Callable[..., str], folder: Path) -> dict[str, str]:
    """Return why every artefact was refused, "" where it was not; detections are in the folder."""
    lines = on_avx2(OPEN_ALL, folder, *ARTEFACTS, *native_artefacts(folder)).splitlines()
    return dict(map(json.loads, lines))


def native_artefacts(folder: Path) -> list[str]:
    """Return the names of the artefacts with all 8 bits, where this CPU can build them."""
    return [name for name in ("native.onnx", "lying.onnx") if (folder / name).is_file()]


@pytest.mark.parametrize("name", ARTEFACTS)
def test_every_artefact_opens_and_finds_the_same(
    name: str, emulated: dict[str, str], folder: Path
) -> None:
    assert emulated[name] == ""
    inputs = np.load(folder / "inputs.npz")
    with open_engine(folder / name, threads=1) as engine:
        expected = engine.infer(inputs["images"], inputs["valid_hw"], CONF, IOU)
    with np.load(folder / f"{name}.npz") as arrays:
        num_dets, boxes, scores, labels = (arrays[part] for part in arrays.files)
    assert num_dets.tolist() == expected.num_dets.tolist()
    assert num_dets.min() > 0
    np.testing.assert_array_equal(labels, expected.labels)
    # 8-bit sums are exact; float32's rounding is left, which now and then changes one to 8 bits.
    score_atol, box_atol = (1e-5, 0.01) if name.startswith("fp32") else (0.02, 1.0)
    np.testing.assert_allclose(scores, expected.scores, atol=score_atol)
    np.testing.assert_allclose(boxes, expected.boxes_net, atol=box_atol)


def test_8_bit_weights_are_refused_where_sums_saturate(
    emulated: dict[str, str], folder: Path
) -> None:
    if not native_artefacts(folder):
        pytest.skip("this CPU saturates itself: nothing of that kind can be made here")
    assert "--target-cpu portable" in emulated["native.onnx"]


def test_the_stored_answer_alone_notices_saturation(emulated: dict[str, str], folder: Path) -> None:
    if not native_artefacts(folder):
        pytest.skip("this CPU saturates itself: nothing of that kind can be made here")
    assert "fails its self-test" in emulated["lying.onnx"]


def test_float32_is_verified_there(on_avx2: Callable[..., str], folder: Path) -> None:
    ratio, detections = on_avx2(VERIFY, WEIGHTS, folder / "fp32.onnx").split()[-2:]
    assert 0 < float(ratio) <= 12
    assert int(detections) > 10
