"""What all commands share: one line for wrong use, versions, completion, old names of options."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tood_deploy import __version__
from tood_deploy.cli.common import COMMANDS, CommandParser, accept_old_name, class_names_from
from tood_deploy.cli.detection import add_device
from tood_deploy.errors import ToodError
from tood_deploy.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]["scripts"]


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run_command(command: str, *arguments: str, **environment: str) -> Any:
    module, function = SCRIPTS[command].split(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}({[*arguments]}))"
    return run_python("-c", code, **environment)


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_has_a_version_and_one_line_for_wrong_use(command: str) -> None:
    version = run_command(command, "--version")
    assert (version.returncode, version.stdout) == (0, f"{command} {__version__}\n")
    wrong = run_command(command, "--no-such-option")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.endswith(f"see {command} --help\n")


def test_a_subcommand_names_its_own_help() -> None:
    wrong = run_command("tood-bench", "latency")
    assert wrong.returncode == 2
    assert wrong.stderr.endswith("see tood-bench latency --help\n")


def test_the_package_lists_its_commands() -> None:
    listed = run_python("-m", "tood_deploy")
    assert listed.returncode == 0
    assert sorted(SCRIPTS) == sorted(COMMANDS)
    lines = listed.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [*COMMANDS]
    assert all(len(line.split()) > 3 for line in lines)


def test_completion(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    line = "tood-infer --run"
    answer = tmp_path / "answer"
    completed = run_command(
        "tood-infer",
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_STDOUT_FILENAME=str(answer),
        _ARGCOMPLETE_SHELL="bash",
        COMP_LINE=line,
        COMP_POINT=str(len(line)),
        COMP_TYPE="9",
    )
    assert completed.returncode == 0, completed.stderr
    assert answer.read_text(encoding="utf-8").split() == ["--runtime"]


@pytest.fixture
def parser() -> CommandParser:
    parser = CommandParser("tood-export")
    option = parser.add_argument("--fallback-precision", choices=("fp32", "bf16"), default="fp32")
    accept_old_name(parser, "--rest", option)
    names = parser.add_argument("--keep-fp32", nargs="*", type=int, default=[])
    accept_old_name(parser, "--keep", names)
    add_device(parser)
    return parser


@pytest.mark.parametrize(
    ("arguments", "expected", "notes"),
    [
        ([], ("fp32", []), 0),
        (["--fallback-precision", "bf16", "--keep-fp32", "1"], ("bf16", [1]), 0),
        (["--rest", "bf16"], ("bf16", []), 1),
        (["--keep", "1", "2", "--rest", "bf16"], ("bf16", [1, 2]), 2),
    ],
)
def test_old_names_are_accepted_with_a_note(
    arguments: list[str],
    expected: tuple[str, list[int]],
    notes: int,
    parser: CommandParser,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parsed = parser.parse_args(arguments)
    assert (parsed.fallback_precision, parsed.keep_fp32) == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == notes
    assert all(line.startswith("note: ") and "called" in line for line in lines)


def test_old_names_are_checked_and_not_in_the_help(
    parser: CommandParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--rest", "int4"])
    assert "int4" in capsys.readouterr().err
    assert not {"--rest", "--keep"} & set(parser.format_help().replace(",", " ").split())


@pytest.mark.parametrize(
    ("given", "device", "word"),
    [
        ("cpu", "cpu", ""),
        ("cuda", "cuda", ""),
        ("gpu", "cuda", "note: "),
        ("cuda:1", None, "CUDA_VISIBLE_DEVICES"),
        ("tpu", None, "expected cpu or cuda"),
    ],
)
def test_devices(
    given: str,
    device: str | None,
    word: str,
    parser: CommandParser,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if device is None:
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(["--device", given])
        assert stopped.value.code == 2
    else:
        assert parser.parse_args(["--device", given]).device == device
    err = capsys.readouterr().err
    assert word in err
    assert bool(err) == bool(word)


class TestClassNames:
    def test_many_names_are_no_path(self) -> None:
        names = list(PRESETS["r50-1x"].class_names)
        assert len(",".join(names)) > 255
        assert class_names_from(",".join(names)) == names
        assert class_names_from(", ".join(names)) == names

    @pytest.mark.parametrize("mark", ["", "\ufeff"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_of_a_file_of_any_editor(self, tmp_path: Path, mark: str, end: str) -> None:
        path = tmp_path / "names.txt"
        path.write_bytes(f"{mark}caf\u00e9{end}[red]{end}{end}$x${end}".encode())
        assert class_names_from(str(path)) == ["caf\u00e9", "[red]", "$x$"]

    def test_a_file_that_is_no_utf8_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
        with pytest.raises(ToodError, match=r"names\.txt: not in UTF-8 .* save it in UTF-8"):
            class_names_from(str(tmp_path / "names.txt"))

    def test_a_long_wrong_text_is_cut_in_the_message(self) -> None:
        with pytest.raises(ToodError) as caught:
            class_names_from(",".join(["same"] * 300))
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["x" * 300, "x" * 300 + ".onnx", "é" * 130, "a\0b"])
@pytest.mark.parametrize("arguments", [("{}",), ("m.onnx", "--json", "{}")])
def test_text_that_can_name_no_file_is_wrong_use(
    arguments: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = CommandParser("tood-infer")
    parser.add_argument("model")
    parser.add_argument("--json", type=Path)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([argument.format(text) for argument in arguments])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no file can have such a name" in err
