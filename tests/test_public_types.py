"""The public face as a strict type checker sees it in a user's program: the documents' examples."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/getting-started.md",
    "docs/checkpoints.md",
)  # whose examples are whole programs
TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
PROGRAM = """
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from PIL import Image

from tood_deploy import (
    PRESETS,
    Detections,
    Detector,
    Moment,
    Preset,
    Selection,
    ToodError,
    open_engine,
)
from tood_deploy.engines import BatchDetections, Engine
from tood_deploy.model import (
    DenseDetector,
    HeadOutput,
    build_model,
    load_checkpoint,
    save_checkpoint,
)

detector = Detector(Path("r50.onnx"), imgsz=(800, 1333), color="rgb")
found = detector(Image.open("a.png"))
found = detector(np.zeros((4, 4), np.uint8), color="bgr")
best = assert_type(found.filter(0.5)[found.scores > 0.6], Detections)
for x1, y1, x2, y2 in best.boxes.tolist():
    print(x1 + y1, x2 + y2)
print(found.to_coco(1)[0]["bbox"], found.class_ids[0] + 1, found.scores.max())
print(found.names()[0].upper(), len(found))
print(found.plot(np.zeros((4, 4, 3), np.uint8)).shape)
chosen = Selection(stride=2, start=Moment(1.5), max_frames=9)
for frame, found in detector.stream(["a.mp4", Path("b.mp4")], batch=2, selection=chosen):
    print(frame.timestamp_s, frame.image_bgr.shape, assert_type(found, Detections).names())
prepared = detector.prepare(np.zeros((4, 4, 3), np.uint8))
print(detector.infer([prepared])[0].boxes, prepared.transform.net_hw, prepared.image.shape)
print(detector.collect(detector.submit([prepared])).scores.shape)

engine = assert_type(open_engine("a.onnx", device="cpu", threads=2), Engine)
batch = engine.infer(np.zeros((1, 32, 32, 3), np.uint8), np.array([[32, 32]], np.int32), 0.3, 0.6)
print(assert_type(batch, BatchDetections).num_dets[0], engine.precision)
print(engine.manifest.preset.class_names)
with Detector(engine) as again:
    print(again.class_names, again.engine.name)

preset = assert_type(PRESETS["tiny"], Preset)
model = assert_type(build_model(preset), DenseDetector)
try:
    model = load_checkpoint("a.pth", preset="tiny", class_names=["a"])
except ToodError as error:
    print(str(error))
out = assert_type(model(torch.zeros(1, 3, 64, 64)), HeadOutput)
print([scores.shape for scores in out.scores], [boxes.shape for boxes in out.boxes_strides])
save_checkpoint(model, Path("a.safetensors"))
"""


START = "from tood_deploy import Detector\ndetector = Detector('a.onnx')\n"
WRONG = (
    "detector(None)",
    "detector('a.png')",
    "detector.stream(None)",
    "Detector(None)",
    "Detector('a.onnx', color='gbr')",
)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of the programs that are wrong, and of all that follow them."""
    programs = [*(START + line for line in WRONG), PROGRAM, *EXAMPLES]
    return strict_errors(tmp_path_factory.mktemp("programs"), *programs)


def strict_errors(folder: Path, *programs: str) -> list[str]:
    """What pyright in strict mode says of these programs, a line each."""
    for number, program in enumerate(programs):
        (folder / f"program{number}.py").write_text(program, encoding="utf-8")
    settings = {
        "typeCheckingMode": "strict",
        "extraPaths": [str(ROOT)],
        "include": ["."],
        "pythonVersion": "3.11",
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        "--project",
        str(folder),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    answer = json.loads(result.stdout)
    assert answer["summary"]["filesAnalyzed"] == len(programs)
    lines = [
        (each["file"], each["range"]["start"]["line"] + 1, each["message"])
        for each in answer["generalDiagnostics"]
    ]
    return [f"{Path(file).name}:{line}: {message}" for file, line, message in lines]


def test_examples_and_programs_of_users_have_no_errors(errors: list[str]) -> None:
    assert len(EXAMPLES) >= 2
    wrong = {f"program{number}.py" for number in range(len(WRONG))}
    assert [error for error in errors if error.split(":")[0] not in wrong] == []


def test_wrong_programs_have_errors(errors: list[str]) -> None:
    found = {error.split(":")[0] for error in errors}
    assert found >= {f"program{number}.py" for number in range(len(WRONG))}
