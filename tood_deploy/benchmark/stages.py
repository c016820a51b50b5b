"""The stages of a detector, from padded pictures to detections, and the one face of whatever runs them.

A runner runs all stages at once, as deployed, or one alone from given values: so the deviation of a stage can be told apart from what
it was handed. Knows no runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from tood_deploy.graph_io import INPUTS, OUTPUTS, STAGE_VALUES

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: "pixels", "backbone", "pyramid", "head", "candidates" or "detections".
        reads: the values of the stage before, by their names in the exported graph.
        gives: its own values.
    """

    name: str
    reads: tuple[str, ...]
    gives: tuple[str, ...]


def _stages() -> tuple[Stage, ...]:
    gives = STAGE_VALUES | {"detections": OUTPUTS}
    reads = ((), *gives.values())
    return tuple(Stage(name, before, own) for before, (name, own) in zip(reads, gives.items(), strict=False))


STAGES = _stages()
GROUPS = {"pre-processing": STAGES[:1], "network": STAGES[1:4], "post-processing": STAGES[4:]}


class StageRunner(ABC):
    """A detector whose stages can be looked at. Use as the engines: close it when done.

    Attributes:
        name: the runtime, for reports.
        has_stages: whether the values between the stages can be had; otherwise `run_all` gives detections alone.
    """

    name: str
    has_stages: bool

    @abstractmethod
    def run_all(self, inputs: Values) -> Values:
        """Every stage, as deployed: `inputs` (`INPUTS` of the exported graph) and what the stages give."""

    @abstractmethod
    def run(self, stage: Stage, values: Values) -> Values:
        """One stage alone.

        Args:
            stage: which.
            values: the graph's inputs, and what the stage reads.

        Returns:
            What the stage gives.
        """

    def run_chain(self, stages: Sequence[Stage], values: Values) -> Values:
        """Neighbouring stages one after another, each from what the one before gave; `values` and all of that."""
        values = dict(values)
        for stage in stages:
            values |= self.run(stage, values)
        return values


def graph_inputs(values: Values) -> Values:
    """What of these values the whole graph takes."""
    return {name: values[name] for name in INPUTS}
