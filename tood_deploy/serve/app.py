"""The routes of the server, as an ASGI application.

Open models come in (or are still being opened), HTTP goes out. `http` has what all requests share,
`protocol` the tensors of the Open Inference Protocol. Knows no sockets and no signals.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import resources
from typing import Any, TypeVar

import cv2
from starlette.applications import Starlette
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tood_deploy.detections import Detections
from tood_deploy.distributions import COUNTED_CONF
from tood_deploy.errors import InputError, ToodError
from tood_deploy.inference.slicing import Slicing
from tood_deploy.matching import NetDetections
from tood_deploy.serve import protocol
from tood_deploy.serve.api_description import describe_api
from tood_deploy.serve.batcher import PendingImage, QueueFull
from tood_deploy.serve.http import (
    BodyBudget,
    Gate,
    HttpError,
    RequestRecord,
    busy,
    check_query,
    error_response,
    json_response,
    no_model,
    number_from,
    read_body,
    record_of,
    wait_for,
)
from tood_deploy.serve.metrics import ServerMetrics
from tood_deploy.serve.models import DecodedImage, ServedModel, ServeLimits, Wanted

Result = TypeVar("Result")

BODIES_AT_A_TIME = 8  # of the largest size
JPEG, JSON = "image/jpeg", "application/json"
ACCEPTED = {JSON: JSON, "application/*": JSON, "*/*": JSON, JPEG: JPEG, "image/*": JPEG}
CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'"
)


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


def build_app(
    state: ServerState, *, token: str | None = None, log: Callable[[str], None] | None = None
) -> ASGIApp:
    """Return the application.

    Args:
        state: models may still be opened; requests for them are then told to wait.
        token: that requests must bear; None where anybody may ask.
        log: gets a line of JSON for every request; None for no log.
    """
    app = Starlette(
        routes=_routes(state),
        exception_handlers={
            HttpError: _answer_error,
            InputError: _answer_error,
            HTTPException: _answer_http_exception,
            Exception: _answer_error,  # a bug: uvicorn also writes where it is
        },
    )
    return Gate(app, token=token, budget=state.budget, log=log, count=partial(_count, state))


def _count(state: ServerState, record: RequestRecord, status: int) -> None:
    route = record.route or "other"
    state.metrics.count_request(record.model, route, status)
    if record.images and status < 400:
        state.metrics.observe_stage(record.model, "total", record.elapsed_s())


def _routes(state: ServerState) -> list[Route]:
    table: list[tuple[str, str, Callable[[ServerState, Request], Awaitable[Response]]]] = [
        ("GET", "/", get_page),
        ("GET", "/docs", get_docs),
        ("GET", "/openapi.json", get_api_description),
        ("GET", "/metrics", get_metrics),
        ("POST", "/detect/{name}", detect),
        ("GET", "/v2", get_server),
        ("GET", "/v2/health/live", get_live),
        ("GET", "/v2/health/ready", get_ready),
        ("POST", "/v2/repository/index", list_models),
    ]
    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        table += [
            ("GET", prefix, get_model),
            ("GET", f"{prefix}/ready", get_model_ready),
            ("GET", f"{prefix}/config", get_model_config),
            ("POST", f"{prefix}/infer", infer),
        ]
    return [
        Route(path, _endpoint(state, path, call), methods=[method]) for method, path, call in table
    ]


def _endpoint(
    state: ServerState, path: str, call: Callable[[ServerState, Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        record_of(request).route = path
        return await call(state, request)

    return answer


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "")
    hint = f"; {request.method} is not allowed, {allowed} is" if allowed else "; see /docs"
    return error_response(HttpError(error.status_code, f"{error.detail}{hint}", error.headers))


async def get_page(state: ServerState, request: Request) -> Response:
    """Return the page on which images can be tried."""
    return _html("page.html")


async def get_docs(state: ServerState, request: Request) -> Response:
    """Return the page that shows the API's description."""
    return _html("docs.html")


def _html(name: str) -> Response:
    text = resources.files("tood_deploy.serve").joinpath(name).read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": CONTENT_POLICY})


async def get_api_description(state: ServerState, request: Request) -> Response:
    """Return the OpenAPI description."""
    return json_response(describe_api(state.names, state.limits))


async def get_metrics(state: ServerState, request: Request) -> Response:
    """Return what Prometheus reads."""
    return Response(state.metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")


async def get_server(state: ServerState, request: Request) -> Response:
    """Return what the server says of itself."""
    return json_response(protocol.server_metadata())


async def get_live(state: ServerState, request: Request) -> Response:
    """Return 200 for as long as the process answers."""
    return json_response({"live": True})


async def get_ready(state: ServerState, request: Request) -> Response:
    """Return 200 once every model is open, proven and warm; 503 before and on the way out."""
    if state.ready:
        return json_response({"ready": True})
    waiting = [name for name in state.names if name not in state.models]
    why = "the server is stopping" if state.stopping else f"opening {', '.join(waiting)}"
    return json_response({"ready": False, "error": why}, 503, {"Retry-After": "2"})


async def list_models(state: ServerState, request: Request) -> Response:
    """Return the models and whether they are ready."""
    return json_response(
        [
            {
                "name": name,
                "version": protocol.VERSION,
                "state": "READY" if name in state.models else "LOADING",
                "reason": "",
            }
            for name in state.names
        ]
    )


async def get_model(state: ServerState, request: Request) -> Response:
    """Return a model's metadata."""
    model = state.model(request)
    return json_response(protocol.model_metadata(model.name, model.manifest, model.platform))


async def get_model_ready(state: ServerState, request: Request) -> Response:
    """Return 200 where a model is open, proven and warm."""
    return json_response({"name": state.model(request).name, "ready": True})


async def get_model_config(state: ServerState, request: Request) -> Response:
    """Return a model's configuration, as Triton's clients ask for it."""
    model = state.model(request)
    return json_response(
        protocol.model_config(model.name, model.manifest, model.platform, state.limits.max_batch)
    )


async def infer(state: ServerState, request: Request) -> Response:
    """Answer an inference request of the Open Inference Protocol."""
    model, record = state.model(request), record_of(request)
    body = await _read(state, request, model)
    stated = request.headers.get(protocol.BINARY_HEADER)
    if stated is not None and not (stated.isascii() and stated.isdigit() and len(stated) < 12):
        raise HttpError(400, f"{protocol.BINARY_HEADER} is {stated[:40]!r}; expected a number")
    asked = await state.in_worker(
        protocol.read_request, body, None if stated is None else int(stated)
    )
    protocol.check_batch(asked, model.detector.engine.input_shapes_hw)
    model.check_canvas(asked.images.shape[1:3])
    record.images = len(asked.images)
    _reserve(state, model, record.images)
    pending = [
        PendingImage(image, (int(rows), int(columns)), float(conf), float(iou))
        for image, (rows, columns), conf, iou in zip(
            asked.images, asked.valid_hw, asked.conf, asked.iou, strict=True
        )
    ]
    rows = await _run(state, request, model, pending)
    arrays = protocol.answer_arrays(rows, model.manifest.max_det)
    content, json_bytes = protocol.write_answer(model.name, asked, arrays)
    if json_bytes is None:
        return Response(content, media_type=JSON)
    headers = {"Inference-Header-Content-Length": str(json_bytes)}
    return Response(content, headers=headers, media_type="application/octet-stream")


async def detect(state: ServerState, request: Request) -> Response:
    """Find objects in encoded images."""
    check_query(request, ("conf", "iou", "only", "slice"))
    model, record = state.model(request), record_of(request)
    drawn = _media_type(request) == JPEG
    wanted = _wanted(request, model, drawn=drawn)
    body = await _read(state, request, model)
    files = await _files_of(request, body, state.limits)
    if drawn and len(files) != 1:
        raise HttpError(406, f"{len(files)} images; a drawn one is sent for one: ask for JSON")
    record.images = len(files)
    images = await _decode(state, model, files, wanted)
    parts = [model.pending(image, wanted) for image in images]
    flat = await _run(state, request, model, [one for own in parts for one in own])
    rows = iter(flat)
    detections = [
        model.to_detections(image, [next(rows) for _ in own], wanted)
        for image, own in zip(images, parts, strict=True)
    ]
    if wanted.conf <= COUNTED_CONF and wanted.class_scores is None and wanted.slicing is None:
        for image, own in zip(images, detections, strict=True):
            state.metrics.count_image(model.name, image.size_hw, own)
    if drawn:
        return Response(await state.in_worker(_drawn, images[0], detections[0]), media_type=JPEG)
    return json_response(
        {
            "model": model.name,
            "images": [
                _image_json(image, own) for image, own in zip(images, detections, strict=True)
            ],
            "ms": round(record.elapsed_s() * 1000, 2),
        }
    )


def _wanted(request: Request, model: ServedModel, *, drawn: bool) -> Wanted:
    """Return what the query of a request wants to know."""
    query = request.query_params
    only = [name.strip() for name in query["only"].split(",")] if "only" in query else None
    slicing = None
    if "slice" in query:
        sides = query["slice"].lower().split("x")
        try:
            numbers = [int(side) for side in sides if len(side) < 8]
            slicing = Slicing(numbers if len(numbers) > 1 else numbers[0])
        except (ValueError, IndexError, ToodError) as error:
            raise HttpError(
                400, f"slice is {query['slice'][:40]!r}; expected pixels, such as 640 or 640x960"
            ) from error
    iou = number_from(request, "iou", model.detector.iou)
    return model.wanted(query.get("conf"), iou, only, slicing, drawn=drawn)


async def _read(state: ServerState, request: Request, model: ServedModel) -> bytes:
    """Read the body of a request for which there is a place in the queue as yet."""
    if model.batcher.depth >= model.batcher.capacity:
        _reserve(state, model, 1)
        model.batcher.release(1)  # one has just become free
    limits, record = state.limits, record_of(request)
    body = await read_body(request, limits.max_body, limits.timeout_s, state.budget)
    state.metrics.observe_stage(model.name, "read", record.elapsed_s())
    return body


def _reserve(
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


async def _decode(
    state: ServerState, model: ServedModel, files: Sequence[tuple[str, bytes]], wanted: Wanted
) -> list[DecodedImage]:
    """Decode the images of a request, and take places in the queue for all of their parts."""
    _reserve(state, model, len(files))
    reserved, started_s = len(files), time.perf_counter()
    try:
        calls = [state.in_worker(model.decode, data, name, wanted) for name, data in files]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        images = [outcome for outcome in outcomes if isinstance(outcome, DecodedImage)]
        parts = sum(len(image.parts) for image in images)
        if parts > reserved:
            _reserve(state, model, parts - reserved, parts)
    except BaseException:
        model.batcher.release(reserved)
        raise
    state.metrics.observe_stage(model.name, "decode", time.perf_counter() - started_s)
    return images


async def _run(
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


async def _files_of(request: Request, body: bytes, limits: ServeLimits) -> list[tuple[str, bytes]]:
    """Return names and bytes of the images in a request."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/"):
        return [("", body)]
    parser = MultiPartParser(
        Headers(raw=request.headers.raw), _once(body), max_files=limits.queue, max_fields=0
    )
    parser.spool_max_size = limits.max_body + 1  # nothing goes to the disk
    try:
        form = await parser.parse()
    except (MultiPartException, LookupError, ValueError) as error:
        reason = getattr(error, "message", "") or "it is not multipart/form-data"
        raise HttpError(400, f"the form cannot be read: {reason}; send files alone") from error
    files = [
        (value.filename or key, await value.read())
        for key, value in form.multi_items()
        if isinstance(value, UploadFile)
    ]
    await form.close()
    if not files:
        raise HttpError(400, "no image in the form; expected at least one file")
    return files


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
    yield b""


def _media_type(request: Request) -> str:
    """Return the wanted type of the answer, JSON where the client does not say."""
    weights: dict[str, float] = {}
    for part in request.headers.get("accept", "*/*").split(","):
        name, _, parameters = part.strip().lower().partition(";")
        quality = parameters.strip().removeprefix("q=") if "q=" in parameters else "1"
        try:
            weights[name.strip()] = float(quality)
        except ValueError:
            weights[name.strip()] = 0.0
    known = {name: weight for name, weight in weights.items() if name in ACCEPTED and weight > 0}
    if not known:
        raise HttpError(406, f"answers are {JSON} or {JPEG}; send one of them as Accept")
    return ACCEPTED[max(known, key=known.__getitem__)]


def _drawn(image: DecodedImage, detections: Detections) -> bytes:
    assert image.image_bgr is not None
    _, jpeg = cv2.imencode(".jpg", detections.plot(image.image_bgr))
    return jpeg.tobytes()


def _image_json(image: DecodedImage, detections: Detections) -> Mapping[str, object]:
    rows = zip(
        detections.names(),
        detections.class_ids.tolist(),
        detections.scores.tolist(),
        detections.boxes.tolist(),
        strict=True,
    )
    return {
        "name": image.name,
        "width": image.size_hw[1],
        "height": image.size_hw[0],
        "detections": [
            {"class": name, "class_id": number, "score": score, "box": box}
            for name, number, score, box in rows
        ],
    }
