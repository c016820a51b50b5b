"""One server process: a socket, the models opened behind it, and an orderly end.

Comes in: what to serve and where. Goes out: HTTP, until SIGTERM or Ctrl-C. Knows no routes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from tood_deploy.errors import ToodError
from tood_deploy.reporter import Reporter
from tood_deploy.serve.app import build_app
from tood_deploy.serve.models import ServeLimits, open_model
from tood_deploy.serve.state import ServerState

BACKLOG = 2048
DRAIN_EXTRA_S = 5.0  # beyond the time limit of a request
KEEP_ALIVE_S = 75  # more than the 60 s after which load balancers let go of a connection
MAX_PORT = 65535
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeConfig:
    """What to serve, and where.

    Attributes:
        models: path of an artefact, or what else `Detector` takes, by the name it is served under.
        host: an address of this machine.
        port: 0 for any that is free.
        token: that requests must bear; None where anybody may ask.
        limits: of a request.
        access_log: whether every request leaves a line on stdout.
    """

    models: Mapping[str, str]
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    limits: ServeLimits = field(default_factory=ServeLimits)
    access_log: bool = True

    def __post_init__(self) -> None:
        # The event loop would take the number's lowest 16 bits in silence.
        if not 0 <= self.port <= MAX_PORT:
            raise ToodError(f"--port is {self.port}; expected 0 (any that is free) to {MAX_PORT}")


def run_server(
    config: ServeConfig,
    reporter: Reporter,
    *,
    check: Callable[[str, str], None] | None = None,
    **options: Any,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then answer what was accepted, and return.

    Args:
        config: what to serve.
        reporter: of what happens; of the access log on stdout.
        check: is given name and path of every model before it is opened; warns or refuses.
        **options: of `Detector`, for every model.

    Raises:
        ToodError: the port is taken, or a model cannot be opened.
        KeyboardInterrupt: Ctrl-C; all requests were answered.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    listener = bind(config.host, config.port)
    port = listener.getsockname()[1]
    reporter.info(_where(config, port))
    state = ServerState([*config.models], config.limits, reporter.warn)
    app = build_app(state, token=config.token, log=reporter.result if config.access_log else None)
    opener = ModelOpener(config, state, reporter, options, check)
    server = uvicorn.Server(
        uvicorn.Config(
            _with_lifespan(app, opener, lambda: setattr(server, "should_exit", True)),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(config.limits.timeout_s + DRAIN_EXTRA_S),
        )
    )
    with _server_log(reporter), _sigterm_ends_well(), listener:
        server.run(sockets=[listener])
    if opener.failure is not None:
        raise opener.failure
    reporter.info("stopped; everything that was accepted was answered")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before anything takes long.

    Args:
        host: an address of this machine.
        port: 0 for any that is free.

    Raises:
        ToodError: the port is taken, or the address is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ToodError(
            f"--host {host} --port {port}: no address of this machine ({error}); try 127.0.0.1, or "
            "0.0.0.0 for all of its addresses"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        cure = (
            "another program listens there: choose another --port"
            if error.errno == errno.EADDRINUSE
            else "choose another --host or --port"
        )
        raise ToodError(
            f"{host}:{port} cannot be listened on ({error.strerror}); {cure}"
        ) from error
    return listener


def _where(config: ServeConfig, port: int) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    names = ", ".join(config.models)
    if config.host in LOOPBACK:
        reach = "for programs on this machine alone; --host 0.0.0.0 opens it to the network"
    elif config.token is None:
        reach = "for everybody who reaches this address, without authentication; see --token-file"
    else:
        reach = "for those who bear the token"
    return f"serving {names} on http://{host}:{port}/, {reach}"


class ModelOpener:
    """Opens the models in a thread, while the server already says that it lives.

    Attributes:
        state: of the server; gets the models.
        failure: why a model could not be opened; None where all could.
    """

    def __init__(
        self,
        config: ServeConfig,
        state: ServerState,
        reporter: Reporter,
        options: Mapping[str, Any],
        check: Callable[[str, str], None] | None,
    ) -> None:
        """Open nothing yet.

        Args:
            config: with the models.
            state: gets them.
            reporter: of every model.
            options: of `Detector`.
            check: is given name and path of every model first.
        """
        self.state, self._config, self._reporter = state, config, reporter
        self._options, self._check = options, check
        self.failure: ToodError | None = None

    def run(self, stop: Callable[[], object]) -> None:
        """Open all models; at the first that cannot be opened, stop the server."""
        for name, model in self._config.models.items():
            if self.state.stopping:
                return
            try:
                self._open(name, model)
            except ToodError as error:
                self.failure = error
            except Exception as error:  # of the runtime's own types
                self.failure = ToodError(
                    f"{name}: {model} cannot be served ({type(error).__name__}: {error}); see that "
                    "tood-infer runs it"
                )
            if self.failure is not None:
                stop()
                return
        self._reporter.info("ready")

    def _open(self, name: str, model: str) -> None:
        if self._check is not None:
            self._check(name, model)
        self._reporter.info(f"{name}: opening {model}")
        state = self.state
        observe = state.metrics.batch_observer(name)
        served = open_model(name, model, state.limits, observe, **self._options)
        state.add(served)
        self._reporter.info(f"{name}: {served.detector.engine.name}, proven and warm")

    def close(self) -> None:
        """Free the models."""
        self.state.close()


def _with_lifespan(app: ASGIApp, opener: ModelOpener, stop: Callable[[], object]) -> ASGIApp:
    """Return an application that opens the models when it starts, and frees them when it ends."""

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        thread = threading.Thread(target=opener.run, args=(stop,), name="open-models")
        thread.start()
        try:
            yield
        finally:
            opener.state.stopping = True
            await asyncio.to_thread(thread.join)
            await asyncio.to_thread(opener.close)

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        async with lifespan():
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    return call


class AccessLog:
    """Prints a line for every request on stdout, until nobody reads it any more."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._open = reporter, True

    def __call__(self, line: str) -> None:
        """Print a line."""
        if not self._open:
            return
        try:
            self._reporter.result(line)
        except (OSError, ToodError) as error:  # the requests matter more than their log
            self._open = False
            self._reporter.warn(f"the access log ends: stdout takes no more lines ({error})")


@contextmanager
def _sigterm_ends_well() -> Iterator[None]:
    """Let SIGTERM end the process with exit code 0.

    Uvicorn drains on it, then sends it again to whoever handled it before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _server_log(reporter: Reporter) -> Iterator[None]:
    """Send what uvicorn has to say through the reporter: errors alone."""

    class ToReporter(logging.Handler):
        """A handler of the standard library's logging."""

        def emit(self, record: logging.LogRecord) -> None:
            """Print a record."""
            reporter.problem(self.format(record))

    logging.getLogger("python_multipart").addHandler(logging.NullHandler())  # a 400 says it
    logger, handler = logging.getLogger("uvicorn.error"), ToReporter(logging.ERROR)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
