"""The routes of the server, as an ASGI application.

Open models come in (or are still being opened), HTTP goes out. `http` has what all requests share,
`protocol` the tensors of the Open Inference Protocol. Knows no sockets and no signals.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tood_deploy.errors import InputError
from tood_deploy.serve import protocol
from tood_deploy.serve.api_description import describe_api
from tood_deploy.serve.batcher import PendingImage
from tood_deploy.serve.detect import detect
from tood_deploy.serve.http import (
    Gate,
    HttpError,
    RequestRecord,
    error_response,
    json_response,
    record_of,
)
from tood_deploy.serve.state import ServerState, read_request_body, reserve_places, run_images

CONTENT_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'"
)


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
    body = await read_request_body(state, request, model)
    stated = request.headers.get(protocol.BINARY_HEADER)
    if stated is not None and not (stated.isascii() and stated.isdigit() and len(stated) < 12):
        raise HttpError(400, f"{protocol.BINARY_HEADER} is {stated[:40]!r}; expected a number")
    asked = await state.in_worker(
        protocol.read_request, body, None if stated is None else int(stated)
    )
    protocol.check_batch(asked, model.detector.engine.input_shapes_hw)
    model.check_canvas(asked.images.shape[1:3])
    record.images = len(asked.images)
    reserve_places(state, model, record.images)
    pending = [
        PendingImage(image, (int(rows), int(columns)), float(conf), float(iou))
        for image, (rows, columns), conf, iou in zip(
            asked.images, asked.valid_hw, asked.conf, asked.iou, strict=True
        )
    ]
    rows = await run_images(state, request, model, pending)
    arrays = protocol.answer_arrays(rows, model.manifest.max_det)
    content, json_bytes = protocol.write_answer(model.name, asked, arrays)
    if json_bytes is None:
        return Response(content, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(json_bytes)}
    return Response(content, headers=headers, media_type="application/octet-stream")
