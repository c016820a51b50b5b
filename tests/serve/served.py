"""An engine that waits as long as a test wants, and a server in a thread."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray

from tood_deploy.engines import BatchDetections, Engine
from tood_deploy.inference.detector import Detector
from tood_deploy.manifest import Manifest
from tood_deploy.presets import PRESETS
from tood_deploy.serve.app import build_app
from tood_deploy.serve.models import ServedModel, ServeLimits
from tood_deploy.serve.server import bind
from tood_deploy.serve.state import ServerState

MAX_DET = 100


class CountingEngine(Engine):
    """Finds in every image as many objects as its first pixel's red says, with falling scores."""

    name, device = "Counting 1.0", "cpu"

    def __init__(self, *, in_flight: int = 1) -> None:
        self.manifest = Manifest(PRESETS["tiny"])
        self.in_flight = in_flight
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()  # since a test has cleared it
        self.batches: list[int] = []
        self.broken: int | None = None  # an image with this red value breaks its batch

    def _run(
        self,
        images: NDArray[np.uint8],
        valid_hw: NDArray[np.int32],
        score_threshold: float,
        iou_threshold: float,
    ) -> BatchDetections:
        self.entered.set()
        self.gate.wait(20)
        self.batches.append(len(images))
        reds = images[:, 0, 0, 0]
        if self.broken is not None and self.broken in reds:
            raise RuntimeError("out of memory")
        scores = np.tile(np.linspace(0.99, 0.0, MAX_DET, dtype=np.float32), (len(images), 1))
        places = np.arange(MAX_DET)[None]
        counts = np.minimum(reds, (scores > score_threshold).sum(1)).astype(np.int32)
        kept = places < counts[:, None]
        boxes = np.zeros((len(images), MAX_DET, 4), np.float32)
        boxes[..., 2:] = 10
        return BatchDetections(
            counts,
            np.where(kept[..., None], boxes, 0).astype(np.float32),
            np.where(kept, scores, 0).astype(np.float32),
            np.zeros((len(images), MAX_DET), np.int32),
        )


class Running:
    """A server that runs, and how to ask it."""

    def __init__(self, state: ServerState, port: int) -> None:
        self.state, self.port = state, port

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Return status, content (JSON is read) and headers in lower case."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            content: Any = answer.read()
            found = {key.lower(): value for key, value in answer.getheaders()}
            if found.get("content-type") == "application/json":
                content = json.loads(content)
            return answer.status, content, found
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        """Return a bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextmanager
def running(
    models: Mapping[str, Detector],
    limits: ServeLimits | None = None,
    *,
    token: str | None = None,
    log: list[str] | None = None,
) -> Iterator[Running]:
    """Serve detectors from a thread until the block ends."""
    limits = limits or ServeLimits()
    state = ServerState([*models], limits)
    for name, detector in models.items():
        state.add(ServedModel(name, detector, limits, state.metrics.batch_observer(name)))
    app = build_app(state, token=token, log=None if log is None else log.append)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Running(state, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
            state.close()
