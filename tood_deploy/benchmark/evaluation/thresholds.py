"""The threshold of every class that does what a user asks for, and the file that carries it on.

Annotations, detections and their matches come in; thresholds by class go out, as `tood-infer
--conf` reads them. A wish is the best F1, a precision, a recall, or a bound on the share of missed
objects that holds on new images with a stated confidence.

The bound is that of risk-controlling prediction sets (Bates, Angelopoulos, Lei, Malik, Jordan,
"Distribution-free, risk-controlling prediction sets", J. ACM 68(6), 2021), with the
Hoeffding-Bentkus p-value of "Learn then Test" (Angelopoulos, Bates, Candès, Jordan, Lei,
arXiv:2110.01052). The risk of a class is the expected share of its objects in an image that are
missed, over images that have such objects. It falls as the threshold falls, so the highest
threshold whose p-value is small enough is safe, whatever the detector and the distribution, as long
as the images are exchangeable with those to come.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.evaluation.analysis import Cut, F1Curve, Thresholds
from tood_deploy.benchmark.html_report import write_json
from tood_deploy.data.coco import Annotations
from tood_deploy.data.coco_metrics import Matches
from tood_deploy.errors import ToodError
from tood_deploy.files import file_sha256
from tood_deploy.inference.thresholds import DEFAULT_CONF, ClassThresholds

FORMAT = "tood thresholds 1"
Kind = Literal["f1", "precision", "recall", "miss_rate"]
DEFAULT_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Wish:
    """What thresholds shall do.

    Attributes:
        kind: best "f1"; a "precision" or "recall" of these images; a bound on the "miss_rate".
        value: of precision, recall or miss rate, between 0 and 1; None for F1.
        confidence: of the bound, between 0 and 1.
    """

    kind: Kind = "f1"
    value: float | None = None
    confidence: float = DEFAULT_CONFIDENCE

    def __post_init__(self) -> None:
        option = "max-miss-rate" if self.kind == "miss_rate" else f"target-{self.kind}"
        if self.value is not None and not 0 < self.value < 1:
            raise ToodError(f"--{option} is {self.value}; expected a number between 0 and 1")
        if not 0 < self.confidence < 1:
            raise ToodError(f"--confidence is {self.confidence}; expected a number between 0 and 1")

    def __str__(self) -> str:
        if self.kind == "f1":
            return "best F1"
        if self.kind == "miss_rate":
            return (
                f"at most {100 * self.goal:g}% of the objects of an image missed, on average, with "
                f"{100 * self.confidence:g}% confidence"
            )
        return f"{self.kind} of at least {self.goal:g}"

    @property
    def goal(self) -> float:
        """The value that is asked for."""
        assert self.value is not None
        return self.value


@dataclass(frozen=True)
class Choice:
    """The threshold of a class.

    Attributes:
        conf: keep detections above this score.
        kept: whether the wish is fulfilled.
        precision, recall: of these images at that threshold; fractions.
        images: with objects of the class.
        missed: mean share of missed objects in these images.
        remark: why the wish is not fulfilled; empty where it is.
    """

    conf: float
    kept: bool
    precision: float
    recall: float
    images: int
    missed: float
    remark: str = ""


@dataclass(frozen=True, eq=False)
class ChosenThresholds:
    """Thresholds of all classes with objects.

    Attributes:
        wish: what they shall do.
        default: for classes without objects.
        choices: by category name.
        names: the model's classes that stand for a category, by its name; itself where absent.
    """

    wish: Wish
    default: float
    choices: Mapping[str, Choice]
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def class_thresholds(self) -> ClassThresholds:
        """Return them as a detector takes them."""
        by_class = {
            name: choice.conf
            for category, choice in self.choices.items()
            for name in self.names.get(category, (category,))
        }
        return ClassThresholds(self.default, by_class)

    def remarks(self) -> list[str]:
        """Return a sentence for every class whose wish is not fulfilled."""
        return [
            f"{name}: {choice.remark}." for name, choice in self.choices.items() if choice.remark
        ]


def choose_thresholds(
    truth: Annotations,
    matches: Matches,
    thresholds: Thresholds,
    wish: Wish,
    conf: float = 0.0,
    names: Mapping[str, Sequence[str]] | None = None,
) -> ChosenThresholds:
    """Choose the threshold of every class that has objects.

    Args:
        truth: the annotations.
        matches: of the detections.
        thresholds: curves and best cuts of the same detections.
        wish: what the thresholds shall do.
        conf: score threshold that the detections were made with: none is chosen below.
        names: the model's classes by category name.
    """
    choices = {}
    for key, name in truth.categories.items():
        curve = thresholds.curves.get(name)
        if curve is None:
            continue
        shares = missed_shares(truth, matches, key)
        best = thresholds.as_run.get(name)
        choices[name] = _choose(curve, shares, best, wish, conf)
    together = thresholds.together.conf if thresholds.together else DEFAULT_CONF
    return ChosenThresholds(wish, max(together, conf), choices, names or {})


@dataclass(frozen=True, eq=False)
class MissedShares:
    """How the objects of a class are missed as the threshold rises.

    Attributes:
        scores: (G,) rising; of the detections that match the objects, -1 where none does.
        weights: (G,) share of an object among those of its image, over the number of images: the
            weights of what is missed add up to the mean share.
        images: with objects of the class.
    """

    scores: NDArray[np.float64]
    weights: NDArray[np.float64]
    images: int

    def at(self, conf: float) -> float:
        """Return the mean share of missed objects where detections must exceed a score."""
        return float(self.weights[self.scores <= conf].sum())


def missed_shares(truth: Annotations, matches: Matches, category: int) -> MissedShares:
    """Return how the objects of a category, without crowds, are missed."""
    chosen = (truth.boxes.category_ids == category) & ~matches.truth_ignored
    _, image, counts = np.unique(
        truth.boxes.image_ids[chosen], return_inverse=True, return_counts=True
    )
    scores = matches.truth_scores[chosen]
    order = np.argsort(scores, kind="stable")
    weights = 1 / counts[image] / max(len(counts), 1)
    return MissedShares(scores[order], weights[order], len(counts))


def guaranteed_threshold(
    shares: MissedShares, max_miss_rate: float, confidence: float
) -> float | None:
    """Return the highest score threshold whose miss rate is bounded; None where there is none.

    Args:
        shares: how objects are missed in images that are exchangeable with those to come.
        max_miss_rate: bound on the expected share of missed objects in an image.
        confidence: with which it holds.
    """
    levels = np.unique(shares.scores[shares.scores >= 0])
    # Just below a level all objects of lower scores are missed.
    total = np.concatenate([[0.0], np.cumsum(shares.weights)])
    risks = total[np.searchsorted(shares.scores, levels, "left")].tolist()

    def is_unsafe(risk: float) -> bool:
        return hoeffding_bentkus(risk, shares.images, max_miss_rate) > 1 - confidence

    safe = bisect_left(risks, True, key=is_unsafe)  # the risk grows with the level
    if not safe:
        return None
    below = float(levels[safe - 2]) if safe > 1 else 0.0
    return _between(below, float(levels[safe - 1]))


def hoeffding_bentkus(risk: float, count: int, bound: float) -> float:
    """Return the p-value of the hypothesis that the expected loss exceeds a bound.

    Args:
        risk: mean loss of the images, losses from 0 to 1.
        count: of the images.
        bound: on the expected loss, between 0 and 1.
    """
    mean = min(risk, bound)
    divergence = (1 - mean) * math.log((1 - mean) / (1 - bound))
    divergence += mean * math.log(mean / bound) if mean else 0.0
    hoeffding = math.exp(-count * divergence)
    # A sum of weights is off by roundings: a loss of exactly 2 must not become 3.
    losses = math.ceil(count * risk - 1e-9)
    return min(1.0, hoeffding, math.e * _binomial_cdf(losses, count, bound))


def _binomial_cdf(successes: int, count: int, share: float) -> float:
    """Return the probability of at most so many successes."""
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(share)
        + (count - k) * math.log1p(-share)
        for k in range(min(successes, count) + 1)
    ]
    return math.fsum(map(math.exp, logs))


def images_needed(max_miss_rate: float, confidence: float) -> int:
    """Return the fewest images that can prove a bound, if nothing in them is missed."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-max_miss_rate) - 1e-9)


def _choose(
    curve: F1Curve, shares: MissedShares, best: Cut | None, wish: Wish, conf: float
) -> Choice:
    """Return the threshold of one class.

    Args:
        curve: of the class.
        shares: how its objects are missed.
        best: where its F1 is highest; None where nothing is right.
        wish: what the threshold shall do.
        conf: score threshold that the detections were made with.
    """
    remark = ""
    if wish.kind == "miss_rate":
        chosen = guaranteed_threshold(shares, wish.goal, wish.confidence)
        if chosen is None:
            chosen, remark = conf, _no_guarantee(shares, wish, conf)
    elif wish.kind == "f1":
        chosen = max(conf, DEFAULT_CONF) if best is None else best.conf
        remark = "nothing is right, so no threshold is best" if best is None else ""
    else:
        chosen, remark = _reach(curve, wish, conf)
    point = int(np.searchsorted(-curve.scores, -chosen, "left")) - 1
    precision, recall = (
        (float(curve.precision[point]), float(curve.recall[point])) if point >= 0 else (0.0, 0.0)
    )
    missed = shares.at(chosen)
    return Choice(max(chosen, conf), not remark, precision, recall, shares.images, missed, remark)


def _reach(curve: F1Curve, wish: Wish, conf: float) -> tuple[float, str]:
    """Return the threshold that reaches a precision or recall, else the nearest and a remark.

    Args:
        curve: of the class.
        wish: precision or recall.
        conf: score threshold that the detections were made with.
    """
    if not len(curve.scores):
        return conf, "there are no detections"
    values = curve.precision if wish.kind == "precision" else curve.recall
    reached = np.flatnonzero(values >= wish.goal)
    if len(reached):
        # The lowest threshold for a precision, as much recall as that allows; the highest for a
        # recall.
        point, remark = int(reached[-1] if wish.kind == "precision" else reached[0]), ""
    else:
        point = int(np.argmax(values))
        remark = f"a {wish.kind} of {wish.goal:g} is not reached, the best is {values[point]:.3f}"
    below = curve.scores[point + 1] if point + 1 < len(curve.scores) else conf
    return _between(float(below), float(curve.scores[point])), remark


def _no_guarantee(shares: MissedShares, wish: Wish, conf: float) -> str:
    needed = images_needed(wish.goal, wish.confidence)
    if shares.images < needed:
        return (
            f"too few objects to prove {wish}: {shares.images} images have some, at least {needed} "
            "are needed"
        )
    return (
        f"no threshold is proven to have {wish}: {100 * shares.at(conf):.1f}% are missed in these "
        f"{shares.images} images even above {conf:g}"
    )


def _between(below: float, score: float) -> float:
    """Return a threshold halfway, that is below the score in the detector's float32, too."""
    score32 = np.float32(score)
    return float(min(np.float32((below + score) / 2), np.nextafter(score32, np.float32(0))))


def write_thresholds(
    path: Path, chosen: ChosenThresholds, truth: Annotations, files: Mapping[int, Path], model: str
) -> None:
    """Write the thresholds as JSON that `--conf` takes, with what they were chosen on.

    Args:
        path: of the file.
        chosen: the thresholds.
        truth: the annotations.
        files: of the images; empty where they were not given.
        model: what detected.

    Raises:
        OutputError: it cannot be written.
    """
    data = {
        "annotations": str(truth.path),
        "annotations_sha256": file_sha256(truth.path),
        "images": len(truth.images),
        "images_sha256": file_sha256(*files.values()) if files else None,
    }
    values = chosen.class_thresholds().values() | {
        "format": FORMAT,
        "chosen_for": str(chosen.wish),
        "model": model,
        "data": data,
        "choices": {name: asdict(choice) for name, choice in chosen.choices.items()},
    }
    write_json(path, values)
