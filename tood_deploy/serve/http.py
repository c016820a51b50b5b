"""What all requests share: limits on bodies, the time limit, the token, errors, the access log.

An ASGI message comes in, a checked body or an `HttpError` goes out. Knows no models.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
import uuid
import zlib
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tood_deploy.errors import InputError
from tood_deploy.serve.batcher import QueueFull

Answer = TypeVar("Answer")
Handler = Callable[[Request], Awaitable[Response]]

CLIENT_GONE = 499  # nobody reads it; it stands in the access log and the metrics
UNSAFE_ID = re.compile(r"[^\x21-\x7e]")
MAX_ID = 128
OPEN_PATHS = ("/", "/docs", "/openapi.json", "/v2/health/live", "/v2/health/ready")


class HttpError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Hold what will be answered.

        Args:
            status: of HTTP.
            message: one line: what was found, what was expected, what to do.
            headers: of the answer.
        """
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return JSON in ASCII: whatever a client has sent, half a surrogate pair too, can be quoted.

    Args:
        content: what to write.
        status: of HTTP.
        headers: of the answer.
    """
    text = json.dumps(content, separators=(",", ":"))
    return Response(text, status, headers, media_type="application/json")


def error_response(error: Exception) -> Response:
    """Return the answer for what a handler has raised, a JSON object with one `error`."""
    status, headers = 500, {}
    if isinstance(error, HttpError):
        status, headers = error.status, error.headers
    elif isinstance(error, InputError):
        status = 400
    message = " ".join(str(error).split()) or type(error).__name__
    return json_response({"error": message}, status, headers)


@dataclass
class RequestRecord:
    """What the access log and the metrics say of a request; handlers fill it in.

    Attributes:
        id: the client's `X-Request-Id`, else one of our own.
        model: that the request is about; "" where none is.
        route: the path with its parameters' names.
        images: how many were in it.
        held_bytes: of its body, as `BodyBudget` counts them.
        started_s: seconds of `time.perf_counter`.
    """

    id: str
    model: str = ""
    route: str = ""
    images: int = 0
    held_bytes: int = 0
    started_s: float = field(default_factory=time.perf_counter)

    def elapsed_s(self) -> float:
        """Return seconds since the request began."""
        return time.perf_counter() - self.started_s


def record_of(request: Request) -> RequestRecord:
    """Return the record of a request."""
    return request.scope["state"]["record"]


class BodyBudget:
    """How many bytes of bodies are in memory at a time, whatever many clients send at once.

    Attributes:
        limit: of all bodies together.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._held = limit, 0

    def take(self, record: RequestRecord, size: int) -> None:
        """Count bytes that a request holds until it is answered.

        Raises:
            HttpError: there are too many already.
        """
        if self._held + size > self.limit:
            raise HttpError(
                503,
                f"{self._held} bytes of bodies are in memory already; try again later",
                {"Retry-After": "1"},
            )
        self._held += size
        record.held_bytes += size

    def give_back(self, record: RequestRecord) -> None:
        """Count what a request held as free."""
        self._held -= record.held_bytes
        record.held_bytes = 0


class Gate:
    """The outermost layer: token, request ids, the access log; nothing passes by it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        budget: BodyBudget,
        log: Callable[[str], None] | None,
        count: Callable[[RequestRecord, int], None],
    ) -> None:
        """Wrap an application.

        Args:
            app: that is called for what passes.
            token: that requests must bear; None where anybody may ask.
            budget: gets back what a request held.
            log: gets a line of JSON for every request; None for no log.
            count: gets every request that was answered, and its status.
        """
        self._app, self._budget, self._log, self._count = app, budget, log, count
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = UNSAFE_ID.sub("", headers.get(b"x-request-id", b"").decode("latin-1"))[:MAX_ID]
        record = RequestRecord(given or uuid.uuid4().hex)
        scope.setdefault("state", {})["record"] = record
        status, sent = 500, 0

        async def send_counted(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", record.id.encode("ascii")),
                ]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            if self._allowed(scope["path"], headers):
                await self._app(scope, receive, send_counted)
            else:
                refusal = json_response(
                    {"error": "a bearer token is needed; send it as Authorization: Bearer TOKEN"},
                    401,
                    {"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, send_counted)
        finally:
            self._budget.give_back(record)
            self._count(record, status)
            if self._log is not None:
                self._log(_log_line(scope, record, status, sent))

    def _allowed(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        if self._token is None or path in OPEN_PATHS:
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), self._token)


def _log_line(scope: Scope, record: RequestRecord, status: int, sent: int) -> str:
    client = scope.get("client") or ("", 0)
    values = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": record.id,
        "client": client[0],
        "method": scope["method"],
        "path": scope["path"],
        "model": record.model,
        "images": record.images,
        "status": status,
        "bytes": sent,
        "ms": round(record.elapsed_s() * 1000, 1),
    }
    return json.dumps(values)


def remaining_s(record: RequestRecord, timeout_s: float) -> float:
    """Return how many seconds of a request's time are left, at least none."""
    return max(0.0, timeout_s - record.elapsed_s())


async def read_body(request: Request, max_body: int, timeout_s: float, budget: BodyBudget) -> bytes:
    """Read a request's body, unpacked where it is compressed.

    Args:
        request: whose body was not read.
        max_body: the most bytes, compressed or not.
        timeout_s: how long the request may take altogether.
        budget: of all bodies together.

    Raises:
        HttpError: too large, too slow, or compressed in a way that is not known.
    """
    too_large = HttpError(
        413, f"the body is larger than {max_body} bytes; send less, or serve with more --max-body"
    )
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > max_body:
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(remaining_s(record_of(request), timeout_s)):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_body:
                    raise too_large
                budget.take(record_of(request), len(chunk))
                chunks.append(chunk)
    except TimeoutError as error:
        raise HttpError(
            408, f"the body did not arrive within {timeout_s:g} seconds; send it faster"
        ) from error
    except ClientDisconnect as error:
        raise HttpError(CLIENT_GONE, "the client has gone") from error
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    return _unpacked(body, request.headers.get("content-encoding", "identity"), max_body)


def _unpacked(body: bytes, encoding: str, max_body: int) -> bytes:
    """Undo a content encoding, within the limit on bodies."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise HttpError(415, f"content encoding {encoding[:40]!r}; expected gzip, deflate or none")
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | (16 if encoding == "gzip" else 0))
    try:
        unpacked = unpacker.decompress(body, max_body + 1)
    except zlib.error as error:
        raise HttpError(400, f"the body is not {encoding} ({error}); send it again") from error
    if len(unpacked) > max_body:
        raise HttpError(
            413,
            f"unpacked the body is larger than {max_body} bytes; send less, or serve with "
            "more --max-body",
        )
    if not unpacker.eof:
        raise HttpError(400, f"the body is cut: its {encoding} data do not end; send it again")
    return unpacked


async def wait_for(
    request: Request, answers: list[Future[Answer]], timeout_s: float
) -> list[Answer]:
    """Wait for answers of the batcher, unless the client goes or time is up.

    Args:
        request: whose body was read.
        answers: what to wait for; cancelled where nobody waits any more.
        timeout_s: how long the request may take altogether.

    Raises:
        HttpError: the time was up, or the client has gone.
        Exception: whatever the network has raised.
    """
    wrapped = [asyncio.wrap_future(answer) for answer in answers]
    everything = asyncio.gather(*wrapped)
    everything.add_done_callback(_look_at)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        done, _ = await asyncio.wait(
            {everything, gone},
            timeout=remaining_s(record_of(request), timeout_s),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if everything in done:
            return everything.result()
        if gone in done:
            raise HttpError(CLIENT_GONE, "the client has gone")
        raise HttpError(
            504, f"no answer within {timeout_s:g} seconds; try again later", {"Retry-After": "1"}
        )
    finally:
        gone.cancel()
        everything.cancel()


def _look_at(outcome: asyncio.Future[list[Answer]]) -> None:
    """Take note of an error that nobody waits for, about which asyncio would write lines."""
    if not outcome.cancelled():
        outcome.exception()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def busy(error: QueueFull, retry_after_s: int) -> HttpError:
    """Return the answer of a server that has no place for more images."""
    return HttpError(503, str(error), {"Retry-After": str(retry_after_s)})


def number_from(request: Request, name: str, default: float) -> float:
    """Return a threshold of the query, 0 to 1.

    Args:
        request: with the query.
        name: of the parameter.
        default: where it is not given.

    Raises:
        HttpError: it is no such number.
    """
    text: Any = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:  # a NaN is neither
        raise HttpError(400, f"{name} is {text[:40]!r}; expected a number from 0 to 1")
    return value


def check_query(request: Request, known: tuple[str, ...]) -> None:
    """Refuse parameters that would have no effect.

    Raises:
        HttpError: there is one, or one stands twice.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    if strange := sorted({name for name in names if name not in known or names.count(name) > 1}):
        raise HttpError(
            400,
            f"the query has {', '.join(strange)[:200]!r}, unknown or twice; expected "
            f"{', '.join(known) or 'none'}",
        )


def no_model(name: str, served: list[str]) -> HttpError:
    """Return the answer for a model that is not served."""
    return HttpError(404, f"no model {name[:100]!r} is served; there is {', '.join(served)}")
