"""Artefacts for other image sizes than they were exported for."""

from dataclasses import replace

from tood_deploy.onnx_file import OnnxArtefact, artefact_in_memory


def for_size(artefact: OnnxArtefact, imgsz: tuple[int, int]) -> OnnxArtefact:
    """Return the same graph, whose manifest states another image size."""
    preset = replace(artefact.manifest.preset, imgsz=imgsz)
    manifest = replace(artefact.manifest, preset=preset)
    return artefact_in_memory(artefact.path, artefact.model, manifest)
