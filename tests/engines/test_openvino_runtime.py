"""OpenVINO as a package, and the files it reads."""

import subprocess
import sys
from pathlib import Path

import pytest

from tood_deploy.engines.openvino_runtime import check_files, reason_of, refusal
from tood_deploy.errors import ArtefactError

LOAD = """
import sys
from tood_deploy.engines.openvino_runtime import load_openvino
openvino = load_openvino()
assert load_openvino() is openvino
loaded = [name for name in sys.modules if name.startswith("openvino_telemetry")]
print(loaded, callable(openvino.convert_model))
import openvino_telemetry
"""


def test_is_loaded_without_telemetry_and_without_spoiling_it_for_others() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout) == (0, "[] True\n"), result.stderr


def test_the_reason_is_its_last_line() -> None:
    text = (
        "Exception from src/core.cpp:132:\nCheck failed at y.cpp:3:\n-- No rule for: Foo-21\n\n\n"
    )
    assert reason_of(RuntimeError(text)) == "No rule for: Foo-21"
    assert reason_of(RuntimeError("")) == "RuntimeError"
    assert str(refusal(Path("a.xml"), RuntimeError(text))).count("\n") == 0


@pytest.mark.parametrize(
    ("name", "content"), [("a.xml", b""), ("a.xml", b"<html>"), ("a.onnx", b"hello")]
)
def test_other_files_are_refused_by_their_first_bytes(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ArtefactError, match=rf"not an \{Path(name).suffix} file inside"):
        check_files(tmp_path / name)
