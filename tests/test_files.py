"""Hashes, and files that are written whole or not at all."""

import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tood_deploy import files
from tood_deploy.errors import OutputError
from tood_deploy.files import (
    TEMPORARY,
    absent_or,
    atomic_path,
    atomic_paths,
    check_overwrites,
    check_writable,
    file_sha256,
    remove_leftovers,
    temporary_folder,
    write_text,
)


class TestHashes:
    def test_a_file_is_read_once_until_it_changes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.onnx"
        path.write_bytes(b"one")
        first = file_sha256(path)
        with monkeypatch.context() as patch:
            patch.setattr(files.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
            assert file_sha256(path) == first
        path.write_bytes(b"another")
        assert file_sha256(path) == hashlib.sha256(b"another").hexdigest() != first


class TestOneFile:
    def test_it_becomes_itself_with_the_permissions_of_any_new_file(self, tmp_path: Path) -> None:
        (tmp_path / "usual").write_text("x")
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("x")
            assert not (tmp_path / "a.txt").exists()
        usual, own = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "a.txt"))
        assert own == usual

    def test_the_umask_of_the_process_is_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another thread that makes a file meanwhile must not get it with other permissions."""
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("set for the whole process"))
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("x")

    def test_nothing_is_left_after_a_failure(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("old")
        with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt"):
            raise KeyboardInterrupt
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


class TestPlaces:
    def test_a_symbolic_link_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "target").write_text("old")
        (tmp_path / "link").symlink_to("target")
        files.write_text(tmp_path / "link", "new")
        assert (tmp_path / "target").read_text() == "old"
        assert not (tmp_path / "link").is_symlink()

    @pytest.mark.parametrize("name", ["/dev/null", "/dev/stdout", "/proc/self/fd/1", "pipe"])
    def test_a_device_or_pipe_is_never_replaced(self, name: str, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for writes in (atomic_path, atomic_paths):
            with pytest.raises(OutputError, match="device, pipe or link"), writes(tmp_path / name):
                pass


class TestFilesThatBelongTogether:
    def test_all_become_themselves(self, tmp_path: Path) -> None:
        with atomic_paths(tmp_path / "new" / "a.bin", tmp_path / "new" / "a.xml") as names:
            for name in names:
                name.write_text("x")
            assert not (tmp_path / "new" / "a.bin").exists()
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.bin", "a.xml"]

    def test_none_after_a_failure(self, tmp_path: Path) -> None:
        (tmp_path / "a.xml").write_text("old")
        with (  # noqa: PT012
            pytest.raises(KeyboardInterrupt),
            atomic_paths(tmp_path / "a.bin", tmp_path / "a.xml") as names,
        ):
            for name in names:
                name.write_text("x")
            raise KeyboardInterrupt
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.xml", "old")]

    def test_a_place_that_cannot_be_written(self) -> None:
        with (
            pytest.raises(OutputError, match=r"cannot be written .*choose another --output"),
            atomic_paths(Path("/proc/nowhere/a.xml")),
        ):
            pass

    def test_a_full_disk(self, tmp_path: Path) -> None:
        with (
            pytest.raises(OutputError, match="No space left on device"),
            atomic_paths(tmp_path / "a.xml"),
        ):
            raise OSError(28, "No space left on device")
        assert not list(tmp_path.iterdir())


WRITER = """
import os, sys, time
from pathlib import Path
from tood_deploy.files import atomic_path, atomic_paths
folder = Path(sys.argv[1])
with atomic_path(folder / "a.mp4"), atomic_paths(folder / "a.xml", folder / "a.bin") as names:
    names[0].write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


class TestLeftovers:
    @pytest.fixture(autouse=True)
    def not_looked_at_yet(self) -> None:
        remove_leftovers.cache_clear()

    def test_of_a_killed_process_are_removed_by_the_next_output(self, tmp_path: Path) -> None:
        """And not while that process lives, nor what only looks alike."""
        others = {".tood-mine", f"{TEMPORARY}0123.mp4", ".a-0123456789ab.mp4"}
        for name in others:
            (tmp_path / name).write_text("a user's")
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            running = {path.name for path in tmp_path.iterdir()} - others
            assert len(running) == 2
            remove_leftovers(tmp_path)
            assert {path.name for path in tmp_path.iterdir()} == running | others
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        remove_leftovers.cache_clear()
        with atomic_path(tmp_path / "b.json") as temporary:
            temporary.write_text("{}")
        assert {path.name for path in tmp_path.iterdir()} == {"b.json"} | others

    def test_a_symbolic_link_is_no_leftover(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.mkdir()
        (target / "file").write_text("x")
        (tmp_path / f"{TEMPORARY}0123456789abcdef").symlink_to(target)
        remove_leftovers(tmp_path)
        assert (target / "file").exists()

    @pytest.mark.parametrize("length", [1, 251])
    def test_names_of_any_length_have_a_temporary_one(self, tmp_path: Path, length: int) -> None:
        with atomic_path(tmp_path / f"{'n' * length}.txt") as temporary:
            temporary.write_text("x")
        with temporary_folder(tmp_path / ("m" * length), tmp_path) as folder:
            (folder / "x").touch()
        assert [path.name for path in tmp_path.iterdir()] == [f"{'n' * length}.txt"]


class TestCheckOverwrites:
    def test_by_name_by_link_and_by_number(self, tmp_path: Path) -> None:
        given = tmp_path / "a.json"
        given.touch()
        (tmp_path / "link.json").symlink_to(given)
        (tmp_path / "hard.json").hardlink_to(given)
        (tmp_path / "folder").symlink_to(tmp_path)
        for name in ("a.json", "link.json", "hard.json", "folder/a.json", "x/../a.json"):
            with pytest.raises(
                OutputError, match=r"--json .*: is the truth and would be overwritten"
            ):
                check_overwrites({"the truth": [given]}, {"--json": [tmp_path / name]})
        check_overwrites({"the truth": [given]}, {"--json": [tmp_path / "b.json"]})

    def test_two_outputs_of_one_name_or_one_below_the_other(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match=r"--jsonl .*: is written by --json, too"):
            check_overwrites({}, {"--json": [tmp_path / "r"], "--jsonl": [tmp_path / "." / "r"]})
        with pytest.raises(OutputError, match=r"lies in .*, which --json writes as a file"):
            check_overwrites({}, {"--json": [tmp_path / "r"], "--output": [tmp_path / "r" / "a"]})

    def test_a_device_takes_all(self) -> None:
        check_overwrites({"x": ["/dev/null"]}, {"--json": ["/dev/null"], "--jsonl": ["/dev/null"]})


@pytest.mark.parametrize("text", ["x" * 300, "a\0b", "y/" * 3000])
def test_text_that_can_be_no_path_is_no_file(text: str) -> None:
    assert not absent_or(Path(text).is_file)
    assert not absent_or(Path(text).is_dir)


def test_what_is_no_text_is_escaped(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "caf\udce9")
    assert (tmp_path / "a.txt").read_bytes() == b"caf\\udce9"


class TestWritable:
    def test_what_is_there_already(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert check_writable(tmp_path, "") == tmp_path
        assert check_writable(tmp_path / "new" / "folder", "") == tmp_path
        assert check_writable(Path("new/folder"), "").samefile(tmp_path)
        assert check_writable(Path(), "") == Path()
        assert list(tmp_path.iterdir()) == []

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match=r"file is a file; go elsewhere"):
            check_writable(tmp_path / "file" / "new", "go elsewhere")
        with pytest.raises(OutputError, match="cannot be written"):
            check_writable(Path("/proc/none"))

    def test_not_allowed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a stand-in: whoever runs the tests may be allowed everything."""

        def refuse(**_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
        with pytest.raises(
            OutputError, match=r"new: cannot be written \(Permission denied\); go elsewhere"
        ):
            check_writable(tmp_path / "new", "go elsewhere")
