"""The verdict by precision: what is allowed, and that a lower precision still refuses what is broken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tood_deploy.errors import CheckFailed, ToodError
from tood_deploy.export import verify as module
from tood_deploy.export.compare import Match
from tood_deploy.export.pictures import synthetic_picture
from tood_deploy.export.runners import Maps, OnnxRunner, Reference, torch_reference
from tood_deploy.export.verify import TOLERANCES, verify
from tood_deploy.model import load_checkpoint


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Reference:
    return torch_reference(load_checkpoint(tiny_checkpoint), 100)


@pytest.fixture(scope="module")
def run(tiny_artefact: Path) -> OnnxRunner:
    return OnnxRunner(tiny_artefact)


@pytest.fixture(autouse=True)
def one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small size, which is enough to see what is refused."""
    monkeypatch.setattr(module, "SIZES_HW", {"small": (96, 64)})


class Changed:
    """An artefact whose outputs are changed on the way."""

    name = "changed"

    def __init__(self, run: OnnxRunner, change: Callable[[Maps], Any]) -> None:
        self.run, self.change = run, change

    def __call__(self, images: np.ndarray, valid_hw: np.ndarray, score_threshold: float, iou_threshold: float) -> Maps:
        maps = [np.array(each) for each in self.run(images, valid_hw, score_threshold, iou_threshold)]
        self.change(maps)
        return maps


def test_exchanges_are_a_number_or_a_share() -> None:
    assert TOLERANCES["fp32"].allowed_exchanges(Match(reference=100)) == 2
    assert TOLERANCES["bf16"].allowed_exchanges(Match(reference=100)) == 20
    assert TOLERANCES["bf16"].allowed_exchanges(Match(reference=5)) == 2


def test_lower_precision_may_be_further_off(run: OnnxRunner, reference: Reference) -> None:
    def coarse(maps: Maps) -> None:
        maps[1] += 0.2
        maps[2] += 0.002
        maps[4] += 0.002
        maps[9] += 1

    with pytest.raises(CheckFailed, match="head scores"):
        verify(reference, Changed(run, coarse))
    parity = verify(reference, Changed(run, coarse), tolerances=TOLERANCES["bf16"])
    assert parity["runtime"] == "changed"
    assert parity["head_boxes"] > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps: maps[1].__imul__(2), "detections exchanged in one picture: "),
        (lambda maps: maps[3].__iadd__(1), "detections exchanged in one picture: "),
        (lambda maps: maps[5].__iadd__(0.5), "head scores of pictures .* deviate: 0.5"),
        (lambda maps: maps[1][1:].__imul__(2), "detections that depend on the batch slot: "),
    ],
)
def test_not_even_the_loosest_excuses_what_is_broken(
    change: Callable[[Maps], Any], message: str, run: OnnxRunner, reference: Reference
) -> None:
    with pytest.raises(CheckFailed, match=message):
        verify(reference, Changed(run, change), tolerances=TOLERANCES["int8"])


class TestWithoutTheBuiltInPictures:
    def test_only_the_users_count(self, run: OnnxRunner, reference: Reference) -> None:
        pictures = [synthetic_picture(60, 90, seed) for seed in range(2)]
        parity = verify(Reference(reference.run, (64, 96)), run, pictures=pictures, synthetic=False)
        assert parity["pictures"] == 2
        assert parity["batch_slots"]["reference"] > 0

    def test_none_at_all_is_an_error(self, run: OnnxRunner, reference: Reference) -> None:
        with pytest.raises(ToodError, match="no pictures to verify on"):
            verify(reference, run, synthetic=False)
