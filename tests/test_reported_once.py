"""A shared fixture that fails is one error, whatever the number of its tests."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.fixture(scope="session")
def model():
    raise ValueError("the model cannot be made")

@pytest.fixture
def engine(model):
    return model

@pytest.fixture
def own():
    raise KeyError("of one test")

@pytest.mark.parametrize("number", range(20))
def test_model(model, number): pass

def test_engine(engine): pass

@pytest.mark.parametrize("number", range(2))
def test_own(own, number): pass

def test_another(): pass
"""


def test_a_failing_session_fixture_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "reported_once", "-ra", "test_some.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert "1 passed, 20 skipped, 3 errors" in lines[-1]
    assert sum(line.startswith("E ") and "the model cannot be made" in line for line in lines) == 1
    (skipped,) = [line for line in lines if line.startswith("SKIPPED")]
    assert "[20]" in skipped
    assert "test_some.py::test_model[0]" in skipped
