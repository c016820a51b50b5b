"""Every kind of checkpoint becomes its network, or is refused with a reason; and the way back."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model.configs import CONFIG_2X, CONFIG_3X, NAMES

from tood_deploy.errors import CheckpointError, OutputError
from tood_deploy.files import file_sha256
from tood_deploy.model import DenseDetector, load_checkpoint, save_checkpoint
from tood_deploy.model.checkpoint_file import AUTHORS_NAMES
from tood_deploy.presets import Preset

State = dict[str, torch.Tensor]
META_3X = {"cfg": CONFIG_3X, "dataset_meta": {"classes": NAMES}, "epoch": 12}


@pytest.fixture(scope="module")
def model(seeded_model: Callable[..., Any]) -> DenseDetector:
    return seeded_model("tiny", class_names=NAMES)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that stores a state dict, or whatever else, with metadata."""

    def write(content: Any, meta: Any = None, *, zipped: bool = True) -> Path:
        path = tmp_path / "a.pth"
        content = content if meta is None else {"state_dict": content, "meta": meta}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        return path

    return write


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


def facts(preset: Preset) -> tuple[str, str, str]:
    return preset.name, preset.anchor, preset.convention


class TestKinds:
    def test_mmdetection_3(
        self, model: DenseDetector, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        ema: State = {f"module.{key}": value + 1 for key, value in model.state_dict().items()}
        ema["steps"] = torch.tensor(5)
        content = {"state_dict": model.state_dict(), "meta": META_3X, "ema_state_dict": ema}
        loaded = load_checkpoint(write(content))
        assert_same_weights(model, loaded)
        assert not loaded.training
        assert facts(loaded.preset) == ("tiny", "free", "mmdet")
        assert (loaded.preset.class_names, loaded.preset.imgsz) == (NAMES, (240, 320))
        assert not (tmp_path / "executed").exists()  # as the configuration's text would have it

    def test_mmdetection_2_without_zip(self, model: DenseDetector, write: Any) -> None:
        text = CONFIG_2X.replace("anchor_free", "anchor_based")
        meta = {"config": text, "CLASSES": list(NAMES), "mmcv_version": "1.3.17", "hook_msgs": {}}
        preset = load_checkpoint(write(OrderedDict(model.state_dict()), meta, zipped=False)).preset
        assert facts(preset) == ("custom", "based", "mmdet")  # no preset is both based and so small
        assert (preset.class_names, preset.max_det) == (NAMES, 50)

    def test_authors(self, model: DenseDetector, write: Any) -> None:
        meta = {"config": CONFIG_2X, "CLASSES": NAMES}
        loaded = load_checkpoint(write(authors_names(model.state_dict()), meta, zipped=False))
        assert_same_weights(model, loaded)
        assert loaded.preset.convention == "authors"
        assert loaded.bbox_head.keep_inverted

    def test_convention_can_be_changed(self, model: DenseDetector, write: Any) -> None:
        path = write(model.state_dict(), META_3X)
        assert load_checkpoint(path, convention="authors").bbox_head.keep_inverted
        assert not load_checkpoint(path).bbox_head.keep_inverted

    def test_prefixes_and_averaged_copies(self, model: DenseDetector, write: Any) -> None:
        state: State = {}
        for key, value in model.state_dict().items():
            state |= {f"module.{key}": value, f"ema_{key.replace('.', '_')}": value + 1}
        assert_same_weights(model, load_checkpoint(write(state, META_3X)))

    def test_old_files_with_scalars_as_vectors_and_no_batch_counts(
        self, model: DenseDetector, write: Any
    ) -> None:
        state = dict(model.state_dict())
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]
        state["bbox_head.scales.2.scale"] = state["bbox_head.scales.2.scale"].reshape(1)
        assert_same_weights(model, load_checkpoint(write(state), preset="tiny"))

    def test_old_names_of_offset_convolutions(
        self, seeded_model: Callable[..., Any], write: Any
    ) -> None:
        fields = {"depth": 50, "base_channels": 16, "deform_stages": (3, 4)}
        model = seeded_model("tiny", class_names=NAMES, **fields)
        names = ("conv2.conv_offset.", "conv2_offset.")
        state = {key.replace(*names): value for key, value in model.state_dict().items()}
        assert state.keys() != model.state_dict().keys()
        assert_same_weights(model, load_checkpoint(write(state), preset=model.preset))

    def test_half_precision_becomes_single(self, model: DenseDetector, tmp_path: Path) -> None:
        save_checkpoint(model, tmp_path / "half.safetensors", torch.float16)
        tensors = load_checkpoint(tmp_path / "half.safetensors").state_dict().values()
        assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}

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
        preset = load_checkpoint(shared / "reference" / "checkpoints" / f"{name}.pth").preset
        assert facts(preset) == ("tiny", "free", convention)
        assert preset.class_names == ("RBC", "WBC", "Platelets")


class TestWhatTheFileCannotSay:
    def test_anchor_kind(self, model: DenseDetector, write: Any) -> None:
        path, based = write(model.state_dict()), replace(model.preset, anchor="based")
        with pytest.raises(CheckpointError, match=r"anchor-free or anchor-based.*--preset.*tiny"):
            load_checkpoint(path)
        assert load_checkpoint(path, preset="tiny").preset.anchor == "free"
        assert load_checkpoint(path, preset=based).preset.anchor == "based"

    def test_names_are_numbered_where_there_are_none(
        self, model: DenseDetector, write: Any
    ) -> None:
        path, numbered = write(model.state_dict()), ("class_0", "class_1", "class_2")
        assert load_checkpoint(path, preset="tiny").preset.class_names == numbered
        assert load_checkpoint(path, preset="tiny", class_names=NAMES).preset.class_names == NAMES

    @pytest.mark.parametrize(("epochs", "name"), [(12, "r50-1x"), (24, "r50-2x")])
    def test_schedule_is_the_difference_of_two_presets(
        self, epochs: int, name: str, seeded_model: Callable[..., Any], write: Any
    ) -> None:
        text = "model=dict(bbox_head=dict(type='TOODHead', anchor_type='anchor_free'))\n"
        meta = {"cfg": f"{text}train_cfg=dict(max_epochs={epochs})"}
        state = seeded_model("r50-1x").state_dict()
        assert load_checkpoint(write(state, meta)).preset.name == name

    @pytest.mark.parametrize("text", ["model = (", "", "a, b = 1, 2", "x" * 10000])
    def test_configurations_without_content_leave_it_to_the_user(
        self, text: str, model: DenseDetector, write: Any
    ) -> None:
        path = write(model.state_dict(), {"cfg": text})
        with pytest.raises(CheckpointError, match="--preset"):
            load_checkpoint(path)
        assert load_checkpoint(path, preset="tiny").preset.imgsz == (240, 320)


class TestRefusals:
    def refuse(self, path: Path, match: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=match) as caught:
            load_checkpoint(path, **options)
        assert str(path) in str(caught.value)

    def test_another_detector(self, write: Any) -> None:
        state = {
            "backbone.conv1.weight": torch.zeros(64, 3, 7, 7),
            "roi_head.bbox_head.fc_cls.weight": torch.zeros(81, 1024),
        }
        self.refuse(write({"state_dict": state}), r"tood_cls.*roi_head\.bbox_head")

    def test_preset_that_does_not_fit_names_the_one_that_does(
        self, model: DenseDetector, write: Any
    ) -> None:
        match = r"r50-1x: \d+ keys missing .*bn3.*of another shape .*it fits tiny"
        self.refuse(write(model.state_dict()), match, preset="r50-1x")

    def test_missing_and_unexpected_keys_are_named(self, model: DenseDetector, write: Any) -> None:
        state = dict(model.state_dict()) | {"bbox_head.extra.weight": torch.zeros(1)}
        del state["neck.fpn_convs.3.conv.bias"]
        match = r"missing \(neck\.fpn_convs\.3\.conv\.bias\).*unexpected \(bbox_head\.extra\.weight"
        self.refuse(write(state), match, preset="tiny")

    def test_preset_that_contradicts_the_file(self, model: DenseDetector, write: Any) -> None:
        path = write(model.state_dict(), META_3X)
        self.refuse(path, "anchor-free.*anchor-based", preset=replace(model.preset, anchor="based"))

    def test_wrong_class_count(self, model: DenseDetector, write: Any) -> None:
        self.refuse(
            write(model.state_dict()), "3 classes, 2", preset="tiny", class_names=["a", "b"]
        )
        meta = {"cfg": CONFIG_3X, "dataset_meta": {"classes": (*NAMES, "square")}}
        path = write(model.state_dict(), meta)
        self.refuse(path, "3 classes.*4 .*square.*--classes")
        assert load_checkpoint(path, class_names=NAMES).preset.class_names == NAMES

    def test_weights_that_are_no_numbers(
        self, seeded_model: Callable[..., Any], tmp_path: Path
    ) -> None:
        model = seeded_model("tiny")
        model.bbox_head.tood_cls.bias.data[0] = float("nan")
        save_checkpoint(model, tmp_path / "a.safetensors")
        self.refuse(tmp_path / "a.safetensors", r"NaN.*tood_cls\.bias")


class TestSaving:
    def test_file_is_readable_as_the_umask_says(self, model: DenseDetector, tmp_path: Path) -> None:
        save_checkpoint(model, tmp_path / "a.safetensors")
        (tmp_path / "b").touch()
        assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode

    def test_unwritable_place(self, model: DenseDetector) -> None:
        with pytest.raises(OutputError):
            save_checkpoint(model, "/proc/nowhere/a.safetensors")

    def test_failed_write_keeps_the_old_file(
        self, model: DenseDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
