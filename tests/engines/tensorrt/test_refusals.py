"""What the TensorRT engine refuses, and what TensorRT-RTX does beyond TensorRT.

On a CUDA driver and a TensorRT made of Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

trt = pytest.importorskip("tensorrt_rtx")
real_driver = pytest.importorskip("cuda.bindings.driver")


from engines.fake_tensorrt import (
    FakeContext,
    FakeEngine,
    FakeRtxContext,
    FakeRtxRuntime,
    FakeRuntime,
    FakeRuntimeCache,
    FakeRuntimeConfig,
)
from engines.tensorrt_bench import PROFILES, Bench, assert_answers, make_images
from manifest_values import plain

from tood_deploy.cli.infer import main
from tood_deploy.engines.tensorrt import engine as tensorrt_engine
from tood_deploy.engines.tensorrt.library import Flavour
from tood_deploy.errors import ArtefactError, DeviceError, InputError
from tood_deploy.manifest import manifest_path

Status = real_driver.CUresult


class TestRefusals:
    def test_without_manifest_with_a_fake_gpu(self, bench: Bench) -> None:
        manifest_path(bench.path).unlink()
        with pytest.raises(
            ArtefactError, match=r"manifest model\.json is missing; .*tood-export MODEL --to engine"
        ):
            bench.open()

    def test_changed_plan_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.path.write_bytes(b"pla")
        with pytest.raises(
            ArtefactError,
            match=r"SHA-256 .*its manifest states .*changed or exchanged.*tood-export",
        ):
            bench.open()
        assert bench.plan.host_code == [], "TensorRT has seen it"

    def test_the_flavour_it_needs_is_absent_with_a_fake_gpu(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def absent(name: str) -> Flavour:
            raise DeviceError(f"{name} is absent; install it")

        monkeypatch.setattr(tensorrt_engine, "load_flavour", absent)
        name = plain(bench.manifest)["target"]["flavour"]
        with pytest.raises(
            DeviceError,
            match=rf"by .* 10\.13\.3\.9, and here {name} is absent; install it; or build",
        ):
            bench.open()

    def test_a_plan_that_may_not_be_read_with_a_fake_gpu(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_path: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(
            ArtefactError, match=r"model\.engine: cannot be read \(Permission denied\)"
        ):
            bench.open()

    def test_another_gpu_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.driver.capability = (9, 0)
        with pytest.raises(
            ArtefactError,
            match=r"built for GPUs of compute capability 8\.9, Fake GPU has 9\.0; build it again",
        ):
            bench.open()

    def test_the_librarys_refusal_ends_up_in_the_error_with_a_fake_gpu(
        self, bench: Bench, capfd: pytest.CaptureFixture[str]
    ) -> None:
        bench.write(options={"rebuild": "tood-export tiny --to engine"})
        bench.plan.failures["deserialize"] = "Error Code 1: Serialization (magicTag)"
        with pytest.raises(
            ArtefactError,
            match=r"cannot be opened \(.* Serialization \(magicTag\)\); .*: tood-export tiny",
        ):
            bench.open()
        assert capfd.readouterr() == ("", "")

    def test_old_driver_seen_by_the_library_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.plan.failures["deserialize"] = (
            "(cudaError 35: CUDA driver version is insufficient for CUDA runtime version)"
        )
        with pytest.raises(
            DeviceError, match="the NVIDIA driver is too old for this TensorRT; update the driver"
        ):
            bench.open()

    def test_cuda_that_fails_inside_the_library_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.plan.failures["deserialize"] = (
            "Error reading properties: (cudaError 36: API call is not supported in the installed "
            "CUDA driver)"
        )
        with pytest.raises(
            DeviceError, match=r"CUDA failed; look at nvidia-smi, update the driver.*cudaError 36"
        ):
            bench.open()

    def test_no_memory_for_the_plan_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.plan.failures["deserialize"] = (
            "Error Code 2: OutOfMemory (Requested size was 99 bytes.)"
        )
        with pytest.raises(DeviceError, match="the GPU's memory is full; use a smaller --batch"):
            bench.open()

    def test_no_memory_for_a_context_with_a_fake_gpu(self, bench: Bench) -> None:
        with bench.open() as engine:
            bench.plan.failures["context"] = "CUDA error: out of memory"
            with pytest.raises(
                DeviceError,
                match="no execution context: the GPU's memory is full; use a smaller --batch",
            ):
                engine.infer(*make_images(4), 0.25, 0.5)
            assert_answers(engine.infer(*make_images(1), 0.25, 0.5), *make_images(1))

    @pytest.mark.parametrize(
        ("function", "place"),
        [("cuMemAlloc", "on the GPU"), ("cuMemHostAlloc", "in pinned host memory")],
    )
    def test_no_memory_for_the_buffers_with_a_fake_gpu(
        self, bench: Bench, function: str, place: str
    ) -> None:
        bench.driver.fail(function, Status.CUDA_ERROR_OUT_OF_MEMORY)
        with pytest.raises(
            DeviceError,
            match=rf"no room {place} for \d+ MiB of .* \(5 of .* 80 MiB are free\).* --batch",
        ):
            bench.open()

    def test_a_gpu_that_fails_while_it_runs_with_a_fake_gpu(self, bench: Bench) -> None:
        with bench.open() as engine:
            bench.driver.fail("cuEventSynchronize", Status.CUDA_ERROR_ILLEGAL_ADDRESS, 2)
            with pytest.raises(
                DeviceError,
                match=r"cuEventSynchronize failed with CUDA_ERROR_ILLEGAL_ADDRESS, text of .*start",
            ):
                engine.infer(*make_images(1), 0.25, 0.5)

    def test_a_plan_of_somebody_else_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.plan.types = {"images": np.float32, "boxes": np.float32}
        message = r"\(inputs {'images': 'FLOAT'}, outputs {'boxes': 'FLOAT'}, expected"
        with pytest.raises(ArtefactError, match=message) as refusal:
            bench.open()
        assert not bench.plan.engines, f"alive as long as the error: {refusal.value}"

    def test_a_plan_for_triton_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.plan.threshold_shape = (-1, 1)
        with pytest.raises(
            ArtefactError, match=r"thresholds for each image, .* Triton; .* tood-export --to engine"
        ):
            bench.open()

    def test_a_plan_with_other_profiles_than_its_manifest_with_a_fake_gpu(
        self, bench: Bench
    ) -> None:
        bench.plan.profiles = PROFILES[:1]
        with pytest.raises(
            ArtefactError, match=r"its manifest states profiles and detections .* the plan has"
        ):
            bench.open()

    def test_a_batch_too_large_with_a_fake_gpu(self, bench: Bench) -> None:
        with bench.open() as engine:
            with pytest.raises(InputError, match="a batch of 5, this model takes at most 4"):
                engine.infer(*make_images(5), 0.25, 0.5)
            with pytest.raises(
                InputError,
                match="a batch of 3 at 96 x 32, this engine takes 1 to 2; choose such a --batch",
            ):
                engine.infer(*make_images(3, 0, (96, 32)), 0.25, 0.5)

    def test_values_that_are_no_numbers_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.plan.spoil = lambda found: found["scores"].fill(np.nan)
        with bench.open() as engine, pytest.raises(ArtefactError, match="NaN or infinite values"):
            engine.infer(*make_images(1), 0.25, 0.5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"device": "cpu"},
                "device is cpu, a TensorRT engine runs on a GPU; give --device cuda",
            ),
            ({"gpu": 1}, "gpu is 1, this machine has 1 that CUDA can see; expected 0 to 0"),
        ],
    )
    def test_wrong_options_with_a_fake_gpu(
        self, bench: Bench, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(DeviceError, match=message):
            bench.open(**options)

    def test_code_for_the_cpu_only_from_version_compatible_plans_with_a_fake_gpu(
        self, bench: Bench
    ) -> None:
        bench.open().close()
        bench.write(target=plain(bench.manifest)["target"] | {"version_compatible": True})
        bench.open().close()
        assert bench.plan.host_code == [False, True]


def no_gpu(bench: Bench) -> None:
    bench.driver.count = 0


def old_driver(bench: Bench) -> None:
    bench.driver.version = 11080


def cut_plan(bench: Bench) -> None:
    bench.path.write_bytes(b"pla")


def cut_manifest(bench: Bench) -> None:
    manifest_path(bench.path).write_text("{")


def other_version(bench: Bench) -> None:
    bench.write(target=plain(bench.manifest)["target"] | {"version": "10.14.1.2"})


def other_flavour(bench: Bench) -> None:
    (other,) = {"tensorrt", "tensorrt_rtx"} - {plain(bench.manifest)["target"]["flavour"]}
    bench.write(target=plain(bench.manifest)["target"] | {"flavour": other})


def other_gpu(bench: Bench) -> None:
    bench.driver.capability = (9, 0)


def full_gpu(bench: Bench) -> None:
    bench.driver.fail("cuMemAlloc", Status.CUDA_ERROR_OUT_OF_MEMORY)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_gpu, "no NVIDIA GPU that CUDA can use"),
        (old_driver, "the NVIDIA driver runs CUDA up to 11.8"),
        (cut_plan, "is not the file its manifest"),
        (cut_manifest, "not a manifest of tood_deploy"),
        (other_version, "10.14.1.2, installed is 10.13.3.9"),
        (other_flavour, "installed is TensorRT"),
        (other_gpu, "Fake GPU has 9.0"),
        (full_gpu, "no room on the GPU for"),
    ],
)
def test_by_the_command_one_line_and_nothing_written_with_a_fake_gpu(
    spoil: Callable[[Bench], None],
    message: str,
    bench: Bench,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    image = tmp_path / "a.png"
    cv2.imwrite(str(image), make_images(1)[0][0])
    spoil(bench)
    assert (
        main([str(bench.path), str(image), "--device", "cuda", "--output", str(tmp_path / "found")])
        == 2
    )
    out, error = capfd.readouterr()
    assert (out, error.count("\n"), error.startswith("error: ")) == ("", 1, True)
    assert message in error
    assert not (tmp_path / "found").exists()


class TestTensorRTRtx:
    @pytest.fixture(autouse=True)
    def only_rtx(self, bench: Bench) -> None:
        if not bench.plan.rtx:
            pytest.skip("full TensorRT does not judge plans beforehand")

    def test_its_judgement_ends_up_in_the_error_with_a_fake_gpu(self, bench: Bench) -> None:
        flags = trt.EngineInvalidityDiagnostics
        bench.plan.validity = (
            trt.EngineValidity.INVALID,
            int(flags.UNSUPPORTED_CC) | int(flags.OLD_CUDA_DRIVER),
        )
        with pytest.raises(
            ArtefactError,
            match=r"UNSUPPORTED_CC, OLD_CUDA_DRIVER .*; .*--compute-capability, or by TensorRT$",
        ):
            bench.open()
        bench.plan.validity = trt.EngineValidity.INVALID, int(flags.OLD_CUDA_DRIVER)
        with pytest.raises(
            ArtefactError,
            match=r"cannot be opened: OLD_CUDA_DRIVER .*; build it again, for this machine",
        ):
            bench.open()

    def test_a_plan_that_may_be_slow_is_noted_with_a_fake_gpu(self, bench: Bench) -> None:
        bench.plan.validity = trt.EngineValidity.SUBOPTIMAL, 0
        with bench.open() as engine:
            assert engine.notes == [
                "model.engine: runs on this GPU, but was not built for it and may be slower than "
                "it could be"
            ]

    def run(self, bench: Bench, *batches: int) -> list[str]:
        """Opens, runs a batch of each size twice, closes; what was compiled."""
        bench.plan.compiled.clear()
        with bench.open() as engine:
            for batch in batches * 2:
                engine.infer(*make_images(batch), 0.25, 0.5)
            self.notes = list(engine.notes)
        return list(bench.plan.compiled)

    def test_kernels_are_compiled_once_for_all_starts_with_a_fake_gpu(self, bench: Bench) -> None:
        assert self.run(bench, 1, 2) == ["1x64x96x3", "2x64x96x3"]
        assert self.run(bench, 2) == []
        assert self.run(bench, 1, 3) == ["4x64x96x3"]
        assert self.run(bench, 1, 2, 3) == []
        assert self.notes == []

    def test_kernels_that_do_not_fit_are_compiled_again_with_a_fake_gpu(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        self.run(bench, 1)
        (kept,) = (tmp_path / "home" / "kernels").iterdir()
        kept.write_bytes(b"of another driver")
        assert self.run(bench, 1) == ["1x64x96x3"]
        assert self.notes == [
            f"{kept}: holds kernels of another driver, or is damaged; they are compiled again, "
            "and it is replaced"
        ]
        assert self.run(bench, 1) == []

    def test_a_home_that_cannot_be_written_harms_nobody_with_a_fake_gpu(
        self, bench: Bench, tmp_path: Path
    ) -> None:
        (tmp_path / "home").write_text("a file")
        assert self.run(bench, 1) == self.run(bench, 1) == ["1x64x96x3"]


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (FakeRuntime, trt.Runtime),
        (FakeRtxRuntime, trt.Runtime),
        (FakeEngine, trt.ICudaEngine),
        (FakeContext, trt.IExecutionContext),
        (FakeRtxContext, trt.IExecutionContext),
        (FakeRuntimeConfig, trt.IRuntimeConfig),
        (FakeRuntimeCache, trt.IRuntimeCache),
    ],
)
def test_the_fakes_have_no_function_that_the_library_lacks(fake: type, real: type) -> None:
    functions = [name for name in vars(fake) if not name.startswith("_")]
    assert functions
    for name in functions:
        text = getattr(real, name).__doc__
        parameters = [
            parameter
            for parameter in inspect.signature(getattr(fake, name)).parameters
            if parameter != "self"
        ]
        assert all(f"{parameter.removeprefix('_')}: " in text for parameter in parameters), (
            name,
            parameters,
            text,
        )
