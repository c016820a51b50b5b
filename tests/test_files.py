"""Hashes, and files that are written whole or not at all."""

import hashlib
import os
import stat
from pathlib import Path

import pytest

from tood_deploy import files
from tood_deploy.errors import OutputError
from tood_deploy.files import atomic_path, atomic_paths, file_sha256


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
