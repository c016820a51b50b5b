"""Files that are no checkpoint get the right sentence, whatever their name.

Hostile ones run no code, and of several networks in a file the right one is chosen.
"""

import copy
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tood_deploy.errors import CheckpointError
from tood_deploy.model import load_checkpoint
from tood_deploy.model.checkpoint_content import check_content
from tood_deploy.model.checkpoint_file import (
    LANDMARK,
    METADATA_CLASSES,
    choose_weights,
    read_checkpoint,
)

HTML = (
    b"\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head>"
    b"<body></body></html>"
)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345678\n"
STATE = {"weight": torch.arange(1000.0)}


def refusal(path: Path) -> str:
    """Return the message: one line, and never PyTorch's advice to run what the file holds."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, preset="tiny")
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "weights_only" not in text
    assert "\n" not in text
    return text


class TestContent:
    @pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.safetensors"])
    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"", "is empty"),
            (HTML, "web page ('Google Drive - Virus scan warning')"),
            (b"<html lang=en>" + "ü".encode() * 3000, "web page"),
            (LFS, "git-LFS pointer to 12,345,678 bytes"),
            (b"model = dict(type='TOOD')\n", "Python text"),
            (b"_base_ = ['a.py']\n", "Python text"),
            (b"hello", "is text, starting 'hello'"),
            (b'[{"image_id": 1}]', "is text"),
            (b"\x1f\x8b\x08\x00rest", "gzip"),
            (b"\x89HDF\r\n\x1a\n\x00", "HDF5"),
            (b"\x08\x0a\x12\x07pytorch\x1a\x052.1.0", "ONNX model"),
        ],
    )
    def test_is_named(self, name: str, content: bytes, match: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        assert match in refusal(tmp_path / name)

    def test_a_python_file_of_any_text(self, tmp_path: Path) -> None:
        (tmp_path / "config.py").write_text("# a configuration\nx = 1\n")
        assert "Python text" in refusal(tmp_path / "config.py")

    def test_no_file_and_a_folder(self, tmp_path: Path) -> None:
        assert "no such file" in refusal(tmp_path / "nothing.pth")
        assert "is a folder; expected" in refusal(tmp_path)
        (tmp_path / "epoch_12.pth").touch()
        assert "epoch_12.pth: give one of these" in refusal(tmp_path)

    def test_names_and_formats_that_are_exchanged(
        self, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "a.pth").write_bytes(tiny_checkpoint.read_bytes())
        assert "rename it to a.safetensors" in refusal(tmp_path / "a.pth")
        for zipped in (True, False):
            torch.save(STATE, tmp_path / "b.safetensors", _use_new_zipfile_serialization=zipped)
            assert "safetensors" in refusal(tmp_path / "b.safetensors")

    def test_zips(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
            archive.writestr("weights/epoch_1.pth", b"x")
        assert "zip archive of 1 files (weights/epoch_1.pth)" in refusal(tmp_path / "a.pth")
        np.savez(tmp_path / "arrays.npz", weight=np.zeros(3))
        assert "zip archive" in refusal(tmp_path / "arrays.npz")

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_a_script(self, tmp_path: Path) -> None:
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "a.pt")
        assert "TorchScript" in refusal(tmp_path / "a.pt")

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
    def test_cut_files(self, zipped: bool, share: float, tmp_path: Path) -> None:
        torch.save(STATE, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "whole.pth").read_bytes()
        (tmp_path / "cut.pth").write_bytes(whole[: int(len(whole) * share)])
        assert "cut" in refusal(tmp_path / "cut.pth")

    def test_cut_safetensors(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(tiny_checkpoint.read_bytes()[:5000])
        assert "safetensors" in refusal(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("content", [{"weight": [1, 2]}, [1, 2]])
    def test_an_ordinary_pickle(self, content: Any, tmp_path: Path) -> None:
        (tmp_path / "a.pth").write_bytes(pickle.dumps(content))
        assert "torch.save" in refusal(tmp_path / "a.pth")

    def test_checkpoints_pass(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        assert check_content(tiny_checkpoint) == "safetensors"
        for zipped, file_format in ((True, "zip"), (False, "pickle")):
            torch.save(STATE, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
            assert check_content(tmp_path / "a.pth") == file_format
            assert read_checkpoint(tmp_path / "a.pth").state_dict.keys() == {"weight"}

    @pytest.mark.shared
    def test_the_cases(self, shared: Path) -> None:
        cases = {"gdrive.pth": "web page", "lfs.pth": "git-LFS", "tood_cfg.py": "Python text"}
        for name, match in cases.items():
            assert match in refusal(shared / "cases" / "checkpoints" / name)
        for path in (shared / "reference" / "checkpoints").glob("*.pth"):
            assert check_content(path) in ("zip", "pickle")


class TestHostileFiles:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_no_code_is_run(self, zipped: bool, tmp_path: Path) -> None:
        class Hostile:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "executed"),)

        path = tmp_path / "evil.pth"
        content = {"state_dict": STATE, "meta": Hostile()}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert "mkdir" in refusal(path)
        assert not (tmp_path / "executed").exists()
        torch.load(path, weights_only=False)  # the file would do it: the test could fail
        assert (tmp_path / "executed").exists()

    def test_getattr_in_metadata_gives_nothing(self, tmp_path: Path) -> None:
        """The one dangerous name on the list, which real files need, must be inert."""
        assert "builtins.getattr" in METADATA_CLASSES

        class ViaGetattr:
            def __reduce__(self) -> tuple[Any, ...]:
                return getattr, (OrderedDict, "fromkeys")

        torch.save({"state_dict": STATE, "meta": {"hook": ViaGetattr()}}, tmp_path / "a.pth")
        assert read_checkpoint(tmp_path / "a.pth").meta["hook"] == {}


def network(number: float, prefix: str = "") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{LANDMARK}": torch.tensor(number),
        f"{prefix}bbox_head.tood_cls.bias": torch.tensor(-number),
    }


def chosen(content: Any, key: str | None = None) -> float:
    tensors = choose_weights(content, Path("a.pth"), key)
    assert network(0).keys() <= tensors.keys() <= network(0).keys() | {"steps"}
    return float(tensors[LANDMARK])


class TestSeveralNetworks:
    @pytest.mark.parametrize(
        "prefix",
        ["", "module.", "module.module.", "_orig_mod.", "student.", "module._orig_mod.", "ema.x."],
    )
    def test_one_network_behind_any_prefix(self, prefix: str) -> None:
        alone = network(1, prefix)
        assert chosen(alone) == 1
        assert chosen({"state_dict": alone, "meta": {}, "optimizer": {"state": {}}}) == 1
        assert chosen({"checkpoint": {"net": alone}}) == 1
        if prefix:
            assert chosen({"model": alone | {"criterion.weight": torch.zeros(2)}}) == 1

    def test_the_usual_place_comes_first(self) -> None:
        content = {
            "state_dict": network(1),
            "ema_state_dict": network(2, "module.") | {"module.steps": torch.tensor(5)},
            "training": {"model": network(3)},
        }
        keys = {None: 1, "ema": 2, "ema_state_dict": 2, "training.model": 3, "state_dict": 1}
        assert {key: chosen(content, key) for key in keys} == keys

    @pytest.mark.parametrize(
        ("content", "keys"),
        [
            (
                {"model": network(1), "model_ema": network(2)},
                {"model": 1, "model_ema": 2, "ema": 2},
            ),
            (
                {"state_dict": network(1, "student.") | network(2, "teacher.")},
                {"student": 1, "teacher": 2, "state_dict:teacher": 2, "teacher.": 2},
            ),
            (network(1, "student.") | network(2, "teacher."), {"student": 1, "teacher": 2}),
            (
                {"state_dict": network(1) | network(2, "ema_model.")},
                {"ema_model": 2, "ema": 2, "state_dict": 1},
            ),
            (
                {"a": network(1, "module."), "b": network(2, "module.")},
                {"a": 1, "b": 2, "a:module": 1},
            ),
        ],
    )
    def test_several_are_listed_and_have_keys(self, content: Any, keys: dict[str, int]) -> None:
        with pytest.raises(CheckpointError, match=r"2 networks.*--weights-key") as caught:
            chosen(content)
        listed = str(caught.value).rsplit(": ", 1)[1].split(", ")
        assert {chosen(content, name) for name in listed} == {1, 2}
        assert {key: chosen(content, key) for key in keys} == keys

    @pytest.mark.parametrize(
        ("content", "key", "match"),
        [
            ({"model": network(1), "ema": network(2)}, "teacher", "none of the.*model, ema"),
            (
                {"state_dict": network(1, "student.") | network(2, "teacher.")},
                "state_dict",
                "several.*student, teacher",
            ),
            (network(1), "ema", "no name of its own"),
            ({"meta": {}}, None, "no weights, only meta"),
        ],
    )
    def test_refusals(self, content: Any, key: str | None, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            chosen(content, key)

    def test_weights_of_no_detector_are_given_as_they_are(self) -> None:
        weights = {"conv1.weight": torch.zeros(1)}
        contents: list[Any] = [{"state_dict": weights}, weights]
        for content in contents:
            assert choose_weights(content, Path("a.pth"), None).keys() == weights.keys()


class TestBombs:
    """What PyTorch never writes, and what would take gigabytes before it is refused."""

    def test_a_compressed_member(self, tmp_path: Path) -> None:
        torch.save(STATE, tmp_path / "plain.pth")
        with (
            zipfile.ZipFile(tmp_path / "plain.pth") as plain,
            zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for name in plain.namelist():
                packed.writestr(name, plain.read(name) + b"." * 100_000_000)
        assert "compressed or overlapping" in refusal(tmp_path / "a.pth")

    def test_members_that_overlap(self, tmp_path: Path) -> None:
        """The same bytes under many names."""
        torch.save(STATE, tmp_path / "a.pth")
        with zipfile.ZipFile(tmp_path / "a.pth", "a") as archive:
            members = archive.infolist()
            largest = max(members, key=lambda member: member.file_size)
            for number in range(100):
                other = copy.copy(largest)
                other.filename = f"archive/data/{number + 10}"
                archive.filelist.append(other)
            archive._didModify = True  # pyright: ignore[reportAttributeAccessIssue]
        assert "compressed or overlapping" in refusal(tmp_path / "a.pth")
