"""What is no checkpoint gets the right sentence, whatever its name; never the advice to run what it holds."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tood_deploy.errors import CheckpointError
from tood_deploy.model import load_checkpoint
from tood_deploy.model.checkpoint_file import check_content, read_checkpoint

HTML = b"\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body></body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345678\n"
STATE = {"weight": torch.arange(1000.0)}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, preset="tiny")
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "weights_only" not in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.safetensors"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (HTML, "web page ('Google Drive - Virus scan warning')"),
        (b"<html lang=en>" + "ü".encode() * 3000, "web page"),
        (LFS, "git-LFS pointer to 12,345,678 bytes, not the file itself; fetch that with: git lfs pull"),
        (b"model = dict(type='TOOD')\n", "Python text"),
        (b"_base_ = ['a.py']\n", "Python text"),
        (b"hello", "is text, starting 'hello'"),
        (b'{"a": 1}', "is text"),
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"\x89HDF\r\n\x1a\n\x00", "HDF5"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x052.1.0", "ONNX model"),
    ],
)  # fmt: skip
def test_told_by_content(name: str, content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert match in refusal(tmp_path / name)


def test_a_python_file_of_any_text(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("# a configuration\nx = 1\n")
    assert "Python text" in refusal(tmp_path / "config.py")


def test_a_folder_names_the_checkpoints_in_it(tmp_path: Path) -> None:
    assert "is a folder; expected" in refusal(tmp_path)
    (tmp_path / "epoch_12.pth").touch()
    assert "epoch_12.pth: give one of these" in refusal(tmp_path)


def test_an_exported_model_under_the_name_of_a_checkpoint(
    tiny_artefact: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.pth").write_bytes(tiny_artefact.read_bytes())
    assert "ONNX model" in refusal(tmp_path / "a.pth")


def test_names_and_forms_that_are_exchanged(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(tiny_checkpoint.read_bytes())
    assert "rename it to a.safetensors" in refusal(tmp_path / "a.pth")
    for zipped in (True, False):
        torch.save(STATE, tmp_path / "b.safetensors", _use_new_zipfile_serialization=zipped)
        assert "safetensors" in refusal(tmp_path / "b.safetensors")


def test_zips(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("weights/epoch_1.pth", b"x")
        archive.writestr("readme.txt", b"x")
    assert "zip archive of 2 files (weights/epoch_1.pth, readme.txt)" in refusal(tmp_path / "a.pth")
    np.savez(tmp_path / "arrays.npz", weight=np.zeros(3))
    assert "zip archive" in refusal(tmp_path / "arrays.npz")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_script(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "a.pt")
    assert "TorchScript" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_cut_files(zipped: bool, share: float, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: int(len(whole) * share)])
    assert "cut" in refusal(tmp_path / "cut.pth")


def test_an_ordinary_pickle(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"weight": [1, 2]}))
    assert "torch.save" in refusal(tmp_path / "a.pth")


def test_what_is_a_checkpoint_passes(
    tiny_checkpoint: Path, tmp_path: Path, seeded_fill: Callable[..., object]
) -> None:
    assert check_content(tiny_checkpoint) == "safetensors"
    for zipped, form in ((True, "zip"), (False, "pickle")):
        torch.save(STATE, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        assert check_content(tmp_path / "a.pth") == form
        assert read_checkpoint(tmp_path / "a.pth").state_dict.keys() == {"weight"}


@pytest.mark.shared
def test_the_cases(shared: Path) -> None:
    for name, match in (
        ("gdrive.pth", "web page"),
        ("lfs.pth", "git-LFS"),
        ("tood_cfg.py", "Python text"),
    ):
        assert match in refusal(shared / "cases" / "checkpoints" / name)
    for path in (shared / "reference" / "checkpoints").glob("*.pth"):
        assert check_content(path) in ("zip", "pickle")


def test_json_of_results_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text(json.dumps([{"image_id": 1}]))
    assert "is text" in refusal(tmp_path / "a.pth")
