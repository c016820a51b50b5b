"""The stages of a detector, from padded images to detections, and the one face of what runs them.

A runner runs all stages at once, as deployed, or one alone from given values. So the deviation of a
stage can be distinguished from the deviation of its inputs. Knows no runtime.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from tood_deploy.graph_io import INPUTS, OUTPUTS, STAGE_VALUES
from tood_deploy.matching import NetDetections, split_batch

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: "pixels", "backbone", "pyramid", "head", "candidates" or "detections".
        reads: the values of the stage before, by their names in the exported graph.
        gives: its own values. Of some detectors the head hands on `RANKING` too.
    """

    name: str
    reads: tuple[str, ...]
    gives: tuple[str, ...]


def _stages() -> tuple[Stage, ...]:
    gives = STAGE_VALUES | {"detections": OUTPUTS}
    reads = ((), *gives.values())
    return tuple(
        Stage(name, before, own) for before, (name, own) in zip(reads, gives.items(), strict=False)
    )


STAGES = _stages()
DETECTIONS = STAGES[-1]
GROUPS = {"pre-processing": STAGES[:1], "network": STAGES[1:4], "post-processing": STAGES[4:]}


class StageRunner(ABC):
    """A detector whose stages can be looked at.

    Attributes:
        name: the runtime, for reports.
        has_stages: whether the values between the stages can be had; otherwise `run_all` gives
            detections alone.
    """

    name: str
    has_stages: bool

    @abstractmethod
    def run_all(self, inputs: Values) -> Values:
        """Run every stage, as deployed.

        Args:
            inputs: what `INPUTS` of the exported graph names.

        Returns:
            The inputs and what the stages give.
        """

    @abstractmethod
    def run(self, stage: Stage, values: Values) -> Values:
        """Run one stage alone.

        Args:
            stage: which.
            values: the graph's inputs, and what the stage reads.

        Returns:
            What the stage gives.
        """

    def run_with_maps(self, inputs: Values) -> Values | None:
        """Run as `run_all`; None where the maps between the stages cannot be had."""
        return self.run_all(inputs) if self.has_stages else None

    def run_chain(self, stages: Sequence[Stage], values: Values) -> Values:
        """Run neighbouring stages one after another, each from what the one before gave.

        Args:
            stages: in order.
            values: the graph's inputs, and what the first of the stages reads.

        Returns:
            These values and what the stages give.
        """
        values = dict(values)
        for stage in stages:
            values |= self.run(stage, values)
        return values


def only_inputs(values: Values) -> Values:
    """Return what of these values the whole graph takes."""
    return {name: values[name] for name in INPUTS}


def detections_of(values: Values) -> NetDetections:
    """Return the detections of the one image in a batch, without the rows that hold none."""
    return split_batch([values[name] for name in OUTPUTS])[0]


def rows_of(stage: Stage, values: Values) -> NetDetections:
    """Return the candidates or detections of the one image in a batch, without empty rows."""
    if stage == DETECTIONS:
        return detections_of(values)
    boxes, scores, labels = (values[name][0] for name in stage.gives)
    real = ~(scores <= 0)  # NaN stays, so that it is reported
    return NetDetections(boxes[real], scores[real], labels[real])
