"""Engines of .onnx artefacts: what is written, what is refused, and that nothing is left behind."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
from export.small_graph import MACS_A_PIXEL, save_small
from manifest_values import plain

from tood_deploy.engines.tensorrt.library import Flavour, Name, load_flavour
from tood_deploy.errors import ArtefactError, DeviceError, OutputError, ToodError
from tood_deploy.export.precision.convert import lower_artefact
from tood_deploy.export.precision.half import lower_precision
from tood_deploy.export.precision.quantize import calibrated_values, quantize
from tood_deploy.export.tensorrt.layers import shares
from tood_deploy.export.tensorrt.options import EngineOptions, Nms, Profiles
from tood_deploy.export.tensorrt.to_tensorrt import BuiltEngine, engine_from_onnx, engine_target
from tood_deploy.export.to_onnx import onnx_from_model
from tood_deploy.files import file_sha256
from tood_deploy.manifest import Manifest, manifest_path, read_manifest
from tood_deploy.manifest_sections import Parity, SelfTest, SelfTestCase
from tood_deploy.onnx_file import OnnxArtefact, artefact_in_memory, read_onnx

pytest.importorskip("tensorrt_rtx")


PROFILES = Profiles(((64, 96),), (1, 1, 2))
SELF_TEST = SelfTest("iVBO", 0.6, "a reference", (SelfTestCase((64, 96), 0.3, (), (), ()),))
LOOP = {"TRIP_LIMIT", "RECURRENCE", "ITERATOR", "LOOP_OUTPUT"}  # what the library makes of one
PLAN_START = b"vtrt"  # of every plan of TensorRT-RTX


def build(source: Path | OnnxArtefact, output: Path, **options: Any) -> BuiltEngine:
    """Of a graph that has no suppression, where `options` say nothing else."""
    defaults = {
        "profiles": PROFILES,
        "flavour": "tensorrt_rtx",
        "options": EngineOptions(nms="loop"),
    }
    return engine_from_onnx(source, output, **defaults | options)


class TestArtefact:
    def test_a_pristine_plan_and_its_manifest(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        source = save_small(tmp_path / "a.onnx", "fp16")
        output = tmp_path / "out" / "a.engine"
        built = build(source, output, self_test=SELF_TEST, rebuild="tood-export a.onnx --to engine")
        manifest = built.manifest
        assert read_manifest(output) == manifest
        assert sorted(path.name for path in output.parent.iterdir()) == ["a.engine", "a.json"]
        assert output.read_bytes().startswith(PLAN_START)
        assert (manifest.artefact_sha256, built.size_bytes) == (
            file_sha256(output),
            output.stat().st_size,
        )
        assert (manifest.precision, manifest.preset.name, manifest.checkpoint_sha256) == (
            "fp16",
            "tiny",
            "c" * 64,
        )
        assert manifest.self_test == SELF_TEST
        assert plain(manifest)["options"]["format"] == "engine"
        assert plain(manifest)["options"]["onnx_sha256"] == file_sha256(source)
        assert plain(manifest)["options"]["rebuild"] == "tood-export a.onnx --to engine"
        assert plain(manifest)["options"]["precisions"]["fp16"]["arithmetic"] == 1.0
        assert manifest.versions.keys() == {"onnx", "tood_deploy", "tensorrt_rtx"}
        assert plain(manifest)["target"]["version"] == manifest.versions["tensorrt_rtx"]
        assert plain(manifest)["target"]["profiles"] == [
            profile.to_dict() for profile in PROFILES.for_manifest()
        ]
        assert capfd.readouterr() == ("", "")

    def test_sizes_follow_the_model_where_not_given(self, tmp_path: Path) -> None:
        built = build(save_small(tmp_path / "a.onnx"), tmp_path / "a-trt.engine", profiles=None)
        assert [profile["size_hw"] for profile in plain(built.manifest)["target"]["profiles"]] == [
            [256, 320],
            [320, 256],
        ]
        assert shares(built.layers.network)["fp32"].macs == MACS_A_PIXEL * 256 * 320

    def test_parity_of_the_onnx_is_named_as_such(self, tmp_path: Path) -> None:
        source = save_small(tmp_path / "a.onnx")
        assert build(source, tmp_path / "b.engine").manifest.parity is None
        verified = replace(read_onnx(source).manifest, parity=Parity(images=12)).with_artefact(
            source
        )
        manifest_path(source).write_text(verified.to_json())
        parity = build(source, tmp_path / "b.engine").manifest.parity
        compared = "the ONNX artefact that this engine was built from"
        assert parity == Parity(images=12, compared=compared)

    def test_options_are_remembered(self, tmp_path: Path) -> None:
        options = EngineOptions(workspace_mib=64, compute_capabilities=("8.9",), nms="loop")
        manifest = build(
            save_small(tmp_path / "a.onnx"), tmp_path / "b.plan", options=options
        ).manifest
        assert (plain(manifest)["options"]["workspace_mib"], plain(manifest)["options"]["nms"]) == (
            64,
            "loop",
        )
        assert plain(manifest)["target"]["compute_capabilities"] == ["8.9"]


def test_torch_is_loaded_for_suppression_without_a_loop_alone() -> None:
    code = "import sys, tood_deploy.export.tensorrt.to_tensorrt, tood_deploy.export.tensorrt.shapes; sys.exit('torch' in sys.modules)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestRefusals:
    @pytest.fixture
    def old(self, tmp_path: Path) -> Path:
        """An engine that is there already, with a manifest."""
        path = tmp_path / "out" / "b.engine"
        path.parent.mkdir()
        path.write_bytes(b"old plan")
        manifest_path(path).write_text("old manifest")
        return path

    def check_old(self, old: Path) -> None:
        assert (old.read_bytes(), manifest_path(old).read_text()) == (b"old plan", "old manifest")
        assert len(list(old.parent.iterdir())) == 2

    def test_a_precision_that_is_not_there_leaves_the_old_engine(
        self, old: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(
            ArtefactError, match=r"fp16 was asked for and no arithmetic .* \(found: fp32 100%\)"
        ):
            build(save_small(tmp_path / "a.onnx", "fp32", stated="fp16"), old)
        self.check_old(old)

    def test_a_full_disk_leaves_the_old_engine(
        self, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(self: Manifest, path: Path) -> Manifest:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Manifest, "with_artefact", full_disk)
        with pytest.raises(OutputError, match="No space left"):
            build(save_small(tmp_path / "a.onnx"), old)
        self.check_old(old)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("b.trt", {}, r"expected a name ending in \.engine or \.plan"),
            (
                "a.engine",
                {},
                r"its manifest a\.json would replace that of a\.onnx; give another "
                r"--output, such as .*a-trt\.engine",
            ),
            ("b.engine", {"flavour": "trt"}, "TensorRT flavour is 'trt'"),
            (
                "b.engine",
                {"options": EngineOptions(timing_cache=Path("cache"))},
                "--timing-cache means nothing to TensorRT-RTX",
            ),
            (
                "b.engine",
                {"options": EngineOptions(compute_capabilities=("1.0",), nms="loop")},
                r"compute capability 1\.0",
            ),
            (
                "b.engine",
                {"options": EngineOptions()},
                "holds suppression .* 0 times, expected once; .*--nms loop",
            ),
        ],
    )
    def test_wrong_use(
        self, name: str, options: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        source = save_small(tmp_path / "a.onnx")
        with pytest.raises(ToodError, match=message):
            build(source, tmp_path / name, **options)
        assert list(tmp_path.iterdir()) == [source]

    @pytest.mark.parametrize(
        ("installed", "error", "message"),
        [
            ((), DeviceError, "neither TensorRT nor TensorRT-RTX is installed"),
            (
                ("tensorrt", "tensorrt_rtx"),
                ToodError,
                "both tensorrt and tensorrt_rtx are installed; say which of the two",
            ),
        ],
    )
    def test_no_tensorrt_or_both(
        self,
        installed: tuple[str, ...],
        error: type[ToodError],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        source = save_small(tmp_path / "a.onnx")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
        with pytest.raises(error, match=message):
            build(source, tmp_path / "b.engine", flavour=None)
        assert list(tmp_path.iterdir()) == [source]


class TestTiny:
    """The real graph, at a small size."""

    def check(
        self, source: Path | OnnxArtefact, precision: str, tmp_path: Path, nms: Nms = "unrolled"
    ) -> None:
        built = build(source, tmp_path / "model.engine", options=EngineOptions(nms=nms))
        assert built.manifest.precision == precision
        layers = [layer for layer in built.layers.network if layer.kind == "CONVOLUTION"]
        assert shares(layers)[precision].mac_share > 0.85
        assert built.size_bytes > 1_000_000
        assert plain(built.manifest)["options"]["nms"] == nms
        assert ("nms_rounds" in plain(built.manifest)["options"]) == (nms == "unrolled")
        assert bool(LOOP & {layer.kind for layer in built.layers.network}) == (nms == "loop")

    def test_fp32(self, tiny_artefact: Path, tmp_path: Path) -> None:
        self.check(tiny_artefact, "fp32", tmp_path)

    @pytest.mark.slow
    def test_with_the_loop_of_the_onnx(self, tiny_artefact: Path, tmp_path: Path) -> None:
        self.check(tiny_artefact, "fp32", tmp_path, nms="loop")

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_half_precision(
        self, precision: Literal["fp16", "bf16"], tiny_artefact: Path, tmp_path: Path
    ) -> None:
        self.check(lower_artefact(read_onnx(tiny_artefact), precision), precision, tmp_path)

    @pytest.mark.slow
    def test_int8(self, tiny_artefact: Path, tmp_path: Path) -> None:
        artefact = read_onnx(tiny_artefact)
        ranges = dict.fromkeys(
            calibrated_values(artefact.model), (-4.0, 4.0)
        )  # a build does not look at them
        model, _ = lower_precision(quantize(artefact.model, ranges, scheme="s8s8"), "fp16")
        manifest = replace(artefact.manifest, precision="int8")
        self.check(artefact_in_memory(artefact.path, model, manifest), "int8", tmp_path)

    @pytest.mark.slow
    def test_deformable_convolutions_as_gathers(
        self, seeded_model: Callable[..., Any], tmp_path: Path
    ) -> None:
        model = seeded_model("tiny", deform_tower=1)
        exported = onnx_from_model(model, deform="gather")
        artefact = artefact_in_memory(Path("a.onnx"), exported, Manifest(model.preset))
        self.check(artefact, "fp32", tmp_path)

    def test_ctrl_c_leaves_nothing(self, tiny_artefact: Path, tmp_path: Path) -> None:
        source = Path(shutil.copy(tiny_artefact, tmp_path / "a.onnx"))
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            build(source, tmp_path / "out" / "b.engine")
        assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


TARGET_PROFILES = Profiles(((64, 96),), (1, 2, 4))


def target(name: str, **options: Any) -> dict[str, Any]:
    flavour = Flavour(cast(Name, name), None, "1.7.1", cast(Any, None))
    built: Any = engine_target(flavour, TARGET_PROFILES, EngineOptions(**options))
    return built.to_dict()


def test_rtx_is_for_ampere_and_later_unless_told() -> None:
    found = target("tensorrt_rtx")
    assert found["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0"]
    assert found["later_compute_capabilities"]
    assert (found["flavour"], found["version"]) == ("tensorrt_rtx", "1.7.1")
    assert found["platform"].startswith(sys.platform)
    assert found["profiles"] == [{"size_hw": [64, 96], "batch": [1, 2, 4]}]
    chosen = target("tensorrt_rtx", compute_capabilities=("8.9",))
    assert (chosen["compute_capabilities"], chosen["later_compute_capabilities"]) == (
        ["8.9"],
        False,
    )


def test_rtx_beside_a_gpu_it_does_not_know_faked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is here and named by nobody is refused; a named one is built for."""
    library = load_flavour("tensorrt_rtx")
    seen = [("NVIDIA H200", "9.0")]
    device: Any = SimpleNamespace(visible_gpu=lambda: seen[0])
    monkeypatch.setitem(sys.modules, "tood_deploy.engines.tensorrt.cuda", device)
    with pytest.raises(DeviceError, match=r"NVIDIA H200 has .* 9\.0.*--compute-capability"):
        engine_target(library, TARGET_PROFILES, EngineOptions())
    named = engine_target(library, TARGET_PROFILES, EngineOptions(compute_capabilities=("8.9",)))
    assert named.compute_capabilities == ("8.9",)
    seen[0] = ("NVIDIA L4", "8.9")
    engine_target(library, TARGET_PROFILES, EngineOptions())


class TestTensorRT:
    def test_the_gpu_of_this_machine_faked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        closed = []
        gpu = SimpleNamespace(
            name="NVIDIA H200", compute_capability="9.0", close=lambda: closed.append(True)
        )
        driver = SimpleNamespace(cuDriverGetVersion=lambda: 12080)
        device: Any = SimpleNamespace(
            Gpu=lambda: gpu, call=lambda function: function(), driver=driver
        )
        monkeypatch.setitem(sys.modules, "tood_deploy.engines.tensorrt.cuda", device)
        found = target("tensorrt")
        assert found["driver"] == "CUDA 12.8"
        assert (
            found["compute_capabilities"],
            found["later_compute_capabilities"],
            found["gpu"],
        ) == (["9.0"], False, "NVIDIA H200")
        assert (found["hardware_compatibility"], found["version_compatible"]) == ("none", False)
        assert closed == [True]
        wide = target("tensorrt", hardware_compatible=True, version_compatible=True)
        assert wide["later_compute_capabilities"]
        assert (wide["hardware_compatibility"], wide["version_compatible"]) == ("ampere_plus", True)

    def test_no_gpu_is_an_error_faked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse() -> None:
            raise DeviceError("no NVIDIA driver")

        device: Any = SimpleNamespace(Gpu=refuse, call=None, driver=None)
        monkeypatch.setitem(sys.modules, "tood_deploy.engines.tensorrt.cuda", device)
        with pytest.raises(DeviceError, match="no NVIDIA driver"):
            target("tensorrt")
