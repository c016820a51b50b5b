"""First weights and what is frozen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tood_deploy.errors import CheckpointError, DownloadError
from tood_deploy.model import build_model, save_checkpoint
from tood_deploy.presets import PRESETS, Preset
from tood_deploy.training.init import freeze, load_backbone, load_pretrained, new_model
from tood_deploy.training.learner import WeightAverage


def test_seed_decides_the_weights(small_preset: Preset) -> None:
    first, again, other = (
        new_model(small_preset, seed).backbone.conv1.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_backbone_in_torchvision_names(small_preset: Preset, tmp_path: Path) -> None:
    source = new_model(small_preset, 1)
    state = source.backbone.state_dict() | {
        "fc.weight": torch.zeros(10, 4),
        "fc.bias": torch.zeros(10),
    }
    torch.save(state, tmp_path / "resnet.pth")
    model = new_model(small_preset, 2)
    assert "tensors of" in load_backbone(model, str(tmp_path / "resnet.pth"))
    for key, value in source.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value), key
    untouched = "neck.lateral_convs.0.conv.weight"
    assert not torch.equal(model.state_dict()[untouched], source.state_dict()[untouched])


def test_backbone_out_of_a_detector(small_preset: Preset, tmp_path: Path) -> None:
    source = new_model(small_preset, 1)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "detector.pth")
    model = new_model(small_preset, 2)
    load_backbone(model, str(tmp_path / "detector.pth"))
    assert torch.equal(model.backbone.conv1.weight, source.backbone.conv1.weight)


def test_a_plain_backbone_fits_a_deformable_one(small_preset: Preset, tmp_path: Path) -> None:
    plain = replace(small_preset, depth=50)
    torch.save(new_model(plain, 1).backbone.state_dict(), tmp_path / "resnet.pth")
    model = new_model(replace(plain, deform_stages=(3, 4)), 2)
    load_backbone(model, str(tmp_path / "resnet.pth"))
    assert not model.backbone.state_dict()["layer3.0.conv2.conv_offset.weight"].any()


def test_another_backbone_is_refused(small_preset: Preset, tmp_path: Path) -> None:
    torch.save(new_model(small_preset, 1).backbone.state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(
        CheckpointError,
        match=r"not the weights of a ResNet of depth 50 .* keys missing \(.* of another shape",
    ):
        load_backbone(new_model(replace(small_preset, depth=50), 0), str(tmp_path / "resnet18.pth"))
    with pytest.raises(CheckpointError, match="no ImageNet backbone is known for depth 18"):
        load_backbone(new_model(small_preset, 0), None)


def test_an_unreachable_url_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOOD_HOME", str(tmp_path))
    with pytest.raises(
        DownloadError, match="or give --backbone-weights FILE, --checkpoint or --from-scratch"
    ):
        load_backbone(build_model("tiny"), "http://127.0.0.1:9/resnet.pth")


def test_fine_tuning_with_other_classes(small_preset: Preset, tmp_path: Path) -> None:
    source = new_model(small_preset, 1)
    save_checkpoint(source, tmp_path / "source.safetensors")
    model = new_model(replace(small_preset, class_names=("cat", "dog")), 2)
    fresh = model.get_parameter("bbox_head.tood_cls.weight").clone()
    said = load_pretrained(model, str(tmp_path / "source.safetensors"))
    assert said.endswith("but for the class layer, which starts anew: 5 classes there, 2 here")
    assert torch.equal(model.get_parameter("bbox_head.tood_cls.weight"), fresh)
    for key, value in source.state_dict().items():
        if "tood_cls" not in key:
            assert torch.equal(model.state_dict()[key], value), key


def test_fine_tuning_with_the_same_classes(small_preset: Preset, tmp_path: Path) -> None:
    source, model = new_model(small_preset, 1), new_model(small_preset, 2)
    save_checkpoint(source, tmp_path / "source.safetensors")
    assert load_pretrained(model, str(tmp_path / "source.safetensors")).startswith(
        "all weights from"
    )
    assert torch.equal(
        model.get_parameter("bbox_head.tood_cls.weight"),
        source.get_parameter("bbox_head.tood_cls.weight"),
    )


def test_fine_tuning_from_another_network_is_refused(small_preset: Preset, tmp_path: Path) -> None:
    save_checkpoint(new_model(small_preset, 1), tmp_path / "source.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the preset"):
        load_pretrained(build_model("tiny"), str(tmp_path / "source.safetensors"))
    with pytest.raises(CheckpointError, match="anchor-free, the preset tiny is anchor-based"):
        load_pretrained(
            new_model(replace(small_preset, anchor="based"), 0),
            str(tmp_path / "source.safetensors"),
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_groups": 16},
        {"channel_order": "bgr"},
        {"anchor_offset": 0.5},
        {"std": (1.0, 1.0, 1.0)},
    ],
)
def test_fine_tuning_from_other_settings_is_refused_by_name(
    fields: dict[str, Any], small_preset: Preset, tmp_path: Path
) -> None:
    save_checkpoint(new_model(replace(small_preset, **fields), 1), tmp_path / "source.safetensors")
    with pytest.raises(CheckpointError, match=f"trained with {next(iter(fields))} = "):
        load_pretrained(new_model(small_preset, 0), str(tmp_path / "source.safetensors"))


def test_fine_tuning_from_one_of_several_networks(small_preset: Preset, tmp_path: Path) -> None:
    first, second = new_model(small_preset, 1).state_dict(), new_model(small_preset, 2).state_dict()
    torch.save({"model": first, "model_ema": second}, tmp_path / "source.pth")
    model = new_model(small_preset, 0)
    load_pretrained(model, str(tmp_path / "source.pth"), "ema")
    assert torch.equal(model.backbone.conv1.weight, second["backbone.conv1.weight"])
    with pytest.raises(CheckpointError, match="--weights-key"):
        load_pretrained(model, str(tmp_path / "source.pth"))


def test_frozen_stages_as_published() -> None:
    with torch.device("meta"):
        model = build_model(PRESETS["r50-1x"])
    freeze(model, stages=1, norm=True)
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad) == 31_975_150
    )  # reference/SPEC.md section 1
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(module.training for module in norms)
    assert model.backbone.get_parameter("layer2.0.bn1.weight").requires_grad
    assert model.bbox_head.training


@pytest.mark.parametrize(("stages", "learning"), [(-1, True), (0, False)])
def test_freezing_the_stem(small_preset: Preset, stages: int, learning: bool) -> None:
    model = new_model(small_preset, 0)
    freeze(model, stages=stages, norm=False)
    assert model.backbone.conv1.weight.requires_grad == learning
    assert model.backbone.bn1.training == learning
    assert model.backbone.get_submodule("layer1.0.bn1").training


def test_average_follows_the_weights() -> None:
    model = nn.BatchNorm1d(1)
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.state_dict()["num_batches_tracked"].fill_(7)
    average.update(model)  # early on the average keeps but (1 + n) / (10 + n): 2/11 of what it was
    assert average.state["weight"].item() == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)
    assert average.state["num_batches_tracked"].item() == 7
    for _ in range(500):
        average.update(model)
    assert average.state["weight"].item() == pytest.approx(3.0)
