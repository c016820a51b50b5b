"""What requests are answered from: open models, limits, metrics; and how images get their turn.

Requests come in with images that are ready for the network, detections go out. Knows no routes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from tood_deploy.matching import NetDetections
from tood_deploy.serve import protocol
from tood_deploy.serve.batcher import PendingImage, QueueFull
from tood_deploy.serve.http import (
    BodyBudget,
    HttpError,
    busy,
    no_model,
    read_body,
    record_of,
    wait_for,
)
from tood_deploy.serve.metrics import ServerMetrics
from tood_deploy.serve.models import ServedModel, ServeLimits

Result = TypeVar("Result")

BODIES_AT_A_TIME = 8  # of the largest size


class ServerState:
    """What requests are answered from.

    Attributes:
        names: of all models, those that are still being opened included.
        limits: of a request.
        models: that are open, by name.
        stopping: whether the server is on its way out.
        metrics: of the server.
        budget: of bodies in memory.
        problem: is given a line about what the operator should know.
    """

    def __init__(
        self,
        names: Sequence[str],
        limits: ServeLimits,
        problem: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Have no model yet.

        Args:
            names: of all models to come.
            limits: of a request.
            problem: is given a line about what the operator should know.
        """
        self.names, self.limits, self.problem = [*names], limits, problem
        self.models: dict[str, ServedModel] = {}
        self.stopping = False
        self.metrics = ServerMetrics()
        self.budget = BodyBudget(BODIES_AT_A_TIME * limits.max_body)
        self._workers = ThreadPoolExecutor(os.cpu_count() or 1, "decode")

    def add(self, model: ServedModel) -> None:
        """Take a model that is open, proven and warm."""
        self.metrics.add_model(
            model.name, lambda: model.batcher.depth, model.detector.class_names, model.manifest
        )
        self.models[model.name] = model

    @property
    def ready(self) -> bool:
        """Whether every model is open, proven and warm."""
        return len(self.models) == len(self.names) and not self.stopping

    async def in_worker(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run what takes long in a thread, so that other requests go on."""
        return await asyncio.get_running_loop().run_in_executor(
            self._workers, partial(function, *arguments)
        )

    def model(self, request: Request) -> ServedModel:
        """Return the model that the request's path names.

        Raises:
            HttpError: it is not served, or not open yet.
        """
        name, version = request.path_params["name"], request.path_params.get("version")
        if name not in self.names:
            raise no_model(name, self.names)
        record_of(request).model = name
        if version not in (None, protocol.VERSION):
            raise HttpError(404, f"no version {version[:40]!r} of {name}; there is 1")
        if name not in self.models:
            raise HttpError(503, f"{name} is still being opened; wait", {"Retry-After": "2"})
        return self.models[name]

    def close(self) -> None:
        """Answer what waits, then free everything."""
        self.stopping = True
        for model in self.models.values():
            model.close()
        self._workers.shutdown()


async def read_request_body(state: ServerState, request: Request, model: ServedModel) -> bytes:
    """Read the body of a request for which there is a place in the queue as yet."""
    if model.batcher.depth >= model.batcher.capacity:
        reserve_places(state, model, 1)
        model.batcher.release(1)  # one has just become free
    limits, record = state.limits, record_of(request)
    body = await read_body(request, limits.max_body, limits.timeout_s, state.budget)
    state.metrics.observe_stage(model.name, "read", record.elapsed_s())
    return body


def reserve_places(
    state: ServerState, model: ServedModel, images: int, altogether: int | None = None
) -> None:
    """Take places in the queue.

    Args:
        state: of the server.
        model: whose queue it is.
        images: how many to take.
        altogether: how many the request then has.

    Raises:
        HttpError: there are not so many free, or there never will be.
    """
    capacity = model.batcher.capacity
    if (altogether or images) > capacity:
        raise HttpError(
            413, f"{altogether or images} images or windows in a request; expected {capacity}"
        )
    try:
        model.batcher.reserve(images)
    except QueueFull as error:
        seconds = state.metrics.seconds_per_image(model.name)
        raise busy(error, model.retry_after_s(seconds)) from error


async def run_images(
    state: ServerState, request: Request, model: ServedModel, pending: Sequence[PendingImage]
) -> list[NetDetections]:
    """Queue images whose places are reserved, and wait for their detections."""
    answers = [model.batcher.submit(image) for image in pending]
    try:
        return await wait_for(request, answers, state.limits.timeout_s)
    except HttpError:
        raise
    except Exception as error:  # of the runtime's own types
        state.problem(f"{model.name}: {type(error).__name__}: {error}")
        raise HttpError(500, f"{model.name} has no answer: {error}") from error
    finally:
        model.batcher.cancel(pending)
