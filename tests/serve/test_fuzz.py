"""Ten thousand malformed requests: mutations of good ones, down to single bytes of HTTP."""

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from serve.served import CountingEngine, Running, running
from serve.test_app import SMALL, form, solid, tensors

from tood_deploy import Detector

REQUESTS, SEED = 10_000, 16
BUSY = (503, 504)  # on a machine that is at its limit
ENOUGH = 300_000  # bytes of an answer; none is larger


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running({"m": Detector(CountingEngine())}, replace(SMALL, queue=64)) as served:
        yield served


def http(path: str, body: bytes, headers: dict[str, str], method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body


def good_requests() -> list[tuple[str, bytes, dict[str, str]]]:
    files, form_headers = form(("a.png", solid(1)), ("b.png", solid(2)))
    document = tensors()
    arrays = {
        "images": np.full((1, 32, 32, 3), 9, np.uint8),
        "valid_hw": np.array([[32, 32]], np.int32),
        "score_threshold": np.array([[0.5]], np.float32),
        "iou_threshold": np.array([[0.5]], np.float32),
    }
    binary = b""
    for tensor in document["inputs"]:
        data = arrays[tensor["name"]].tobytes()
        tensor["parameters"] = {"binary_data_size": len(data)}
        del tensor["data"]
        binary += data
    text = json.dumps(document).encode()
    binary_headers = {"Inference-Header-Content-Length": str(len(text))}
    return [
        ("/detect/m", solid(3), {"Content-Type": "image/png"}),
        ("/detect/m?conf=0.5&iou=0.5&slice=32", solid(3), {}),
        ("/detect/m?only=person", solid(3), {"Accept": "image/jpeg"}),
        ("/detect/m", files, form_headers),
        ("/v2/models/m/infer", text + binary, binary_headers),
        ("/v2/models/m/infer", json.dumps(tensors()).encode(), {}),
    ]


def mutated_bytes(data: bytes, dice: random.Random) -> bytes:
    """Flip, cut, repeat or insert, a few times."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(changed) + 1)
        kind = dice.randrange(5)
        if kind == 0 and place < len(changed):
            changed[place] = dice.randrange(256)
        elif kind == 1:
            del changed[place : place + dice.randint(1, 200)]
        elif kind == 2:
            changed[place:place] = dice.randbytes(dice.randint(1, 20))
        elif kind == 3:
            changed[place:place] = changed[max(0, place - 50) : place]
        else:
            del changed[place:]
    return bytes(changed)


VALUES = (
    None, True, -1, 0, 1, 1.5, 2**31, 2**63, 10**400, "x", "", "\ud800", "UINT8", [], {}, [[]],
    [1, 32, 32, 3], [1, -32, 32, 3], [1e308] * 5, float("nan"), {"binary_data_size": -1},
    {"binary_data_size": 2**70}, {"binary_data_size": "5"}, {"name": "images"},
)  # fmt: skip


def mutated_json(document: object, dice: random.Random) -> object:
    """Replace, drop or double one value somewhere in the tree."""
    if isinstance(document, dict) and document and dice.random() < 0.9:
        key = dice.choice([*document])
        rest = {name: value for name, value in document.items() if name != key}
        if dice.random() < 0.1:
            return rest
        return rest | {key: mutated_json(document[key], dice)}
    if isinstance(document, list) and document and len(document) < 10 and dice.random() < 0.9:
        place = dice.randrange(len(document))
        if dice.random() < 0.1:
            return [*document, document[place]]
        return [*document[:place], mutated_json(document[place], dice), *document[place + 1 :]]
    return dice.choice(VALUES)


def malformed(dice: random.Random) -> tuple[bytes, bool]:
    """Return the bytes of a request that is wrong somewhere, and whether in its HTTP."""
    path, body, headers = dice.choice(good_requests())
    kind = dice.randrange(6)
    if kind == 0:  # the message itself: it may no longer be HTTP
        return mutated_bytes(http(path, body, headers), dice), True
    if kind == 1:
        return http(path, json.dumps(mutated_json(tensors(), dice)).encode(), headers), False
    if kind == 2:
        path = "/" + mutated_bytes(path.encode(), dice).decode("latin-1").strip("/ \r\n")
        path = "".join(letter for letter in path if letter.isprintable() and letter != " ")
        return http(path, body, headers), False
    if kind == 3:
        name = dice.choice(
            ["Content-Type", "Content-Encoding", "Accept", "Inference-Header-Content-Length"]
        )
        value = dice.choice(
            ["multipart/form-data; boundary=", "gzip", "deflate", "x/y;q=z", "-5", "9" * 30, "\xff"]
        )
        return http(path, body, headers | {name: value}), False
    if kind == 4:
        return http(
            path, body, headers, dice.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS"])
        ), False
    return http(path, mutated_bytes(body, dice), headers), False


def status_of(server: Running, request: bytes, *, broken: bool) -> int:
    """Return the status of the answer; 0 where the connection was closed without one."""
    with server.connect() as connection:
        connection.settimeout(10)
        try:
            connection.sendall(request)
            if broken:  # more might be waited for; to the server the client has gone
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            while len(answer) < ENOUGH and (part := connection.recv(65536)):
                answer += part
        except (ConnectionError, BrokenPipeError):
            return 0
    return int(answer.split(maxsplit=2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


@pytest.mark.slow
def test_malformed_requests_never_break_the_server(server: Running) -> None:
    dice, statuses = random.Random(SEED), Counter[int]()
    for number in range(REQUESTS):
        request, broken = malformed(dice)
        status = status_of(server, request, broken=broken)
        statuses[status] += 1
        assert status < 500 or status in BUSY, f"request {number}: {request[:500]!r}"
    assert sum(statuses[status] for status in range(400, 500)) > REQUESTS / 2, statuses
    assert server.ask("POST", "/detect/m", solid(3))[0] == 200
    time.sleep(SMALL.timeout_s + 0.2)  # for those whose client has gone
    assert server.state.models["m"].batcher.depth == 0
    assert server.state.budget._held == 0
