"""Search the fastest mixture of precisions whose quality stays.

Comes in: groups of layers, precisions, and functions that build, measure and evaluate. Goes out:
the best mixture with all trials. Knows no runtime.

First from above: where the fastest uniform precision loses too much, groups of layers are raised
until it does not, those first that give back most quality for their time. Then from below: changes
of single groups that gain time are combined, those first that gain most for what they lose. Nothing
is random: the same measurements give the same mixture.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from rich.table import Table

from tood_deploy.errors import ToodError
from tood_deploy.reporter import Reporter

# Counts as lost at least, so that changes that cost nothing are ordered by the time they gain.
MIN_LOSS = 1e-3
MIN_GAIN = 0.01
BACKTRACKS = 3

Model = TypeVar("Model")
Mixture = Mapping[str, str]


@dataclass(frozen=True)
class Trial:
    """One mixture that was measured.

    Attributes:
        mixture: the precision of every group.
        latency_ms: its latency.
        drop: how much worse than the reference it is; None where it was too slow to look at.
    """

    mixture: Mixture
    latency_ms: float
    drop: float | None


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search: the best mixture, and all trials in their order."""

    best: Trial
    trials: tuple[Trial, ...]

    def groups_in(self, precision: str) -> tuple[str, ...]:
        """Return the groups that the best mixture has in a precision."""
        return tuple(group for group, own in self.best.mixture.items() if own == precision)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return {"best": asdict(self.best), "trials": [asdict(trial) for trial in self.trials]}

    def table(self) -> Table:
        """Return all trials as a table to print, the best one marked."""
        table = Table("trial", "mixture", "latency (ms)", "drop", title="mixtures of precision")
        for number, trial in enumerate(self.trials, start=1):
            drop = "-" if trial.drop is None else f"{trial.drop:.3f}"
            style = "bold" if trial is self.best else None
            table.add_row(
                str(number),
                describe_mixture(trial.mixture),
                f"{trial.latency_ms:.3f}",
                drop,
                style=style,
            )
        return table


@dataclass(frozen=True)
class TrialSteps(Generic[Model]):
    """The steps of a trial.

    Attributes:
        build: makes the model of a mixture.
        measure: returns its latency in milliseconds, in the runtime that it is for.
        evaluate: returns how much worse than the reference it is, in points of AP or per cent of
            detections; never called for the reference.
        reporter: of every trial.
    """

    build: Callable[[Mixture], Model]
    measure: Callable[[Model], float]
    evaluate: Callable[[Model], float]
    reporter: Reporter


def autotune(
    groups: Sequence[str],
    precisions: Sequence[str],
    steps: TrialSteps[Any],
    *,
    max_drop: float,
    ranked: Sequence[str] = (),
    min_gain: float = MIN_GAIN,
    backtracks: int = BACKTRACKS,
) -> SearchResult:
    """Search for the fastest mixture.

    Args:
        groups: of layers, in the order of the network.
        precisions: the reference first.
        steps: do the work.
        max_drop: the most that quality may drop, as `steps.evaluate` counts.
        ranked: groups in the order in which they should be raised, the most sensitive first;
            measured where not given.
        min_gain: a change must make it faster by this share; less is noise.
        backtracks: how often the change with the least gain per loss may be taken back for a later
            one.

    Raises:
        ToodError: a limit below zero, nothing to choose from, the same name twice, or an unknown
            one.
    """
    _check(groups, precisions, ranked, max_drop)
    search = _Search(groups, precisions, steps, max_drop, min_gain)
    start, fastest = search.uniform()
    if not search.is_good(fastest):
        search.raise_groups(fastest, start, ranked or search.rank_raises(fastest, start))
    start = search.best_known()
    search.combine(start, search.single_changes(start), backtracks)
    best = search.best_known()
    steps.reporter.info(
        f"best of {len(search.trials)}: {describe_mixture(best.mixture)}; "
        f"{best.latency_ms:.3f} ms, drop {best.drop:.3f}"
    )
    return SearchResult(best, tuple(search.trials.values()))


def _check(
    groups: Sequence[str], precisions: Sequence[str], ranked: Sequence[str], max_drop: float
) -> None:
    for what, names in (("groups", groups), ("precisions", precisions)):
        if len(set(names)) != len(names) or not names:
            raise ToodError(
                f"{what} are {', '.join(names) or 'none'}; expected at least one, none of them "
                "twice"
            )
    if strangers := [group for group in ranked if group not in groups]:
        raise ToodError(
            f"ranked are {', '.join(strangers)}, which are no groups; "
            f"expected some of {', '.join(groups)}"
        )
    if max_drop < 0:
        raise ToodError(f"the largest drop is {max_drop}; expected 0 or more")


def describe_mixture(mixture: Mixture) -> str:
    """Return a mixture in words: its most frequent precision, and what differs."""
    common = Counter(mixture.values()).most_common(1)[0][0]
    others: dict[str, list[str]] = {}
    for group, precision in mixture.items():
        if precision != common:
            others.setdefault(precision, []).append(group)
    return ", ".join(
        [common, *(f"but {precision} in {' '.join(names)}" for precision, names in others.items())]
    )


class _Search:
    def __init__(
        self,
        groups: Sequence[str],
        precisions: Sequence[str],
        steps: TrialSteps[Any],
        max_drop: float,
        min_gain: float,
    ) -> None:
        self.groups, self.precisions, self.steps = groups, precisions, steps
        self.max_drop, self.min_gain = max_drop, min_gain
        self.trials: dict[tuple[str, ...], Trial] = {}

    def uniform(self) -> tuple[Trial, Trial]:
        """Try the mixtures of one precision alone.

        Returns:
            The fastest that is good enough, as the reference always is; and the fastest of all.
        """
        best = fastest = self.trial(dict.fromkeys(self.groups, self.precisions[0]), None)
        for precision in self.precisions[1:]:
            trial = self.trial(dict.fromkeys(self.groups, precision), best)
            fastest = trial if self.is_faster(trial.latency_ms, fastest) else fastest
            best = trial if self.is_better(trial, best) else best
        return best, fastest

    def rank_raises(self, fastest: Trial, start: Trial) -> list[str]:
        """Return the groups in order of the quality that raising each gives back for its time.

        Args:
            fastest: the fastest mixture, of which one group at a time is raised.
            start: the mixture whose precision that group gets.
        """
        ratios: dict[str, float] = {}
        for group in self.groups:
            trial = self.trial({**fastest.mixture, group: start.mixture[group]}, start)
            slower_ms = max(
                trial.latency_ms - fastest.latency_ms, self.min_gain * fastest.latency_ms
            )
            ratios[group] = (
                -_loss(fastest, trial) / slower_ms if trial.drop is not None else -math.inf
            )
        return sorted(ratios, key=lambda group: -ratios[group])

    def raise_groups(self, fastest: Trial, start: Trial, order: Sequence[str]) -> None:
        """Raise one group of the fastest mixture after the other, until it is good enough.

        Args:
            fastest: the fastest mixture.
            start: whose precision the groups get; a mixture no faster than this one ends it, too.
            order: of the groups.
        """
        mixture = dict(fastest.mixture)
        for group in order:
            mixture[group] = start.mixture[group]
            trial = self.trial(mixture, start)
            if trial.drop is None or self.is_good(trial):
                return

    def single_changes(self, start: Trial) -> list[tuple[str, str]]:
        """Return the changes of one group that gain time and lose little enough, best ratio first.

        Changes back to the reference are left out.
        """
        ratios: dict[tuple[str, str], float] = {}
        for group in self.groups:
            for precision in self.precisions[1:]:
                trial = self.trial({**start.mixture, group: precision}, start)
                if trial is not start and self.is_better(trial, start):
                    ratios[group, precision] = (start.latency_ms - trial.latency_ms) / max(
                        _loss(start, trial), MIN_LOSS
                    )
        return sorted(ratios, key=lambda change: -ratios[change])

    def combine(self, start: Trial, changes: Sequence[tuple[str, str]], backtracks: int) -> None:
        """Combine changes in their order; one that loses too much may replace the last one.

        Args:
            start: the mixture to change.
            changes: pairs of a group and its precision.
            backtracks: how often a change may replace the last one.
        """
        best, taken = start, dict[str, str]()
        for group, precision in changes:
            changed = {**taken, group: precision}
            trial = self.trial({**start.mixture, **changed}, best)
            if trial.drop is not None and not self.is_good(trial) and backtracks and taken:
                backtracks -= 1
                changed = {**dict(list(taken.items())[:-1]), group: precision}
                trial = self.trial({**start.mixture, **changed}, best)
            if self.is_better(trial, best):
                best, taken = trial, changed

    def best_known(self) -> Trial:
        """Return the fastest of all trials that are good enough."""
        return min(filter(self.is_good, self.trials.values()), key=lambda trial: trial.latency_ms)

    def is_better(self, trial: Trial, than: Trial) -> bool:
        """Return whether a trial is good enough, and faster than another by more than noise."""
        return self.is_good(trial) and self.is_faster(trial.latency_ms, than)

    def is_good(self, trial: Trial) -> bool:
        """Return whether a trial's quality is known and good enough."""
        return trial.drop is not None and trial.drop <= self.max_drop

    def is_faster(self, latency_ms: float, than: Trial) -> bool:
        """Return whether a latency is lower than that of a trial by more than noise."""
        return latency_ms < than.latency_ms * (1 - self.min_gain)

    def trial(self, mixture: Mixture, than: Trial | None) -> Trial:
        """Measure a mixture, once; its quality only where it is faster than another trial.

        Args:
            mixture: a precision for every group.
            than: the trial to be faster than; None for the reference itself.
        """
        key = tuple(mixture[group] for group in self.groups)
        if key not in self.trials:
            model = self.steps.build(mixture)
            latency_ms = self.steps.measure(model)
            worth_it = than is not None and self.is_faster(latency_ms, than)
            drop = 0.0 if than is None else self.steps.evaluate(model) if worth_it else None
            self.trials[key] = Trial(dict(mixture), latency_ms, drop)
            self.steps.reporter.info(
                f"trial {len(self.trials)}: {describe_mixture(mixture)}; {latency_ms:.3f} ms, "
                f"{self._verdict(drop)}"
            )
        return self.trials[key]

    def _verdict(self, drop: float | None) -> str:
        if drop is None:
            return "not faster"
        return (
            f"drop {drop:.3f}, {'within' if drop <= self.max_drop else 'beyond'} {self.max_drop:g}"
        )


def _loss(start: Trial, trial: Trial) -> float:
    assert start.drop is not None
    assert trial.drop is not None
    return trial.drop - start.drop
