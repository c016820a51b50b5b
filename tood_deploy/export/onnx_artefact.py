"""Reads an .onnx artefact of ours back in, as further exports start from it; anything else is refused. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from tood_deploy.errors import ArtefactError, ToodError
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.manifest import METADATA_KEY, Manifest, file_sha256, read_manifest


@dataclass(frozen=True, eq=False)
class OnnxArtefact:
    """An .onnx file of tood-export: where it lies, its SHA-256, its graph, and what it says of itself."""

    path: Path
    sha256: str
    model: onnx.ModelProto
    manifest: Manifest


def read_onnx(path: Path) -> OnnxArtefact:
    """The artefact at `path`.

    Raises:
        ToodError: there is no such file.
        ArtefactError: not an ONNX file, not one of ours, or changed since its manifest was written.
    """
    if not path.is_file():
        raise ToodError(f"{path}: no such file; expected an .onnx file of tood-export")
    try:
        model = onnx.load(path)
    except (DecodeError, OSError, ValueError) as error:
        raise ArtefactError(f"{path}: cannot be read as ONNX, cut or another kind of file; export it again with tood-export") from error
    inside = {prop.key: prop.value for prop in model.metadata_props}.get(METADATA_KEY)
    names = [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    if inside is None or names != ([*INPUTS], [*OUTPUTS]):
        raise ArtefactError(
            f"{path}: an ONNX file, but not one of tood_deploy (inputs {names[0]}, outputs {names[1]}, expected {INPUTS} and {OUTPUTS}); "
            "make it from the checkpoint with tood-export"
        )
    beside, sha256 = read_manifest(path), file_sha256(path)
    if beside and beside.artefact_sha256 not in ("", sha256):
        raise ArtefactError(f"{path}: is not the file its manifest describes (another SHA-256); export it again with tood-export")
    return OnnxArtefact(path, sha256, model, beside or Manifest.from_json(inside, str(path)))
