"""Names of models, the token's file and the limits, as tood-serve takes them."""

from pathlib import Path
from typing import Any

import pytest

from tood_deploy.cli.serve import main, named_models, read_token
from tood_deploy.errors import ToodError
from tood_deploy.serve.models import ServeLimits


def test_models_get_the_names_of_their_files_or_others(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.onnx"
    odd.touch()
    named = named_models(["x/r50.onnx", "second=x/r50.onnx", "c-1.x=model.engine"])
    assert named == {"r50": "x/r50.onnx", "second": "x/r50.onnx", "c-1.x": "model.engine"}
    with pytest.raises(ToodError, match="NAME=MODEL"):
        named_models([str(odd)])
    assert named_models([f"odd={odd}"]) == {"odd": str(odd)}


@pytest.mark.parametrize(
    "texts", [["a.onnx", "x/a.onnx"], ["a b.onnx"], ["=a.onnx"], ["a/b=c.onnx"]]
)
def test_names_that_cannot_be_served(texts: list[str]) -> None:
    with pytest.raises(ToodError, match="NAME=MODEL"):
        named_models(texts)


def test_the_token_is_one_word(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("abc\n")
    assert read_token(path) == "abc"
    for wrong in ("", " \n", "a b", "\u00e9"):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(ToodError, match="--token-file"):
            read_token(path)
    with pytest.raises(ToodError, match="cannot be read"):
        read_token(tmp_path / "none")


@pytest.mark.parametrize(
    "limit", ["max_batch", "queue", "max_body", "max_pixels", "timeout_s", "batch_delay_s"]
)
def test_limits_have_a_range(limit: str) -> None:
    wrong: Any
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ToodError, match=limit):
            ServeLimits(**{limit: wrong})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.onnx", "--port", "0"], "none.onnx: no such file"),
        (["none.onnx", "--port", "99999"], "--port is 99999"),
        (["none.onnx", "--host", "203.0.113.1", "--port", "0"], "203.0.113.1"),
        (["none.onnx", "--queue", "0"], "queue"),
        (["none.onnx", "--conf", "2", "--port", "0"], "conf is 2"),
    ],
)
def test_wrong_use_is_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
