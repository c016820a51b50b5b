"""Kept graphs: what a fresh export gives to the bit, never used where anything differs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from tood_deploy.export import graph_cache
from tood_deploy.export.graph import DeformForm
from tood_deploy.export.graph_cache import (
    MAX_FILES,
    Skeleton,
    Source,
    describe,
    graph_of,
    keep_skeleton,
    path_of,
    read_skeleton,
    with_stand_in_classes,
)
from tood_deploy.export.to_onnx import onnx_from_model
from tood_deploy.model import build_model, load_checkpoint
from tood_deploy.model.detector import DenseDetector
from tood_deploy.presets import PRESETS

TINY = PRESETS["tiny"]
SMALL_DCN = {"depth": 50, "base_channels": 16, "deform_stages": (3, 4), "deform_tower": 1}
VARIANTS: dict[str, tuple[dict[str, Any], DeformForm]] = {
    "deformable as operator, seven classes, ResNeXt": (
        SMALL_DCN | {"groups": 4, "class_names": tuple("abcdefg")},
        "op",
    ),
    "deformable as gathers, anchor-based, authors, BGR": (
        SMALL_DCN
        | {
            "anchor": "based",
            "convention": "authors",
            "channel_order": "bgr",
            "pad_value": (0.0, 0.1, 0.2),
        },
        "gather",
    ),
}


def bytes_of(graph: onnx.ModelProto) -> bytes:
    return graph.SerializeToString(deterministic=True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, without any graph."""
    monkeypatch.setenv("TOOD_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[DenseDetector]:
    """The networks that the exporter was given; it gives but an empty graph in return."""
    given: list[DenseDetector] = []

    def export(model: DenseDetector, **options: object) -> onnx.ModelProto:
        given.append(model)
        return onnx.ModelProto(ir_version=10)

    monkeypatch.setattr(graph_cache, "onnx_from_model", export)
    monkeypatch.setattr(graph_cache, "_find_sources", lambda *_: {})
    return given


class TestFilling:
    @pytest.mark.slow
    def test_gives_a_fresh_export_to_the_bit(self, tiny_checkpoint: Path) -> None:
        model = load_checkpoint(tiny_checkpoint)
        said: list[str] = []
        first = graph_of(model, deform="op", max_det=100, say=said.append)
        said.clear()
        again = graph_of(model, deform="op", max_det=100, say=said.append)
        assert said == ["filling the one that an earlier export made of this configuration"]
        assert bytes_of(first) == bytes_of(again) == bytes_of(onnx_from_model(model))

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_gives_a_fresh_export_of_other_networks(
        self, variant: str, seeded_model: Callable[..., DenseDetector]
    ) -> None:
        fields, deform = VARIANTS[variant]
        model = seeded_model("tiny", **fields).eval()
        filled = graph_of(model, deform=deform, max_det=50)
        assert bytes_of(filled) == bytes_of(onnx_from_model(model, deform=deform, max_det=50))

    def test_follows_the_weights_and_not_their_coincidences(self) -> None:
        """Fresh biases are zero, scales one, norms all alike: an optimiser would join them."""
        graph = graph_of(build_model("tiny"), deform="op", max_det=100)
        weights = {
            tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer
        }
        head = "detector.model.bbox_head"
        assert {float(weights[f"{head}.scales.{level}.scale"]) for level in range(5)} == {1.0}
        assert not weights[f"{head}.tood_reg.bias"].any()
        assert all(tensor.HasField("raw_data") for tensor in graph.graph.initializer)

    def test_another_kind_of_number_is_refused(self) -> None:
        graph = onnx.ModelProto()
        graph.graph.initializer.add(name="w", dims=[3], data_type=onnx.TensorProto.FLOAT)
        skeleton = Skeleton(graph, {"w": Source("detector.mean")}, 80)
        assert skeleton.filled(build_model("tiny"), "op", 100).graph.initializer[0].raw_data
        with pytest.raises(AssertionError, match="float64"):
            Skeleton(graph, {"w": Source("detector.model.bbox_head.scales.0.scale")}, 80).filled(
                build_model("tiny").double(), "op", 100
            )


class TestKey:
    @pytest.mark.parametrize(
        "fields",
        [
            {"convention": "authors"},
            {"candidates_per_level": 500},
            {"norm_eps": 1e-3},
            {"batch_norm_eps": 1e-3},
            {"channel_order": "bgr"},
            {"delta_means": (0.0, 0.1, 0.0, 0.0)},
        ],
    )
    def test_differs_where_the_graph_does(self, fields: dict[str, Any]) -> None:
        assert describe(replace(TINY, **fields), "op", 100) != describe(TINY, "op", 100)

    def test_differs_by_rows_and_form_of_deformable_convolutions(self) -> None:
        deformable = PRESETS["r101-dcn-2x"]
        assert describe(TINY, "op", 100) != describe(TINY, "op", 99)
        assert describe(deformable, "op", 100) != describe(deformable, "gather", 100)
        assert describe(TINY, "op", 100) == describe(TINY, "gather", 100)

    def test_differs_by_classes_only_where_their_number_decides_how_many_candidates_there_are(
        self,
    ) -> None:
        few, authors = {"class_names": ("a", "b")}, replace(TINY, convention="authors")
        assert with_stand_in_classes(replace(TINY, **few)) == with_stand_in_classes(TINY)
        assert with_stand_in_classes(authors).num_classes == graph_cache.CLASSES
        assert with_stand_in_classes(replace(authors, **few)).num_classes == 2
        paa = PRESETS["tiny-paa"]
        assert with_stand_in_classes(paa).num_classes == graph_cache.CLASSES
        assert with_stand_in_classes(replace(paa, **few)).num_classes == 2

    def test_is_the_same_for_what_does_not_reach_the_graph(self) -> None:
        other = replace(
            TINY,
            name="custom",
            class_names=tuple(map(str, range(80))),
            imgsz=(320, 320),
            mean=(1.0, 2.0, 3.0),
            score_threshold=0.3,
        )
        assert describe(other, "op", 100) == describe(TINY, "op", 100)

    def test_differs_by_versions_and_sources(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = describe(TINY, "op", 100)
        with monkeypatch.context() as patch:
            patch.setattr(graph_cache, "version", lambda package: "0.0")
            assert describe(TINY, "op", 100) != before
        monkeypatch.setattr(graph_cache, "SOURCES_SHA256", "edited")
        assert describe(TINY, "op", 100) != before

    def test_every_source_that_the_graph_is_made_by_counts(self) -> None:
        package = Path(graph_cache.__file__).parents[1]
        files = {
            file.relative_to(package).as_posix()
            for pattern in graph_cache.SOURCES
            for file in package.glob(pattern)
        }
        assert {
            "model/head.py",
            "model/nms.py",
            "model/postprocess.py",
            "export/graph.py",
            "export/to_onnx.py",
        } <= files


class TestKeeping:
    def test_exports_a_configuration_once(self, home: Path, exports: list[DenseDetector]) -> None:
        for _ in range(2):
            graph_of(build_model("tiny"), deform="op", max_det=100)
        assert len(exports) == 1
        graph_of(build_model("tiny"), deform="op", max_det=50)
        assert len(exports) == 2
        assert len(list((home / "graphs").iterdir())) == 2

    def test_stand_in_weights_leave_random_numbers_alone(
        self, home: Path, exports: list[DenseDetector]
    ) -> None:
        model, state = build_model("tiny"), torch.random.get_rng_state()
        graph_of(model, deform="op", max_det=100)
        assert torch.equal(state, torch.random.get_rng_state())

    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: b"",
            lambda content: content[:-1],
            lambda content: content[:70],
            lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
            lambda content: b"not a graph at all",
        ],
    )
    def test_a_damaged_graph_is_made_again_and_said(
        self, damage: Callable[[bytes], bytes], home: Path, exports: list[DenseDetector]
    ) -> None:
        graph_of(build_model("tiny"), deform="op", max_det=100)
        (file,) = (home / "graphs").iterdir()
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        said: list[str] = []
        graph_of(build_model("tiny"), deform="op", max_det=100, say=said.append)
        assert len(exports) == 2
        assert str(file) in said[0]
        assert file.read_bytes() == whole

    def test_a_graph_of_another_description_is_not_used(self, home: Path) -> None:
        skeleton, said = (
            Skeleton(onnx.ModelProto(ir_version=10), {"w": Source("a", "b", True, 0.5)}, 7),
            [],
        )
        path = path_of("one")
        keep_skeleton(path, "one", skeleton, said.append)
        kept = read_skeleton(path, "one", said.append)
        assert kept is not None
        assert (kept.sources, kept.classes, said) == (skeleton.sources, 7, [])
        assert read_skeleton(path, "other", said.append) is None
        assert said

    def test_a_home_that_cannot_be_written_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exports: list[DenseDetector]
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("TOOD_HOME", str(tmp_path / "file"))
        said: list[str] = []
        graph_of(build_model("tiny"), deform="op", max_det=100, say=said.append)
        assert "TOOD_HOME" in said[-1]
        assert "--output" not in said[-1]

    def test_only_so_many_are_kept(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert MAX_FILES >= 20  # all published configurations in both forms
        monkeypatch.setattr(graph_cache, "MAX_FILES", 2)
        skeleton = Skeleton(onnx.ModelProto(ir_version=10), {}, 7)
        for number, name in enumerate(("first", "second", "third")):
            keep_skeleton(path_of(name), name, skeleton, print)
            if path_of(name).exists():
                import os

                os.utime(path_of(name), (number, number))
        keep_skeleton(path_of("third"), "third", skeleton, print)
        assert {file.name for file in (home / "graphs").iterdir()} == {
            path_of("second").name,
            path_of("third").name,
        }


class TestUnknownWeights:
    def test_a_weight_that_became_something_else_is_exported_with_the_graph(
        self, home: Path, exports: list[DenseDetector], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lose(*_: object) -> None:
            raise graph_cache.UnknownWeight("w")

        monkeypatch.setattr(graph_cache, "_find_sources", lose)
        model, said = build_model("tiny"), []
        graph_of(model, deform="op", max_det=100, say=said.append)
        assert exports[-1] is model
        assert "cannot be kept" in said[-1]
        assert not (home / "graphs").exists()
