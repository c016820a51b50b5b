"""From an .onnx artefact to OpenVINO's IR: verified, described, whole or not at all."""

import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from manifest_values import changed, plain

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import open_engine
from tood_deploy.engines.openvino_runtime import manifest_inside, shared_core
from tood_deploy.errors import ArtefactError, CheckFailed, DeviceError, OutputError, ToodError
from tood_deploy.export import to_openvino
from tood_deploy.export.to_openvino import openvino_from_onnx
from tood_deploy.manifest import Manifest, artefact_sha256, doubts, manifest_path, read_manifest
from tood_deploy.onnx_file import read_onnx
from tood_deploy.parity.reference import Reference
from tood_deploy.parity.tolerances import DETECTION_LIMITS
from tood_deploy.presets import Sizing

pytestmark = pytest.mark.usefixtures("stand_in_limits")

IMAGES = [synthetic_image(90, 120, seed) for seed in range(3)]
HAS_BF16 = "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def reference(tiny_reference: Reference) -> Reference:
    """The network, for small images."""
    return replace(tiny_reference, sizing=Sizing((96, 128)))


@pytest.fixture(scope="module")
def made(
    tiny_artefact: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    path = tmp_path_factory.mktemp("ir") / "tiny.xml"
    return path, openvino_from_onnx(tiny_artefact, path, reference=reference)


def copy(
    artefact: Path,
    folder: Path,
    change: Callable[[onnx.ModelProto], None] | None = None,
    **fields: Any,
) -> Path:
    """An artefact with another graph or manifest, which says so of itself."""
    path = folder / "source.onnx"
    shutil.copy(artefact, path)
    if change is not None:
        graph = onnx.load(path)
        change(graph)
        onnx.save(graph, path)
    manifest = read_manifest(artefact)
    assert manifest is not None
    stated = changed(manifest, **fields).with_artefact(path)
    manifest_path(path).write_text(stated.to_json())
    return path


def shift_scores(graph: onnx.ModelProto) -> None:
    for value in graph.graph.initializer:
        if "tood_cls.bias" in value.name:
            value.CopyFrom(
                onnx.numpy_helper.from_array(
                    onnx.numpy_helper.to_array(value) * np.float32(1.001), value.name
                )
            )


class TestMade:
    def test_three_files_and_nothing_else(self, made: tuple[Path, Manifest]) -> None:
        assert sorted(path.name for path in made[0].parent.iterdir()) == [
            "tiny.bin",
            "tiny.json",
            "tiny.xml",
        ]

    def test_manifest_describes_it(self, made: tuple[Path, Manifest], tiny_artefact: Path) -> None:
        path, manifest = made
        source = read_manifest(tiny_artefact)
        assert source is not None
        assert read_manifest(path) == manifest
        assert manifest.artefact_sha256 == artefact_sha256(path) != source.artefact_sha256
        assert (manifest.preset, manifest.checkpoint_sha256, manifest.precision) == (
            source.preset,
            source.checkpoint_sha256,
            "fp32",
        )
        assert (manifest.build.format, manifest.build.fallback_precision) == ("openvino", "fp32")
        assert manifest.versions["openvino"] == openvino.__version__
        assert doubts(path, manifest) == ""

    def test_the_file_tells_itself(self, made: tuple[Path, Manifest]) -> None:
        inside = manifest_inside(shared_core().read_model(made[0]), made[0])
        assert (inside.preset, inside.build.format) == (made[1].preset, "openvino")

    def test_verdict_is_openvinos_own_and_as_tight_as_for_onnx(
        self, made: tuple[Path, Manifest]
    ) -> None:
        parity = plain(made[1])["parity"]
        assert parity["runtime"].startswith(f"OpenVINO {openvino.__version__.split('-')[0]}, fp32")
        assert (
            0
            < max(each["rms_ratio"] for each in parity["maps"].values())
            <= parity["limits"]["rms_of_few"]
        )
        assert parity["detections"]["reference"] > 200
        assert parity["batch_slots"]["matched"] == parity["batch_slots"]["reference"]

    def test_weights_keep_their_bits(
        self, made: tuple[Path, Manifest], tiny_artefact: Path
    ) -> None:
        assert made[0].with_suffix(".bin").stat().st_size > 0.95 * tiny_artefact.stat().st_size

    def test_runs(self, made: tuple[Path, Manifest]) -> None:
        with open_engine(made[0], threads=1) as engine:
            found = engine.infer(
                synthetic_image(96, 128, 1)[None], np.array([[96, 128]], np.int32), 0.05, 0.6
            )
        assert found.num_dets[0] > 10

    @pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 instructions")
    def test_bf16_is_said_and_pinned(
        self, tiny_artefact: Path, reference: Reference, tmp_path: Path
    ) -> None:
        manifest = openvino_from_onnx(
            tiny_artefact, tmp_path / "a.xml", reference=reference, fallback="bf16", images=IMAGES
        )
        assert (manifest.precision, plain(manifest)["options"]["rest"]) == ("bf16", "bf16")
        assert 1e-5 < plain(manifest)["parity"]["score_deviation"] <= DETECTION_LIMITS["bf16"].score
        assert "bf16" in plain(manifest)["parity"]["runtime"]
        with open_engine(tmp_path / "a.xml", threads=1) as engine:
            assert engine.precision == "bf16"

    def test_quantised_weights_stay_so_beside_float32(
        self, tiny_artefact: Path, reference: Reference, tmp_path: Path
    ) -> None:
        """A float32 graph that says it is int8: only what is said of it is looked at."""
        source = copy(tiny_artefact, tmp_path, precision="int8", options={"rest": "fp32"})
        manifest = openvino_from_onnx(
            source, tmp_path / "a.xml", reference=reference, images=IMAGES
        )
        assert (manifest.precision, plain(manifest)["options"]["rest"]) == ("int8", "fp32")
        assert plain(manifest)["parity"]["limits"] == asdict(DETECTION_LIMITS["int8"])
        assert plain(manifest)["self_test"]["reference"].startswith("OpenVINO")
        assert manifest.parity.onnx == read_manifest(source).parity  # pyright: ignore[reportOptionalMemberAccess]


class TestNothingIsLeft:
    def test_after_a_failed_verification(
        self, tiny_artefact: Path, reference: Reference, tmp_path: Path
    ) -> None:
        source = copy(tiny_artefact, tmp_path, shift_scores)
        output = tmp_path / "out" / "a.xml"
        output.parent.mkdir()
        output.write_bytes(b"old")
        with pytest.raises(CheckFailed, match="head: head_scores_p3"):
            openvino_from_onnx(source, output, reference=reference)
        assert [(path.name, path.read_bytes()) for path in output.parent.iterdir()] == [
            ("a.xml", b"old")
        ]

    def test_after_an_interruption(
        self,
        tiny_artefact: Path,
        reference: Reference,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(to_openvino, "verify_float32", interrupt)
        with pytest.raises(KeyboardInterrupt):
            openvino_from_onnx(tiny_artefact, tmp_path / "a.xml", reference=reference)
        assert not list(tmp_path.iterdir())


class TestRefusals:
    def test_another_ending(
        self, tiny_artefact: Path, reference: Reference, tmp_path: Path
    ) -> None:
        with pytest.raises(ToodError, match=r"expected a name ending in \.xml"):
            openvino_from_onnx(tiny_artefact, tmp_path / "a.onnx", reference=reference)

    def test_no_manifest(self, tiny_artefact: Path, reference: Reference, tmp_path: Path) -> None:
        source = Path(shutil.copy(tiny_artefact, tmp_path / "a.onnx"))
        with pytest.raises(ArtefactError, match=r"has no manifest beside it \(a\.json\)"):
            openvino_from_onnx(source, tmp_path / "a.xml", reference=reference)

    def test_cut_source(self, tiny_artefact: Path, reference: Reference, tmp_path: Path) -> None:
        source = copy(tiny_artefact, tmp_path)
        source.write_bytes(source.read_bytes()[:100_000])
        with pytest.raises(ArtefactError, match="cut or another kind of file"):
            openvino_from_onnx(source, tmp_path / "a.xml", reference=reference)

    def test_a_place_that_cannot_be_written(
        self, tiny_artefact: Path, reference: Reference
    ) -> None:
        with pytest.raises(OutputError, match="choose another --output"):
            openvino_from_onnx(tiny_artefact, Path("/proc/nowhere/a.xml"), reference=reference)

    @pytest.mark.parametrize("size", [2000, 300_000])
    def test_a_full_disk_leaves_the_earlier_files(
        self,
        made: tuple[Path, Manifest],
        tiny_artefact: Path,
        reference: Reference,
        tmp_path: Path,
        full_disk: Callable[[int], AbstractContextManager[None]],
        size: int,
    ) -> None:
        for path in made[0].parent.iterdir():
            shutil.copy(path, tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        source = read_onnx(tiny_artefact)
        with full_disk(size), pytest.raises(OutputError, match=r"tiny\.xml: .*make room"):
            openvino_from_onnx(source, tmp_path / "tiny.xml", reference=reference)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_without_openvino(
        self,
        tiny_artefact: Path,
        reference: Reference,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(DeviceError, match="the package openvino is not installed"):
            openvino_from_onnx(tiny_artefact, tmp_path / "a.xml", reference=reference)
        assert not list(tmp_path.iterdir())
