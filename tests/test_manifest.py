"""What an artefact says of itself: its sections, manifests of earlier versions, hashes."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from manifest_values import plain, stated

from tood_deploy.errors import ArtefactError
from tood_deploy.manifest import (
    Manifest,
    artefact_sha256,
    doubts,
    manifest_path,
    neighbour,
    read_manifest,
    saturating_weights,
)
from tood_deploy.manifest_sections import BenchmarkVerdict, Parity

# Written by version 0.1.0, and by the code before manifests had typed sections; class names and
# self-tests are cut short.
STORED = sorted((Path(__file__).parent / "manifests").glob("*/*.json"))
KINDS = {"bf16", "engine", "int8", "onnx", "openvino", "triton"}


def read(path: Path) -> Manifest:
    return Manifest.from_json(path.read_text(encoding="utf-8"), path.name)


def test_there_is_one_of_every_kind() -> None:
    assert {path.stem for path in STORED} == KINDS
    assert len(STORED) == 2 * len(KINDS)


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}-{path.stem}")
class TestEarlierManifests:
    def test_they_are_written_back_whole(self, path: Path) -> None:
        """So earlier versions read what is written now, too."""
        now, before = plain(read(path)), json.loads(path.read_text(encoding="utf-8"))
        # Fields that presets got since then have the values that all of them had.
        now["preset"] = {key: now["preset"][key] for key in before["preset"]}
        assert now == before

    def test_their_sections_are_typed(self, path: Path) -> None:
        manifest, kind = read(path), path.stem
        assert manifest.build.format == {"openvino": "openvino", "engine": "engine"}.get(
            kind, "onnx"
        )
        assert manifest.build.opset in (21, 22)
        assert (manifest.build.serving is not None) == (kind == "triton")
        assert (manifest.self_test is None) == (kind == "triton")
        assert (manifest.target is not None) == (kind == "engine")
        assert (manifest.build.int8_scheme in ("u8s7", "u8s8")) == (kind == "int8")
        assert (manifest.build.half.precision if manifest.build.half else "") == (
            "bf16" if kind == "bf16" else ""
        )
        assert manifest.parity is not None
        assert manifest.parity.images > 0
        assert ("the ONNX artefact" in manifest.parity.compared) == (kind in ("engine", "triton"))
        assert (manifest.parity.onnx is not None) == (kind == "openvino")


@pytest.mark.parametrize("path", [path for path in STORED if path.stem == "engine"])
def test_an_engine_has_its_target(path: Path) -> None:
    target = read(path).target
    assert target is not None
    assert (target.flavour, target.later_compute_capabilities) == ("tensorrt_rtx", True)
    (profile,) = target.profiles
    assert profile.size_hw == (64, 96)
    assert (profile.min_batch, profile.opt_batch, profile.max_batch) == (1, 1, 8)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"self_test": {"cases": 3}}, "self_test"),
        ({"target": {"flavour": "tensorrt"}}, "target"),
        ({"options": {"int8": 5}}, "options"),
        ({"options": {"half_precision": {"kept": {}}}}, "options"),
        ({"parity": [1]}, "parity"),
    ],
)
def test_a_damaged_section_is_named(fields: dict[str, Any], key: str) -> None:
    values = plain(stated()) | fields
    with pytest.raises(ArtefactError, match=f"^a.json: {key} is damaged.*export the model again"):
        Manifest.from_json(json.dumps(values), "a.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 2}'])
def test_what_is_no_manifest_of_this_version(text: str) -> None:
    with pytest.raises(ArtefactError, match=r"manifest.*export the model again"):
        Manifest.from_json(text, "a.json")


def test_unknown_values_of_a_section_stay() -> None:
    """Of a version to come, or of a report that only people read."""
    values = plain(stated()) | {
        "options": {"opset": 21, "new": [1]},
        "parity": {"images": 2, "figures": {"a": 1.0}, "benchmark": {"passed": False}},
    }
    assert plain(Manifest.from_json(json.dumps(values), "a.json")) == values


@pytest.mark.parametrize("key", ["int8", "autotune"])
@pytest.mark.parametrize(("scheme", "saturates"), [("u8s8", True), ("s8s8", True), ("u8s7", False)])
def test_weights_that_saturate(key: str, scheme: str, saturates: bool) -> None:
    assert saturating_weights(stated("int8", options={key: {"scheme": scheme}})) == saturates
    assert not saturating_weights(stated("fp32", options={key: {"scheme": scheme}}))


class TestDoubts:
    @pytest.fixture
    def artefact(self, tmp_path: Path) -> Path:
        path = tmp_path / "model.onnx"
        path.write_bytes(b"an artefact")
        return path

    def test_of_what_was_never_compared(self, artefact: Path) -> None:
        assert "no parity verdict" in doubts(artefact, stated())

    def test_of_another_file(self, artefact: Path) -> None:
        proven = replace(stated(), parity=Parity(images=1)).with_artefact(artefact)
        assert doubts(artefact, proven) == ""
        artefact.write_bytes(b"another")
        assert "another SHA-256" in doubts(artefact, proven)

    @pytest.mark.parametrize("stage", ["head", None])
    def test_of_what_a_benchmark_found(self, artefact: Path, stage: str | None) -> None:
        parity = Parity(benchmark=BenchmarkVerdict({"failing_stage": stage}))
        found = doubts(artefact, replace(stated(), parity=parity))
        assert ("at the stage head" in found) == (stage is not None)


class TestFiles:
    def test_the_manifest_beside_an_artefact(self, tmp_path: Path) -> None:
        artefact = tmp_path / "a.onnx"
        assert read_manifest(artefact) is None
        manifest_path(artefact).write_text(stated("fp16").to_json())
        assert read_manifest(artefact) == stated("fp16")

    def test_another_artefact_with_the_same_manifest(self, tmp_path: Path) -> None:
        assert neighbour(tmp_path / "a.engine") is None
        (tmp_path / "a.onnx").write_bytes(b"x")
        assert neighbour(tmp_path / "a.engine") == tmp_path / "a.onnx"

    def test_the_hash_of_an_ir_is_over_both_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.xml").write_bytes(b"graph")
        with pytest.raises(ArtefactError, match=r"a\.bin: is missing"):
            artefact_sha256(tmp_path / "a.xml")
        (tmp_path / "a.bin").write_bytes(b"weights")
        assert artefact_sha256(tmp_path / "a.xml") == hashlib.sha256(b"graphweights").hexdigest()
