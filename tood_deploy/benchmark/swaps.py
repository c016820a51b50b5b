"""What each part of an artefact costs in AP when it alone takes the place of the reference's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tood_deploy.benchmark.stages import GROUPS, STAGES, StageRunner, Values
from tood_deploy.benchmark.torch_stages import REDUCED, TorchStages


class Swaps:
    """Runs the reference with one part exchanged, and keeps the COCO rows of each such run."""

    def __init__(self, reference: TorchStages, artefact: StageRunner, precision: str) -> None:
        """Takes the two, and the precision of the artefact's arithmetic, which alone is exchanged where the artefact has no stages."""
        self.reference, self.artefact = reference, artefact
        self.reduced = TorchStages(reference.detector, REDUCED[precision]) if precision in REDUCED else None
        self.parts = GROUPS if artefact.has_stages else {}
        self.rows: dict[str, list[dict[str, Any]]] = {part: [] for part in (*self.parts, *(["precision"] if self.reduced else []))}

    def add(self, values: Values, alone: Mapping[str, Values], to_rows: Callable[[Values], list[dict[str, Any]]]) -> None:
        """Adds one picture.

        Args:
            values: the reference's, of all stages.
            alone: what each stage of the artefact made of these; empty where it has no stages.
            to_rows: COCO rows of detections.
        """
        for part, stages in self.parts.items():
            swapped = self.artefact.run_chain(stages[1:], values | alone[stages[0].name])
            same = all(np.array_equal(swapped[name], values[name]) for name in stages[-1].gives)
            self.rows[part] += to_rows(values if same else self._finish(swapped, stages[-1].name))
        if self.reduced is not None:
            network = GROUPS["network"]
            self.rows["precision"] += to_rows(self._finish(self.reduced.run_chain(network, values), network[-1].name))

    def _finish(self, values: Values, last_done: str) -> Values:
        """The reference's stages after this one."""
        done = [stage.name for stage in STAGES].index(last_done)
        return self.reference.run_chain(STAGES[done + 1 :], values)
