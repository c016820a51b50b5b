"""Reading an artefact back: ours is read, all else is refused in one line."""

from pathlib import Path

import onnx
import pytest
from export.small_graph import save_small, small_graph

from tood_deploy.errors import ArtefactError, ToodError
from tood_deploy.files import file_sha256
from tood_deploy.manifest import manifest_path, read_manifest
from tood_deploy.onnx_file import read_onnx


def test_the_manifest_inside_is_read(tmp_path: Path) -> None:
    path = save_small(tmp_path / "a.onnx", "fp16")
    artefact = read_onnx(path)
    assert (artefact.manifest.precision, artefact.manifest.preset.name) == ("fp16", "tiny")
    assert artefact.sha256 == file_sha256(path)


def test_the_manifest_beside_comes_first(tmp_path: Path) -> None:
    path = save_small(tmp_path / "a.onnx", stated="fp16")
    manifest_path(path).write_text(read_onnx(path).manifest.with_artefact(path).to_json())
    read = read_manifest(path)
    assert read is not None
    assert read_onnx(path).manifest == read
    assert read.artefact_sha256


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    with pytest.raises(ToodError, match=r"a\.onnx: no such file"):
        read_onnx(path)
    path.write_text("no ONNX at all")
    with pytest.raises(ArtefactError, match="cannot be read as ONNX"):
        read_onnx(path)
    onnx.save(small_graph(), path)
    with pytest.raises(ArtefactError, match="an ONNX file, but not one of tood_deploy"):
        read_onnx(path)


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    path = save_small(tmp_path / "a.onnx")
    model = onnx.load(path)
    del model.graph.output[-1]
    onnx.save(model, path)
    with pytest.raises(ArtefactError, match=r"outputs \['num_dets', 'boxes', 'scores'\], expected"):
        read_onnx(path)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = save_small(tmp_path / "a.onnx")
    manifest_path(path).write_text(read_onnx(path).manifest.with_artefact(path).to_json())
    save_small(path, "fp16")
    with pytest.raises(ArtefactError, match="is not the file its manifest describes"):
        read_onnx(path)
