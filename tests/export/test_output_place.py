"""Places of an export: taken, on both sides, not writable, full; and nothing is left by the look."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tood_deploy.errors import OutputError, ToodError
from tood_deploy.export import preflight as output_place
from tood_deploy.export.preflight import (
    check_artefact,
    check_inputs_stay,
    check_space,
    check_writable,
)

MIB = 2**20


class TestArtefact:
    def test_a_new_one_and_one_of_ours(self, tmp_path: Path) -> None:
        check_artefact(tmp_path / "no" / "folder" / "a.onnx", (".onnx",), "onnx")
        (tmp_path / "a.onnx").touch()
        (tmp_path / "a.json").write_text(json.dumps({"format": 0, "preset": {}}))
        check_artefact(tmp_path / "a.onnx", (".onnx",), "onnx")
        check_artefact(tmp_path / "a.ONNX", (".onnx",), "onnx")

    @pytest.mark.parametrize("content", ["", "[]", "{", '{"images": [], "format": 1}', "\udc80"])
    def test_json_of_something_else(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(OutputError, match=r"a\.json: is no manifest of tood-export"):
            check_artefact(tmp_path / "a.onnx", (".onnx",), "onnx")

    def test_weights_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").touch()
        check_artefact(tmp_path / "a.onnx", (".onnx",), "onnx")
        with pytest.raises(OutputError, match=r"a\.bin: belongs to no \.xml"):
            check_artefact(tmp_path / "a.xml", (".xml",), "openvino")
        (tmp_path / "a.xml").touch()
        check_artefact(tmp_path / "a.xml", (".xml",), "openvino")

    def test_another_name_is_proposed(self, tmp_path: Path) -> None:
        (tmp_path / "a.onnx").touch()
        with pytest.raises(ToodError, match=r"such as \S+a-openvino\.xml"):
            check_artefact(tmp_path / "a.xml", (".xml",), "openvino")


def test_inputs_stay(tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to(tmp_path / "source.onnx")
    check_inputs_stay([tmp_path / "a", tmp_path / "b"], [tmp_path / "c"])
    with pytest.raises(OutputError, match=r"link\.onnx: is an input"):
        check_inputs_stay([tmp_path / "a", tmp_path / "link.onnx"], [tmp_path / "source.onnx"])
    with pytest.raises(OutputError, match="two results"):
        check_inputs_stay([tmp_path / "a", tmp_path / "b" / ".." / "a"], [])


class TestWritable:
    def test_what_is_there_already(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert check_writable(tmp_path, "") == tmp_path
        assert check_writable(tmp_path / "new" / "folder", "") == tmp_path
        monkeypatch.chdir(tmp_path)
        assert check_writable(Path("new/folder"), "").samefile(tmp_path)
        assert check_writable(Path(), "") == Path()
        assert not list(tmp_path.iterdir())

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match=r"file is a file; go elsewhere"):
            check_writable(tmp_path / "file" / "new", "go elsewhere")

    def test_not_allowed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a stand-in: whoever runs the tests may be allowed everything."""

        def refuse(**_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(output_place.tempfile, "TemporaryFile", refuse)
        with pytest.raises(
            OutputError, match=r"new: cannot be written \(Permission denied\); go elsewhere"
        ):
            check_writable(tmp_path / "new", "go elsewhere")


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path, 0)
    monkeypatch.setattr(
        output_place.shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * MIB)
    )
    check_space(tmp_path, 36 * MIB)
    with pytest.raises(OutputError, match="100 MiB are free, and this export needs about 101"):
        check_space(tmp_path, 37 * MIB)
