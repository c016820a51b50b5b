"""Plans are held against the machine by their manifest alone; every mismatch is named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from manifest_values import write_changed

from tood_deploy.engines.tensorrt.plan_check import (
    Machine,
    check_plan,
    read_plan_manifest,
    tuned_elsewhere,
)
from tood_deploy.errors import ArtefactError
from tood_deploy.manifest import Manifest, manifest_path
from tood_deploy.manifest_sections import OptimizationProfile
from tood_deploy.presets import PRESETS

TARGET = {
    "flavour": "tensorrt",
    "version": "10.13.3.9",
    "platform": "linux-x86_64",
    "compute_capabilities": ["8.6", "8.9"],
    "profiles": [
        {"size_hw": [800, 1344], "batch": [1, 4, 8]},
        {"size_hw": [1344, 800], "batch": [1, 1, 2]},
    ],
}
MACHINE = Machine("tensorrt", "10.13.3.9", "linux-x86_64", "8.9", "NVIDIA L4")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "r50.engine"
    path.write_bytes(b"plan")
    return path


def write(plan: Path, **fields: Any) -> None:
    manifest = Manifest(PRESETS["r50-1x"]).with_artefact(plan)
    write_changed(manifest_path(plan), manifest, **{"target": TARGET} | fields)


def check(plan: Path, machine: Machine = MACHINE, sha256: str | None = None, **target: Any) -> None:
    write(plan, target=TARGET | target)
    manifest, found = read_plan_manifest(plan)
    check_plan(plan, manifest, found, machine, sha256 or manifest.artefact_sha256)


def test_the_right_machine_passes(plan: Path) -> None:
    check(plan)
    write(plan)
    assert read_plan_manifest(plan)[1].profiles == (
        OptimizationProfile((800, 1344), 1, 4, 8),
        OptimizationProfile((1344, 800), 1, 1, 2),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flavour": "tensorrt_rtx"}, "it was built by TensorRT, installed is TensorRT-RTX"),
        (
            {"version": "10.14.1.2"},
            r"it was built by TensorRT 10\.13\.3\.9, installed is 10\.14\.1\.2",
        ),
        ({"platform": "win32-amd64"}, "it was built for linux-x86_64, this machine is win32-amd64"),
        (
            {"compute_capability": "9.0"},
            r"it was built for GPUs of compute capability 8\.6, 8\.9, NVIDIA L4 has 9\.0",
        ),
    ],
)
def test_each_mismatch_is_named(plan: Path, fields: dict[str, str], message: str) -> None:
    with pytest.raises(
        ArtefactError,
        match=rf"cannot be used here: {message}; build it again, for this machine: tood-export",
    ):
        check(plan, replace(MACHINE, **fields))


def test_another_file_than_the_manifests(plan: Path) -> None:
    with pytest.raises(
        ArtefactError,
        match=r"SHA-256 ffffffffffff\.\., its manifest states [0-9a-f]{12}\.\.: it was cut",
    ):
        check(plan, sha256="f" * 64)
    write(plan, artefact_sha256="")
    with pytest.raises(ArtefactError, match=r"its manifest states nothing\.\."):
        check_plan(plan, *read_plan_manifest(plan), MACHINE, "f" * 64)


def test_all_mismatches_at_once(plan: Path) -> None:
    with pytest.raises(ArtefactError) as refusal:
        check(
            plan,
            Machine("tensorrt_rtx", "1.7.1.116", "linux-aarch64", "12.0", "NVIDIA Thor"),
            "f" * 64,
        )
    for part in ("SHA-256", "installed is TensorRT-RTX", "linux-aarch64", "NVIDIA Thor has 12.0"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("installed", "fits"),
    [
        ("10.13.3.9", True),
        ("10.14.0.1", True),
        ("10.13.2.6", False),
        ("11.0.0.1", False),
        ("10.9.0.34", False),
    ],
)
def test_version_compatible_plans_take_later_versions_of_their_major(
    plan: Path, installed: str, fits: bool
) -> None:
    machine = replace(MACHINE, version=installed)
    if fits:
        check(plan, machine, version_compatible=True)
    else:
        with pytest.raises(ArtefactError, match="installed is"):
            check(plan, machine, version_compatible=True)


@pytest.mark.parametrize(
    ("capability", "target", "fits"),
    [
        ("9.0", {"hardware_compatibility": "ampere_plus"}, True),
        ("12.0", {"hardware_compatibility": "ampere_plus"}, True),
        ("7.5", {"hardware_compatibility": "ampere_plus"}, False),
        ("10.0", {"later_compute_capabilities": True}, True),
        ("8.7", {"later_compute_capabilities": True}, True),
        ("8.0", {"later_compute_capabilities": True}, False),
        ("12.0", {"hardware_compatibility": "none"}, False),
    ],
)
def test_plans_for_more_than_one_gpu(
    plan: Path, capability: str, target: dict[str, Any], fits: bool
) -> None:
    machine = replace(MACHINE, compute_capability=capability)
    if fits:
        check(plan, machine, **target)
    else:
        with pytest.raises(ArtefactError, match=f"NVIDIA L4 has {capability}"):
            check(plan, machine, **target)


def test_a_plan_tuned_on_another_model_is_remarked_on(plan: Path) -> None:
    remarks = []
    for gpu in ("NVIDIA RTX 4090", "NVIDIA L4", ""):
        write(plan, target=TARGET | {"gpu": gpu})
        remarks.append(tuned_elsewhere(plan, read_plan_manifest(plan)[1], MACHINE))
    assert remarks == [
        "r50.engine: was tuned on NVIDIA RTX 4090, this is NVIDIA L4; built here it may be faster",
        "",
        "",
    ]


def test_the_command_that_rebuilds(plan: Path) -> None:
    write(
        plan,
        options={"rebuild": "tood-export r50-1x --to engine --precision fp16"},
        artefact_sha256="",
    )
    with pytest.raises(
        ArtefactError, match=r"for this machine: tood-export r50-1x --to engine --precision fp16$"
    ):
        check_plan(plan, *read_plan_manifest(plan), MACHINE, "f" * 64)


def test_no_manifest(plan: Path) -> None:
    with pytest.raises(
        ArtefactError,
        match=r"manifest r50\.json is missing; put it back.*tood-export MODEL --to engine",
    ):
        read_plan_manifest(plan)


@pytest.mark.parametrize(
    "target",
    [
        {},
        {"flavour": "tvm"},
        {"profiles": []},
        {"profiles": [{"size_hw": [1, 2]}]},
        {"profiles": [{"size_hw": [1, 2], "batch": [1]}]},
        {"profiles": 5},
    ],
)
def test_a_manifest_that_is_no_plans(plan: Path, target: dict[str, Any]) -> None:
    write(plan, target=TARGET | target if target else {})
    with pytest.raises(
        ArtefactError,
        match=r"r50\.json: (not a manifest|target is damaged|states no TensorRT).* again",
    ):
        read_plan_manifest(plan)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"format": 1})])
def test_a_damaged_manifest(plan: Path, text: str) -> None:
    manifest_path(plan).write_text(text)
    with pytest.raises(ArtefactError, match="not a manifest of tood_deploy"):
        read_plan_manifest(plan)
