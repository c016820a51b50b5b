"""What the server counts, as Prometheus reads it.

Events of requests and batches come in, the text of `GET /metrics` goes out. Every server has a
registry of its own, so that two in one process do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from tood_deploy.detections import Detections
from tood_deploy.distributions import ImageCounter, bin_names, shares, stability_index
from tood_deploy.manifest import Manifest
from tood_deploy.manifest_sections import ImageStatistics
from tood_deploy.serve.batcher import PendingImage

STAGES = ("read", "decode", "queue", "infer", "total")
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
DRIFT_WINDOW = 1000  # images
SMOOTHING = 0.05  # of the mean time of an image: about the last twenty batches count


@dataclass(frozen=True)
class ModelState:
    """What is read of a model when somebody asks.

    Attributes:
        depth: returns how many images wait.
        counter: of the images that were sent lately.
        stored: the same of calibration; None where the manifest does not say.
        class_names: of the model.
    """

    depth: Callable[[], int]
    counter: ImageCounter
    stored: ImageStatistics | None
    class_names: Sequence[str]


class ServerMetrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        labels = ("model",)
        self._requests = Counter(
            "tood_requests",
            "Requests that were answered.",
            ("model", "route", "status"),
            registry=self.registry,
        )
        self._errors = Counter(
            "tood_errors",
            "Requests that were answered with a status of 400 or above.",
            ("model", "route", "status"),
            registry=self.registry,
        )
        self._images = Counter(
            "tood_images", "Images that the network has answered.", labels, registry=self.registry
        )
        self._batches = Histogram(
            "tood_batch_size", "Images of a batch.", labels, buckets=BATCHES, registry=self.registry
        )
        self._stages = Histogram(
            "tood_stage_seconds",
            "Time of a stage: reading the body, decoding and scaling, waiting, the network, all.",
            ("model", "stage"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._seconds_per_image: dict[str, float] = {}
        self._models: dict[str, ModelState] = {}
        self.registry.register(self)  # pyright: ignore[reportArgumentType] - by its `collect`

    def count_request(self, model: str, route: str, status: int) -> None:
        """Count an answer.

        Args:
            model: that it is about; "" where it is about none, or about one that is not served.
            route: the path with its parameters' names.
            status: of HTTP.
        """
        self._requests.labels(model, route, str(status)).inc()
        if status >= 400 and not route.startswith("/v2/health"):  # there 503 is an answer
            self._errors.labels(model, route, str(status)).inc()

    def observe_stage(self, model: str, stage: str, seconds: float) -> None:
        """Count how long a stage of a request took.

        Args:
            model: that it was for.
            stage: one of `STAGES`.
            seconds: that it took.
        """
        self._stages.labels(model, stage).observe(seconds)

    def batch_observer(self, model: str) -> Callable[[Sequence[PendingImage]], None]:
        """Return what counts the batches of a model."""
        images, sizes = self._images.labels(model), self._batches.labels(model)
        queue, infer = (self._stages.labels(model, stage) for stage in ("queue", "infer"))

        def observe(batch: Sequence[PendingImage]) -> None:
            images.inc(len(batch))
            sizes.observe(len(batch))
            took = batch[0].ended_s - batch[0].started_s
            infer.observe(took)
            for pending in batch:
                queue.observe(pending.started_s - pending.queued_s)
            before = self._seconds_per_image.get(model, took / len(batch))
            self._seconds_per_image[model] = before + SMOOTHING * (took / len(batch) - before)

        return observe

    def seconds_per_image(self, model: str) -> float:
        """Return how long an image has lately taken; 0 before the first."""
        return self._seconds_per_image.get(model, 0.0)

    def add_model(
        self, name: str, depth: Callable[[], int], class_names: Sequence[str], manifest: Manifest
    ) -> None:
        """Show what is known of a model: its queue, and what it is sent beside its calibration.

        Args:
            name: that it is served under.
            depth: returns how many images wait.
            class_names: of the model.
            manifest: with the statistics of calibration, where it has some.
        """
        stored = manifest.parity.image_statistics if manifest.parity else None
        counter = ImageCounter(len(class_names), DRIFT_WINDOW)
        if stored is not None and len(stored.classes) != len(class_names):
            stored = None
        self._models[name] = ModelState(depth, counter, stored, class_names)

    def count_image(self, model: str, size_hw: tuple[int, int], detections: Detections) -> None:
        """Count an image for the distributions.

        Args:
            model: that it was sent to.
            size_hw: its rows and columns.
            detections: all above `COUNTED_CONF`; lower ones do no harm.
        """
        self._models[model].counter.add(size_hw, detections.scores, detections.class_ids)

    def collect(self) -> Iterable[Metric]:
        """Yield what is read when somebody asks; `CollectorRegistry` calls it."""
        queue = GaugeMetricFamily(
            "tood_queue_depth", "Images that wait for the network.", labels=["model"]
        )
        labels = ["model", "distribution", "bin"]
        served = GaugeMetricFamily(
            "tood_served_share", "Share of a bin among what was sent lately.", labels=labels
        )
        calibration = GaugeMetricFamily(
            "tood_calibration_share", "Share of a bin at calibration.", labels=labels
        )
        drift = GaugeMetricFamily(
            "tood_drift_psi",
            "Population stability index of what was sent lately against calibration.",
            labels=["model", "distribution"],
        )
        images = GaugeMetricFamily(
            "tood_drift_images", "Images behind tood_served_share.", labels=["model"]
        )
        for name, state in list(self._models.items()):
            queue.add_metric([name], state.depth())
            images.add_metric([name], state.counter.images)
            for kind, counts in state.counter.counts.items():
                bins = bin_names(kind, state.class_names)
                for label, share in zip(bins, shares(counts), strict=True):
                    served.add_metric([name, kind, label], share)
                if state.stored is None:
                    continue
                expected = np.array(getattr(state.stored, kind), float)
                for label, share in zip(bins, shares(expected), strict=True):
                    calibration.add_metric([name, kind, label], share)
                if counts.sum():
                    drift.add_metric([name, kind], stability_index(expected, counts))
        return [queue, images, served, calibration, drift]

    def text(self) -> bytes:
        """Return what Prometheus reads."""
        return generate_latest(self.registry)
