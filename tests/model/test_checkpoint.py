"""Every kind of checkpoint file, and what is said of files that are none."""

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tood_deploy.errors import CheckpointError, OutputError
from tood_deploy.files import file_sha256
from tood_deploy.model import Tood, load_checkpoint, save_checkpoint
from tood_deploy.model.checkpoint_file import AUTHORS_NAMES, METADATA_CLASSES

NAMES = ("cell", "dot", "ring")
CONFIG_3X = """
model = dict(type='TOOD', backbone=dict(type='ResNet', depth=18, base_channels=32, style='pytorch'),
    neck=dict(type='FPN', start_level=1, add_extra_convs='on_output'),
    data_preprocessor=dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=True, pad_size_divisor=32),
    bbox_head=dict(type='TOODHead', num_classes=3, anchor_type='anchor_free',
        anchor_generator=dict(octave_base_scale=8, strides=[8, 16, 32, 64, 128])))
test_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(320, 240), keep_ratio=True)]))
train_cfg = dict(max_epochs=12)
unsafe = __import__('os').system('touch executed')
"""
CONFIG_2X = """
model = dict(type='GFL', bbox_head=dict(type='TOODHead', anchor_type='anchor_based'))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale=(640, 480), transforms=[
    dict(type='Resize', keep_ratio=True), dict(type='Normalize', mean=[7.0, 8.0, 9.0], std=[1.0, 1.0, 1.0], to_rgb=True),
    dict(type='Pad', size_divisor=32)])]
runner = dict(type='EpochBasedRunner', max_epochs=24)
"""
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(seeded_model: Callable[..., Any]) -> Tood:
    return seeded_model("tiny", class_names=NAMES)


def write(path: Path, content: Any, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def authors_names(state: State) -> State:
    renamed = {}
    for key, value in state.items():
        for old, new in AUTHORS_NAMES:
            key = key.replace(new, old)
        renamed[key] = value
    assert renamed.keys() != state.keys()
    return renamed


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    other = second.state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(value, other[key]), key


class TestKinds:
    def test_mmdetection_3(
        self, model: Tood, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        meta = {"cfg": CONFIG_3X, "dataset_meta": {"classes": NAMES}, "epoch": 12}
        ema = {f"module.{key}": value + 1 for key, value in model.state_dict().items()} | {
            "steps": torch.tensor(5)
        }
        loaded = load_checkpoint(
            write(
                tmp_path / "a.pth",
                {"state_dict": model.state_dict(), "meta": meta, "ema_state_dict": ema},
            )
        )
        assert_same_weights(model, loaded)
        assert not loaded.training
        found = loaded.preset
        assert (found.name, found.anchor, found.convention, found.class_names) == (
            "tiny",
            "free",
            "mmdet",
            NAMES,
        )
        assert (found.imgsz, found.mean, found.std) == (
            (240, 320),
            (1.0, 2.0, 3.0),
            (4.0, 5.0, 6.0),
        )
        assert not (tmp_path / "executed").exists()

    def test_mmdetection_2_without_zip(self, model: Tood, tmp_path: Path) -> None:
        meta = {
            "config": CONFIG_2X,
            "CLASSES": list(NAMES),
            "mmcv_version": "1.3.17",
            "hook_msgs": {},
        }
        loaded = load_checkpoint(
            write(
                tmp_path / "a.pth",
                {"state_dict": OrderedDict(model.state_dict()), "meta": meta},
                zipped=False,
            )
        )
        found = loaded.preset
        assert (found.anchor, found.convention, found.class_names, found.imgsz) == (
            "based",
            "mmdet",
            NAMES,
            (480, 640),
        )
        assert found.mean == (7.0, 8.0, 9.0)
        assert found.name == "custom"  # no preset is anchor-based and as small

    def test_authors(self, model: Tood, tmp_path: Path) -> None:
        meta = {"config": CONFIG_2X.replace("anchor_based", "anchor_free"), "CLASSES": NAMES}
        loaded = load_checkpoint(
            write(
                tmp_path / "a.pth",
                {"state_dict": authors_names(model.state_dict()), "meta": meta},
                zipped=False,
            )
        )
        assert_same_weights(model, loaded)
        assert loaded.preset.convention == "authors"
        assert loaded.bbox_head.keep_inverted

    def test_convention_can_be_changed(self, model: Tood, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.pth", {"state_dict": model.state_dict(), "meta": {"cfg": CONFIG_3X}}
        )
        assert load_checkpoint(path, convention="authors").bbox_head.keep_inverted
        assert not load_checkpoint(path).bbox_head.keep_inverted

    def test_prefixes_and_averaged_copies(self, model: Tood, tmp_path: Path) -> None:
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        state |= {
            f"ema_{key.replace('.', '_')}": value + 1 for key, value in model.state_dict().items()
        }
        loaded = load_checkpoint(
            write(tmp_path / "a.pth", {"state_dict": state, "meta": {"cfg": CONFIG_3X}})
        )
        assert_same_weights(model, loaded)

    def test_old_files_with_scalars_as_vectors_and_no_batch_counts(
        self, model: Tood, tmp_path: Path
    ) -> None:
        state = {
            key: value
            for key, value in model.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
        state["bbox_head.scales.2.scale"] = state["bbox_head.scales.2.scale"].reshape(1)
        assert_same_weights(model, load_checkpoint(write(tmp_path / "a.pth", state), preset="tiny"))

    def test_old_names_of_offset_convolutions(
        self, seeded_model: Callable[..., Any], tmp_path: Path
    ) -> None:
        model = seeded_model("r101-dcn-2x", class_names=NAMES)
        state = {
            key.replace("conv2.conv_offset.", "conv2_offset."): value
            for key, value in model.state_dict().items()
        }
        assert_same_weights(
            model, load_checkpoint(write(tmp_path / "a.pth", state), preset="r101-dcn-2x")
        )

    def test_half_precision_becomes_single(self, model: Tood, tmp_path: Path) -> None:
        save_checkpoint(model, tmp_path / "half.safetensors", torch.float16)
        loaded = load_checkpoint(tmp_path / "half.safetensors")
        assert {value.dtype for value in loaded.state_dict().values()} == {
            torch.float32,
            torch.int64,
        }

    @pytest.mark.parametrize(
        "fields", [{}, {"anchor": "based", "convention": "authors", "imgsz": (96, 128)}]
    )
    def test_own(
        self, fields: dict[str, Any], seeded_model: Callable[..., Any], tmp_path: Path
    ) -> None:
        model = seeded_model("tiny", class_names=("one",), **fields)
        save_checkpoint(model, tmp_path / "own.safetensors")
        loaded = load_checkpoint(tmp_path / "own.safetensors")
        assert_same_weights(model, loaded)
        assert loaded.preset == model.preset
        assert loaded.checkpoint_sha256 == file_sha256(tmp_path / "own.safetensors")

    @pytest.mark.shared
    @pytest.mark.parametrize(
        ("name", "convention"), [("mmdet3_bccd_tiny", "mmdet"), ("authors_bccd_tiny", "authors")]
    )
    def test_genuine(self, name: str, convention: str, shared: Path) -> None:
        """Written by MMDetection and by the authors' code, neither of which is installed."""
        found = load_checkpoint(shared / "reference" / "checkpoints" / f"{name}.pth").preset
        assert (found.name, found.anchor, found.convention) == ("tiny", "free", convention)
        assert found.class_names == ("RBC", "WBC", "Platelets")


class TestWhatTheFileCannotTell:
    def test_anchor_kind_must_be_said(self, model: Tood, tmp_path: Path) -> None:
        path = write(tmp_path / "bare.pth", model.state_dict())
        with pytest.raises(CheckpointError, match=r"anchor-free or anchor-based.*--preset.*tiny"):
            load_checkpoint(path)
        assert load_checkpoint(path, preset="tiny").preset.anchor == "free"
        assert (
            load_checkpoint(path, preset=replace(model.preset, anchor="based")).preset.anchor
            == "based"
        )

    def test_names_are_numbered_where_nobody_gave_them(self, model: Tood, tmp_path: Path) -> None:
        path = write(tmp_path / "bare.pth", model.state_dict())
        assert load_checkpoint(path, preset="tiny").preset.class_names == (
            "class_0",
            "class_1",
            "class_2",
        )
        assert load_checkpoint(path, preset="tiny", class_names=NAMES).preset.class_names == NAMES

    def test_schedule_tells_presets_of_one_structure_apart(
        self, seeded_model: Callable[..., Any], tmp_path: Path
    ) -> None:
        state = seeded_model("r50-1x").state_dict()
        for epochs, name in ((12, "r50-1x"), (24, "r50-2x")):
            text = f"model=dict(bbox_head=dict(type='TOODHead', anchor_type='anchor_free'))\ntrain_cfg=dict(max_epochs={epochs})"
            path = write(tmp_path / f"{epochs}.pth", {"state_dict": state, "meta": {"cfg": text}})
            assert load_checkpoint(path).preset.name == name


class TestRefusals:
    def refuse(self, path: Path, match: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            load_checkpoint(path, **options)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_hostile_pickle(self, zipped: bool, model: Tood, tmp_path: Path) -> None:
        class Hostile:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "executed"),)

        path = write(
            tmp_path / "evil.pth",
            {"state_dict": model.state_dict(), "meta": Hostile()},
            zipped=zipped,
        )
        self.refuse(path, r"refused.*run code.*mkdir")
        assert not (tmp_path / "executed").exists()
        with path.open("rb") as file:  # the file would do it: the test could fail
            torch.load(file, weights_only=False)
        assert (tmp_path / "executed").exists()

    def test_getattr_in_metadata_gives_nothing(self, tmp_path: Path, model: Tood) -> None:
        """The one dangerous name on the list, which real files need, must be inert."""
        assert "builtins.getattr" in METADATA_CLASSES

        class ViaGetattr:
            def __reduce__(self) -> tuple[Any, ...]:
                return getattr, (OrderedDict, "fromkeys")

        content = {
            "state_dict": model.state_dict(),
            "meta": {"cfg": CONFIG_3X, "hook": ViaGetattr()},
        }
        assert load_checkpoint(write(tmp_path / "a.pth", content)).preset.name == "tiny"

    def test_damaged_files(self, model: Tood, tmp_path: Path) -> None:
        whole = write(tmp_path / "whole.pth", model.state_dict()).read_bytes()
        for name, content in {
            "cut": whole[: len(whole) // 2],
            "pickle": pickle.dumps([1, 2]),
        }.items():
            path = tmp_path / f"{name}.pth"
            path.write_bytes(content)
            self.refuse(path, "cannot be read|cut or damaged|torch.save")
        path = tmp_path / "cut.safetensors"
        save_checkpoint(model, path)
        path.write_bytes(path.read_bytes()[:5000])
        self.refuse(path, "safetensors")

    def test_no_such_file(self, tmp_path: Path) -> None:
        self.refuse(tmp_path / "nothing.pth", "no such file")

    def test_another_detector(self, tmp_path: Path) -> None:
        state = {
            "backbone.conv1.weight": torch.zeros(64, 3, 7, 7),
            "roi_head.bbox_head.fc_cls.weight": torch.zeros(81, 1024),
        }
        self.refuse(
            write(tmp_path / "a.pth", {"state_dict": state}),
            r"not a TOOD detector.*tood_cls.*roi_head\.bbox_head",
        )

    def test_no_weights(self, tmp_path: Path) -> None:
        self.refuse(
            write(tmp_path / "a.pth", {"meta": {}, "optimizer": {}}), "no weights.*meta, optimizer"
        )

    def test_preset_that_does_not_fit_names_the_one_that_does(
        self, model: Tood, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "a.pth", model.state_dict())
        self.refuse(
            path,
            r"does not fit the preset r50-1x: \d+ keys missing .*bn3.*of another shape .*it fits tiny",
            preset="r50-1x",
        )

    def test_missing_and_unexpected_keys_are_named(self, model: Tood, tmp_path: Path) -> None:
        state = dict(model.state_dict())
        del state["neck.fpn_convs.3.conv.bias"]
        state["bbox_head.extra.weight"] = torch.zeros(1)
        path = write(tmp_path / "a.pth", state)
        self.refuse(
            path,
            r"1 keys missing \(neck\.fpn_convs\.3\.conv\.bias\); 1 keys unexpected \(bbox_head\.extra\.weight\)",
            preset="tiny",
        )

    def test_preset_that_contradicts_the_file(self, model: Tood, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.pth", {"state_dict": model.state_dict(), "meta": {"cfg": CONFIG_3X}}
        )
        self.refuse(path, "anchor-free.*anchor-based", preset=replace(model.preset, anchor="based"))

    def test_wrong_class_count(self, model: Tood, tmp_path: Path) -> None:
        path = write(tmp_path / "a.pth", model.state_dict())
        self.refuse(path, "3 classes, 2 names", preset="tiny", class_names=["a", "b"])

    def test_weights_that_are_no_numbers(
        self, seeded_model: Callable[..., Any], tmp_path: Path
    ) -> None:
        model = seeded_model("tiny")
        model.bbox_head.tood_cls.bias.data[0] = float("nan")
        save_checkpoint(model, tmp_path / "a.safetensors")
        self.refuse(tmp_path / "a.safetensors", r"NaN.*tood_cls\.bias")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (("style='pytorch'", "style='caffe'"), "backbone.style = 'caffe'"),
            (("'on_output'", "'on_input'"), "add_extra_convs = 'on_input'"),
        ],
    )
    def test_configurations_of_another_network(
        self, change: tuple[str, str], match: str, model: Tood, tmp_path: Path
    ) -> None:
        text = CONFIG_3X.replace(*change)
        assert text != CONFIG_3X
        self.refuse(
            write(tmp_path / "a.pth", {"state_dict": model.state_dict(), "meta": {"cfg": text}}),
            match,
        )

    @pytest.mark.parametrize("text", ["model = (", "", "a, b = 1, 2", "x" * 10000])
    def test_configurations_that_tell_nothing_leave_it_to_the_user(
        self, text: str, model: Tood, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "a.pth", {"state_dict": model.state_dict(), "meta": {"cfg": text}})
        self.refuse(path, "--preset")
        assert load_checkpoint(path, preset="tiny").preset.imgsz == (240, 320)

    @pytest.mark.parametrize(
        "text",
        [
            "model = 5",
            "model = dict(bbox_head=7)",
            "model = make()",
            "model = dict()\nmodel.update(neck=1)",
        ],
    )
    def test_senseless_configurations(self, text: str, model: Tood, tmp_path: Path) -> None:
        path = write(tmp_path / "a.pth", {"state_dict": model.state_dict(), "meta": {"cfg": text}})
        self.refuse(path, "a dictionary is expected", preset="tiny")

    def test_more_or_fewer_names_than_classes(self, model: Tood, tmp_path: Path) -> None:
        meta = {"cfg": CONFIG_3X, "dataset_meta": {"classes": (*NAMES, "square")}}
        path = write(tmp_path / "a.pth", {"state_dict": model.state_dict(), "meta": meta})
        self.refuse(path, "3 classes.*names 4 .*square.*--classes")
        assert load_checkpoint(path, class_names=NAMES).preset.class_names == NAMES


class TestSaving:
    def test_file_is_readable_as_the_umask_says(self, model: Tood, tmp_path: Path) -> None:
        save_checkpoint(model, tmp_path / "a.safetensors")
        (tmp_path / "b").touch()
        assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode

    def test_unwritable_place(self, model: Tood) -> None:
        with pytest.raises(OutputError, match="cannot be written"):
            save_checkpoint(model, "/proc/nowhere/a.safetensors")

    def test_failed_write_keeps_the_old_file(
        self, model: Tood, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"old")

        def full_disk(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
        with pytest.raises(OutputError, match="No space left"):
            save_checkpoint(model, path)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
