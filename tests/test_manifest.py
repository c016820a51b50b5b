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
        ({"parity": {"benchmark": 0}}, "benchmark"),
        ({"max_det": 0}, "max_det"),
        ({"max_det": 10**9}, "max_det"),
        ({"max_det": None}, "max_det"),
        ({"precision": -1}, "precision"),
        ({"precision": "int4"}, "precision"),
        ({"versions": []}, "versions"),
        ({"created": {}}, "created"),
        ({"preset": None}, "preset"),
        ({"options": {"opset": "21"}}, "opset"),
        ({"target": {"profiles": []}}, "target"),
    ],
)
def test_a_damaged_section_is_named(fields: dict[str, Any], key: str) -> None:
    values = plain(stated()) | fields
    with pytest.raises(ArtefactError, match=rf"^a.json: .*{key}.*export the model again"):
        Manifest.from_json(json.dumps(values), "a.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("imgsz", [60000, 60000]),
        ("imgsz", ["800", 1333]),
        ("imgsz", [800]),
        ("class_names", "cat"),
        ("class_names", [["cat"]]),
        ("depth", None),
        ("channels", 10**12),
        ("mean", [0, 0, float("inf")]),
        ("std", [1, 1, float("nan")]),
        ("max_det", -5),
        ("iou_threshold", 10**400),
        ("canvas_hw", [60000, 32]),
    ],
)
def test_a_damaged_preset_is_named(field: str, value: object) -> None:
    values = plain(stated())
    values["preset"][field] = value
    with pytest.raises(ArtefactError, match=rf"^a.json: .*{field}.*export the model again"):
        Manifest.from_json(json.dumps(values), "a.json")


CASE = {"net_hw": [64, 96], "score_threshold": 0.1, "boxes": [[0, 0, 9, 9]], "scores": [0.5]}


@pytest.mark.parametrize(
    "change",
    [
        {"labels": []},
        {"labels": [-1]},
        {"labels": ["0"]},
        {"scores": [float("nan")]},
        {"scores": [None]},
        {"boxes": [[0, 0, 9]]},
        {"boxes": [[0, 0, 9, float("inf")]]},
        {"net_hw": [60, 96]},
        {"net_hw": [64, 2**20]},
        {"score_threshold": True},
    ],
)
def test_a_damaged_self_test_is_named(change: dict[str, Any]) -> None:
    test = {"picture_png": "iVBO", "iou_threshold": 0.6, "reference": "PyTorch"}
    right = test | {"cases": [CASE | {"labels": [0]}]}
    assert stated(self_test=right).self_test is not None
    wrong = plain(stated()) | {"self_test": test | {"cases": [CASE | {"labels": [0]} | change]}}
    with pytest.raises(ArtefactError, match=r"^a.json: .*self_test\.cases.*export the model again"):
        Manifest.from_json(json.dumps(wrong), "a.json")


def test_other_numbers_than_those_of_the_graph_are_refused() -> None:
    with pytest.raises(ArtefactError, match=r"states 50 rows .* has 100"):
        replace(stated(), max_det=50).check_outputs(stated(), "a.json")
    fewer = replace(stated(), preset=replace(stated().preset, class_names=("a", "b")))
    with pytest.raises(ArtefactError, match=r"states 2 class names.* has 80"):
        fewer.check_outputs(stated(), "a.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 2}', "[" * 100_000, "null", '"a"', "\x00"]
)
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
