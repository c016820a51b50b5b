"""What the server counts, as Prometheus reads it.

Events of requests and batches come in, the text of `GET /metrics` goes out. Every server has a
registry of its own, so that two in one process do not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

from tood_deploy.serve.batcher import PendingImage

STAGES = ("read", "decode", "queue", "infer", "total")
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SMOOTHING = 0.05  # of the mean time of an image: about the last twenty batches count


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

    def add_queue(self, depths: Callable[[], dict[str, int]]) -> None:
        """Show how many images wait for each model, as it is when somebody asks."""

        class Queues:
            """What `CollectorRegistry` asks."""

            def collect(self) -> list[Metric]:
                """Return the gauge."""
                gauge = GaugeMetricFamily(
                    "tood_queue_depth", "Images that wait for the network.", labels=["model"]
                )
                for model, depth in depths().items():
                    gauge.add_metric([model], depth)
                return [gauge]

        self.registry.register(Queues())  # pyright: ignore[reportArgumentType] - by its protocol

    def text(self) -> bytes:
        """Return what Prometheus reads."""
        return generate_latest(self.registry)
