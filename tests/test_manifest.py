"""Hashes of artefacts of one and of two files, and files that are written together or not at all."""

import hashlib
from pathlib import Path

import pytest

from tood_deploy import files
from tood_deploy.errors import ArtefactError, OutputError
from tood_deploy.files import atomic_paths, file_sha256
from tood_deploy.manifest import artefact_sha256, neighbour


class TestHashes:
    def test_of_an_ir_are_over_both_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.xml").write_bytes(b"graph")
        (tmp_path / "a.bin").write_bytes(b"weights")
        assert artefact_sha256(tmp_path / "a.xml") == hashlib.sha256(b"graphweights").hexdigest()
        (tmp_path / "a.onnx").write_bytes(b"graph")
        assert artefact_sha256(tmp_path / "a.onnx") == hashlib.sha256(b"graph").hexdigest()

    def test_a_missing_half_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.xml").write_bytes(b"graph")
        with pytest.raises(
            ArtefactError, match=r"a\.bin: is missing; a\.xml consists of a\.xml and a\.bin"
        ):
            artefact_sha256(tmp_path / "a.xml")

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


def test_neighbours(tmp_path: Path) -> None:
    (tmp_path / "a.engine").touch()
    (tmp_path / "b.onnx").touch()
    assert neighbour(tmp_path / "a.onnx") == tmp_path / "a.engine"
    assert neighbour(tmp_path / "b.onnx") is None, "an artefact may replace itself"
