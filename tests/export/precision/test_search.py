"""The search for a mixture of precisions, on made-up networks whose every cost is known; and
mixtures of the exported network."""

import itertools
import random
from collections.abc import Callable, Collection, Mapping
from io import StringIO
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from recording import RecordingReporter
from rich.console import Console

from tood_deploy.errors import ToodError
from tood_deploy.export.precision.half import LowPrecision
from tood_deploy.export.precision.search import (
    Mixture,
    SearchResult,
    TrialSteps,
    autotune,
    describe_mixture,
)
from tood_deploy.export.precision.sensitivity import (
    Sensitivity,
    mix_precisions,
    network_parts,
    rank_parts,
)
from tood_deploy.reporter import Reporter

PRECISIONS = ("fp32", "fp16", "int8")
Costs = Mapping[tuple[str, str], tuple[float, float]]


class FakeNetwork:
    """A network of which a group in a precision takes a known time and costs a known quality; keeps
    what was asked of it."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.evaluated: list[Mixture] = []
        self.reporter = RecordingReporter()

    def latency_ms(self, mixture: Mixture) -> float:
        return sum(self.costs[item][0] for item in mixture.items())

    def drop(self, mixture: Mixture) -> float:
        return sum(self.costs[item][1] for item in mixture.items())

    def evaluate(self, mixture: Mixture) -> float:
        self.evaluated.append(mixture)
        return self.drop(mixture)

    def tune(self, max_drop: float, **options: Any) -> SearchResult:
        groups = list(dict.fromkeys(group for group, _ in self.costs))
        steps = TrialSteps(lambda mixture: mixture, self.latency_ms, self.evaluate, self.reporter)
        return autotune(groups, PRECISIONS, steps, max_drop=max_drop, **options)


def costs(**groups: tuple[float, float]) -> dict[tuple[str, str], tuple[float, float]]:
    """Times in int8 and the drops they cost; float32 takes 4, fp16 takes 2 and costs 0.01."""
    made: dict[tuple[str, str], tuple[float, float]] = {}
    for group, found in groups.items():
        made |= {(group, "fp32"): (4.0, 0.0), (group, "fp16"): (2.0, 0.01), (group, "int8"): found}
    return made


def test_all_in_the_lowest_precision_where_nothing_is_lost() -> None:
    tuned = FakeNetwork(costs(stem=(1.0, 0.0), tower=(1.0, 0.0))).tune(0.2)
    assert set(tuned.best.mixture.values()) == {"int8"}
    assert tuned.groups_in("int8") == ("stem", "tower")


def test_groups_that_cost_quality_stay_high() -> None:
    made = FakeNetwork(costs(stem=(1.0, 0.5), body=(1.0, 0.05), tower=(1.5, 0.3)))
    tuned = made.tune(0.2)
    assert tuned.best.mixture == {"stem": "fp16", "body": "int8", "tower": "fp16"}
    assert tuned.best.drop == pytest.approx(0.07)


def test_what_gains_most_per_loss_goes_first() -> None:
    tuned = FakeNetwork(costs(cheap=(1.9, 0.02), dear=(0.5, 0.19), good=(1.0, 0.05))).tune(0.2)
    assert tuned.best.mixture == {"cheap": "int8", "dear": "fp16", "good": "int8"}


def three_groups() -> FakeNetwork:
    """In order of time gained per quality lost: first, second, third. All three lose too much; slow
    makes int8 as a whole slow."""
    made = costs(first=(1.5, 0.05), second=(1.8, 0.04), third=(1.5, 0.12), slow=(9.0, 0.0))
    return FakeNetwork(
        made | {(group, "fp16"): (2.0, 0.0) for group in ("first", "second", "third", "slow")}
    )


def test_changes_are_put_together_in_order_of_gain_per_loss() -> None:
    assert three_groups().tune(0.2, backtracks=0).groups_in("int8") == ("first", "second")


def test_an_earlier_change_is_taken_back_for_a_better_one() -> None:
    assert three_groups().tune(0.2).groups_in("int8") == ("first", "third")


def test_of_two_groups_the_one_that_gains_more_is_lowered() -> None:
    tuned = FakeNetwork(costs(small=(1.8, 0.02), large=(0.5, 0.17))).tune(0.185)
    assert tuned.best.mixture == {"small": "fp16", "large": "int8"}


def test_a_mixture_that_is_not_faster_is_not_evaluated() -> None:
    made = FakeNetwork(costs(stem=(2.5, 0.0), tower=(1.0, 0.0)))
    tuned = made.tune(0.2)
    assert tuned.best.mixture == {"stem": "fp16", "tower": "int8"}
    slow = [trial.mixture for trial in tuned.trials if trial.drop is None]
    assert slow
    assert all(mixture not in made.evaluated for mixture in slow)


def test_what_is_fast_only_together_is_found_from_above() -> None:
    """As with 8-bit layers, which need conversions where they meet others: alone none is faster."""

    class Bound(FakeNetwork):
        def latency_ms(self, mixture: Mixture) -> float:
            borders = sum(a != b for a, b in itertools.pairwise(mixture.values()))
            return super().latency_ms(mixture) + 1.5 * borders

    made = {
        (group, p): (2.0 if p == "int8" else 3.0, 0.0) for group in "abcdef" for p in PRECISIONS
    }
    lossy = {("a", "int8"): (2.0, 0.5), ("b", "int8"): (2.0, 0.4)}
    assert Bound(made | lossy).tune(0.2).groups_in("int8") == ("c", "d", "e", "f")


def test_a_known_order_saves_trials() -> None:
    made = costs(stem=(1.0, 0.5), body=(1.0, 0.05), tower=(1.5, 0.3))
    measured, known = (
        FakeNetwork(made).tune(0.2),
        FakeNetwork(made).tune(0.2, ranked=("stem", "tower", "body")),
    )
    assert known.best.mixture == measured.best.mixture
    assert len(known.trials) < len(measured.trials)


def test_noise_is_no_gain() -> None:
    made = costs(stem=(1.999, 0.0), tower=(1.0, 0.0))
    assert (
        FakeNetwork(made).tune(0.2).best.mixture["stem"] == "int8"
    )  # all in int8 was tried as a whole
    assert (
        FakeNetwork(costs(stem=(1.999, 0.5), tower=(1.0, 0.0))).tune(0.2).best.mixture["stem"]
        == "fp16"
    )


def test_the_reference_is_left_where_nothing_else_is_good_enough() -> None:
    tuned = FakeNetwork(costs(stem=(1.0, 0.5))).tune(0.0)
    assert tuned.best.mixture == {"stem": "fp32"}
    assert tuned.best.drop == 0


@given(st.integers(0, 2**32), st.integers(1, 5), st.floats(0, 0.5))
def test_within_the_limit_never_slower_than_uniform_and_reproducible(
    seed: int, count: int, max_drop: float
) -> None:
    chance = random.Random(seed)
    groups = [f"group{i}" for i in range(count)]
    made = {
        (group, p): (chance.uniform(0.5, 4), 0.0 if p == "fp32" else chance.uniform(0, 0.3))
        for group in groups
        for p in PRECISIONS
    }
    tuned, again = FakeNetwork(made).tune(max_drop), FakeNetwork(made).tune(max_drop)
    assert tuned == again
    assert tuned.best.drop is not None
    assert tuned.best.drop <= max_drop
    whole = FakeNetwork(made)
    for precision in PRECISIONS:
        uniform = dict.fromkeys(groups, precision)
        if whole.drop(uniform) <= max_drop:
            assert tuned.best.latency_ms * 0.99 <= whole.latency_ms(uniform)
    assert len(tuned.trials) <= min(3**count, 3 + 8 * count)


def test_close_to_the_best_of_all_on_random_networks() -> None:
    chance = random.Random(0)
    groups = [f"group{i}" for i in range(5)]
    shares = []
    for _ in range(40):
        made = {}
        for group in groups:
            time = chance.uniform(1, 5)
            made |= {
                (group, "fp32"): (time, 0.0),
                (group, "fp16"): (time / 2, 0.01),
                (group, "int8"): (time / 3, chance.uniform(0, 0.2)),
            }
        network = FakeNetwork(made)
        mixtures = [
            dict(zip(groups, chosen, strict=True))
            for chosen in itertools.product(PRECISIONS, repeat=len(groups))
        ]
        best = min(
            network.latency_ms(mixture) for mixture in mixtures if network.drop(mixture) <= 0.25
        )
        shares.append(network.tune(0.25).best.latency_ms / best)
    assert max(shares) < 1.1
    assert sum(shares) / len(shares) < 1.02


def test_the_log_has_a_line_for_every_trial() -> None:
    made = FakeNetwork(costs(stem=(1.0, 0.5), tower=(1.0, 0.0)))
    tuned = made.tune(0.2)
    assert len(made.reporter.lines) == len(tuned.trials) + 1
    assert made.reporter.lines[0] == "trial 1: fp32; 8.000 ms, drop 0.000, within 0.2"
    assert made.reporter.lines[2] == "trial 3: int8; 2.000 ms, drop 0.500, beyond 0.2"
    assert (
        made.reporter.lines[-1]
        == f"best of {len(tuned.trials)}: fp16, but int8 in tower; 3.000 ms, drop 0.010"
    )
    printed = StringIO()
    Console(width=120, file=printed).print(tuned.table())
    assert "fp16, but int8 in tower" in printed.getvalue()
    assert tuned.to_dict()["best"]["mixture"] == {"stem": "fp16", "tower": "int8"}


def test_mixtures_in_words() -> None:
    assert (
        describe_mixture({"a": "fp16", "b": "fp16", "c": "int8", "d": "fp32"})
        == "fp16, but int8 in c, but fp32 in d"
    )


@pytest.mark.parametrize(
    ("groups", "precisions", "max_drop", "word"),
    [
        ([], PRECISIONS, 0.2, "groups are none"),
        (["a", "a"], PRECISIONS, 0.2, "none of them twice"),
        (["a"], PRECISIONS, -1, "0 or more"),
    ],
)
def test_bad_input(
    groups: list[str], precisions: tuple[str, ...], max_drop: float, word: str
) -> None:
    steps = TrialSteps(
        lambda mixture: mixture, lambda model: 1.0, lambda model: 0.0, Reporter.silent()
    )
    with pytest.raises(ToodError, match=word):
        autotune(groups, precisions, steps, max_drop=max_drop)
    with pytest.raises(ToodError, match="ranked are b, which are no groups"):
        autotune(["a"], PRECISIONS, steps, max_drop=0.2, ranked=["b"])


def pretend_to_quantize(
    seen: list[Collection[str]],
) -> Callable[[onnx.ModelProto, Collection[str]], onnx.ModelProto]:
    """A function that leaves the graph as it is and remembers which layers should stay high."""

    def quantize(model: onnx.ModelProto, keep: Collection[str]) -> onnx.ModelProto:
        seen.append(keep)
        return model

    return quantize


def test_parts_of_the_network(model: onnx.ModelProto) -> None:
    parts = network_parts(model)
    assert {
        "backbone.conv1",
        "backbone.layer4",
        "neck.fpn_convs",
        "bbox_head.inter_convs",
    } <= parts.keys()
    assert len(parts["bbox_head.inter_convs"]) == 6
    assert all(name.startswith(part) for part, names in parts.items() for name in names)


def test_parts_by_sensitivity() -> None:
    parts = {
        "stem": ("stem.conv",),
        "tower": ("tower.0.conv", "tower.1.conv"),
        "last": ("last.conv",),
    }
    found = [
        Sensitivity("tower.*.conv", 0.2),
        Sensitivity("stem.conv", 0.3),
        Sensitivity("tower.1.conv", 0.2),
    ]
    assert rank_parts(parts, found) == ("tower", "stem", "last")


def test_a_mixture_becomes_a_graph(model: onnx.ModelProto) -> None:
    parts, seen = network_parts(model), list[Collection[str]]()
    mixture = dict.fromkeys(parts, "fp16") | {"backbone.conv1": "fp32", "backbone.layer4": "int8"}
    mixed = mix_precisions(model, mixture, parts, quantize=pretend_to_quantize(seen))
    onnx.checker.check_model(mixed, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in mixed.graph.initializer}
    assert kinds["detector.model.backbone.conv1.weight"] == TensorProto.FLOAT
    assert kinds["detector.model.backbone.layer1.0.conv1.weight"] == TensorProto.FLOAT16
    (high,) = seen
    assert "backbone.layer1.0.conv1" in high
    assert not [name for name in high if name.startswith("backbone.layer4")]


def test_what_is_beside_8_bits(model: onnx.ModelProto) -> None:
    parts = network_parts(model)
    mixture = dict.fromkeys(parts, "int8")
    halves: tuple[tuple[LowPrecision | None, int], ...] = (
        (None, TensorProto.FLOAT),
        ("bf16", TensorProto.BFLOAT16),
    )
    for half, kind in halves:
        mixed = mix_precisions(
            model, mixture, parts, quantize=pretend_to_quantize([]), beside_int8=half
        )
        kinds = {tensor.name: tensor.data_type for tensor in mixed.graph.initializer}
        assert kinds["detector.model.bbox_head.tood_cls.weight"] == kind


def test_wrong_mixtures(model: onnx.ModelProto) -> None:
    parts = network_parts(model)
    with pytest.raises(ToodError, match="bf16 and fp16"):
        mix_precisions(model, dict.fromkeys(parts, "fp16") | {"backbone.conv1": "bf16"}, parts)
    with pytest.raises(ToodError, match="nothing to quantise with"):
        mix_precisions(model, dict.fromkeys(parts, "int8"), parts)
