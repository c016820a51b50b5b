"""Measure tood-serve: its rate beside the engine's own, latency, batches, and twice the capacity.

    python benchmarks/serving.py tiny.onnx scenes/images --rounds 5 --overload-seconds 60

Server, engine and load each run in a process of their own. Engine and server take turns, so that
other load on the machine hits both alike, and their ratio is what counts. Every answer is compared
with the Detector's. Prints a page for docs/results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil
import uvloop

from tood_deploy import Detector, __version__
from tood_deploy.benchmark.latency.machine import describe_machine
from tood_deploy.data.images import IMAGE_SUFFIXES, decode_image

BATCHES = (1, 2, 4, 8)
CONNECTIONS = (1, 2, 4, 8, 16, 32)
FULL = 32  # so many that a batch waits whenever the engine is free
SERVE = "import sys; from tood_deploy.cli.serve import main; sys.exit(main(sys.argv[1:]))"
SCORE_TOLERANCE, BOX_TOLERANCE = 1e-4, 0.01  # another batch adds up in another order; pixels
HEADER_END = b"\r\n\r\n"


@dataclass
class Load:
    """What a load came to.

    Attributes:
        seconds: that it took.
        statuses: of the answers, by number.
        ms: latency of every answer with status 200.
        wrong: answers that are not the Detector's.
        without_retry: answers of 503 without Retry-After.
    """

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    ms: list[float] = field(default_factory=list)
    wrong: int = 0
    without_retry: int = 0

    @property
    def rate(self) -> float:
        """Images a second that were answered."""
        return self.statuses[200] / self.seconds

    def percentile(self, percent: float) -> float:
        """Return a percentile of the latency in milliseconds."""
        return float(np.percentile(self.ms, percent)) if self.ms else float("nan")


@dataclass(frozen=True)
class Turn:
    """How fast images went through, and what one took.

    Attributes:
        rate: images a second.
        cpu_ms: milliseconds of a core an image, which other load on the machine changes least.
    """

    rate: float
    cpu_ms: float


@dataclass(frozen=True)
class Question:
    """A request, and the answer that is right.

    Attributes:
        request: all of its bytes.
        expected: rows of class number, score and box.
    """

    request: bytes
    expected: np.ndarray


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artefact", type=Path)
    parser.add_argument("images", type=Path, help="a folder")
    parser.add_argument("--rounds", type=int, default=5, help="of the ratio")
    parser.add_argument("--turn-seconds", type=float, default=6.0)
    parser.add_argument("--overload-seconds", type=float, default=60.0)
    parser.add_argument("--port", type=int, default=8765)
    measure(parser.parse_args())


def measure(arguments: argparse.Namespace) -> None:
    """Measure everything and print the page."""
    paths = sorted(p for p in arguments.images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    files = [path.read_bytes() for path in paths]
    questions = make_questions(arguments.artefact, files, arguments.port)
    here, there = multiprocessing.get_context("spawn").Pipe()
    engine = multiprocessing.get_context("spawn").Process(
        target=serve_engine, args=(there, arguments.artefact, files), daemon=True
    )
    engine.start()
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, f"m={arguments.artefact}", "--port", str(arguments.port)],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until_ready(arguments.port)
        print_page(arguments, questions, here, server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        print(f"\nSIGTERM: exit code {server.wait(60)}")
        engine.terminate()


def make_questions(artefact: Path, files: Sequence[bytes], port: int) -> list[Question]:
    """Return a request for every image, and the Detector's answer to it."""
    questions = []
    with Detector(artefact) as detector:
        for number, data in enumerate(files):
            detections = detector(decode_image(data, f"image {number}"))
            expected = np.column_stack([detections.class_ids, detections.scores, detections.boxes])
            head = (
                f"POST /detect/m HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: image/jpeg\r\n"
                f"Content-Length: {len(data)}\r\n\r\n"
            )
            questions.append(Question(head.encode() + data, expected))
    return questions


def serve_engine(pipe: Connection, artefact: Path, files: Sequence[bytes]) -> None:
    """Run the engine alone for as many seconds as asked, at a batch size, on padded images."""
    with Detector(artefact, hint="throughput") as detector:
        prepared = [detector.prepare(decode_image(data, "image")) for data in files]
        pipe.send("ready")
        while True:
            batch, seconds = pipe.recv()
            groups = [prepared[i : i + batch] for i in range(0, len(prepared) - batch + 1, batch)]
            tickets: list[Any] = []
            images, started, cpu_before = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - started < seconds:
                for group in groups:
                    tickets.append(detector.submit(group))
                    images += batch
                    if len(tickets) >= detector.engine.in_flight:
                        detector.collect(tickets.pop(0))
            while tickets:
                detector.collect(tickets.pop(0))
            cpu_s = time.process_time() - cpu_before
            pipe.send(Turn(images / (time.perf_counter() - started), 1000 * cpu_s / images))


def wait_until_ready(port: int) -> None:
    """Wait for the server's models."""
    for _ in range(240):
        if load("127.0.0.1", port, 1, 0, health=True).statuses[200]:
            return
        time.sleep(0.5)
    raise SystemExit("the server does not become ready")


def load(host: str, port: int, connections: int, seconds: float, **options: Any) -> Load:
    """Put load on the server from a process of its own."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    child = context.Process(
        target=load_process, args=(other, host, port, connections, seconds, options)
    )
    child.start()
    result = mine.recv()
    child.join()
    return result


def load_process(
    pipe: Connection, host: str, port: int, connections: int, seconds: float, options: Any
) -> None:
    """Run the load, and send what it came to."""
    pipe.send(uvloop.run(run_load(host, port, connections, seconds, **options)))


async def run_load(
    host: str,
    port: int,
    connections: int,
    seconds: float,
    *,
    questions: Sequence[Question] = (),
    rate: float | None = None,
    health: bool = False,
) -> Load:
    """Ask on several connections: as fast as answers come, or at a rate whether they come or not.

    Args:
        host, port: of the server.
        connections: that ask at the same time.
        seconds: how long.
        questions: asked in turn.
        rate: of requests a second; None: the next as soon as the last is answered.
        health: ask once whether the server is ready.
    """
    result, started = Load(), time.perf_counter()
    if health:
        questions = [
            Question(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n", np.zeros((0, 6)))
        ]
    tickets: asyncio.Queue[Question | None] = asyncio.Queue()

    async def ask_on_one(number: int) -> None:
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError:
            return
        step = number
        while health or rate is not None or time.perf_counter() - started < seconds:
            question = questions[step % len(questions)] if rate is None else await tickets.get()
            if question is None:
                break
            step += connections
            await ask(reader, writer, question, result, compare=not health)
            if health:
                break
        writer.close()

    tasks = [asyncio.create_task(ask_on_one(number)) for number in range(connections)]
    if rate is not None:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
            tickets.put_nowait(questions[number % len(questions)])
        for _ in tasks:
            tickets.put_nowait(None)
    await asyncio.gather(*tasks)
    result.seconds = time.perf_counter() - started
    return result


async def ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    question: Question,
    result: Load,
    *,
    compare: bool,
) -> None:
    """Ask one question, and count its answer."""
    asked = time.perf_counter()
    writer.write(question.request)
    head = (await reader.readuntil(HEADER_END)).decode("latin-1").lower()
    length = re.search(r"content-length: (\d+)", head)
    body = await reader.readexactly(int(length[1]) if length else 0)
    status = int(head.split(maxsplit=2)[1])
    result.statuses[status] += 1
    result.without_retry += status == 503 and "retry-after:" not in head
    if status == 200 and compare:
        result.ms.append((time.perf_counter() - asked) * 1000)
        result.wrong += not is_right(json.loads(body), question.expected)


def is_right(answer: Any, expected: np.ndarray) -> bool:
    """Return whether an answer is the Detector's."""
    rows = answer["images"][0]["detections"]
    found = np.array([[row["class_id"], row["score"], *row["box"]] for row in rows])
    found = found.reshape(-1, 6)
    return (
        found.shape == expected.shape
        and bool((found[:, 0] == expected[:, 0]).all())
        and bool(np.allclose(found[:, 1], expected[:, 1], atol=SCORE_TOLERANCE))
        and bool(np.allclose(found[:, 2:], expected[:, 2:], atol=BOX_TOLERANCE))
    )


def batch_counts(port: int) -> tuple[float, float]:
    """Return how many images and batches the network has answered, by /metrics."""
    text = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    images, batches = (
        float(re.search(rf"^tood_batch_size_{kind}\{{.*\}} (\S+)", text, re.MULTILINE)[1])  # pyright: ignore[reportOptionalSubscript]
        for kind in ("sum", "count")
    )
    return images, batches


def print_page(
    arguments: argparse.Namespace, questions: Sequence[Question], engine: Connection, server: int
) -> None:
    """Measure and print, part by part."""
    engine.recv()
    machine = describe_machine()
    print("# Serving\n")
    print(
        f"`python benchmarks/serving.py {arguments.artefact.name} scenes/images`: tood_deploy "
        f"{__version__}, {len(questions)} JPEG images, {datetime.now(UTC):%Y-%m-%d}.\n"
    )
    print(
        f"{machine.cpu}, {machine.usable_cores} cores, {machine.system}, Python {machine.python}; "
        f"load of the machine before: {os.getloadavg()[0]:.1f}. Server, engine and load are "
        "processes of their own on these cores. Engine and server take turns, so that their ratio "
        "holds where their rates do not; CPU time an image is disturbed least. Every answer was "
        "compared with the Detector's."
    )
    capacity = print_ratio(arguments, questions, engine, server)
    print_latency(arguments, questions)
    print_overload(arguments, questions, capacity, server)


def print_ratio(
    arguments: argparse.Namespace, questions: Sequence[Question], engine: Connection, server: int
) -> float:
    """Print the server's rate beside the engine's, and return the server's."""
    seconds, process = arguments.turn_seconds, psutil.Process(server)
    best = max(BATCHES, key=lambda batch: engine_turn(engine, batch, seconds / 2).rate)
    print(f"\n## Rate\n\nThe engine alone is fastest here in batches of {best}.\n")
    print(
        "| round | engine, images/s | server | ratio | engine, CPU ms an image | server | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    turns = []
    for number in range(arguments.rounds):
        before, cpu_before = engine_turn(engine, best, seconds / 2), sum(process.cpu_times()[:2])
        served = load("127.0.0.1", arguments.port, FULL, seconds, questions=questions)
        cpu_ms = 1000 * (sum(process.cpu_times()[:2]) - cpu_before) / served.statuses[200]
        after = engine_turn(engine, best, seconds / 2)
        alone = Turn((before.rate + after.rate) / 2, (before.cpu_ms + after.cpu_ms) / 2)
        turns.append((alone, Turn(served.rate, cpu_ms)))
        print_turn(str(number + 1), *turns[-1])
        assert not served.wrong, f"{served.wrong} wrong answers"
    middle = [
        Turn(
            statistics.median(pair[side].rate for pair in turns),
            statistics.median(pair[side].cpu_ms for pair in turns),
        )
        for side in (0, 1)
    ]
    print_turn("median", *middle)
    return middle[1].rate


def print_turn(name: str, engine: Turn, server: Turn) -> None:
    """Print a row of the ratio's table."""
    print(
        f"| {name} | {engine.rate:.1f} | {server.rate:.1f} | {server.rate / engine.rate:.2f} | "
        f"{engine.cpu_ms:.1f} | {server.cpu_ms:.1f} | {engine.cpu_ms / server.cpu_ms:.2f} |",
        flush=True,
    )


def engine_turn(engine: Connection, batch: int, seconds: float) -> Turn:
    """Return what a turn of the engine alone came to."""
    engine.send((batch, seconds))
    return engine.recv()


def print_latency(arguments: argparse.Namespace, questions: Sequence[Question]) -> None:
    """Print latency and batch sizes by the number of connections."""
    print("\n## Latency\n")
    print("| connections | images/s | p50 ms | p99 ms | mean batch |\n|---|---|---|---|---|")
    for connections in CONNECTIONS:
        before = batch_counts(arguments.port)
        result = load(
            "127.0.0.1", arguments.port, connections, arguments.turn_seconds, questions=questions
        )
        after = batch_counts(arguments.port)
        mean = (after[0] - before[0]) / max(1.0, after[1] - before[1])
        print(
            f"| {connections} | {result.rate:.1f} | {result.percentile(50):.0f} | "
            f"{result.percentile(99):.0f} | {mean:.1f} |",
            flush=True,
        )


def print_overload(
    arguments: argparse.Namespace, questions: Sequence[Question], capacity: float, server: int
) -> None:
    """Print what twice the capacity comes to."""
    process, seconds = psutil.Process(server), arguments.overload_seconds
    memory: list[float] = []

    def watch() -> None:
        while not done.wait(1.0):
            memory.append(process.memory_info().rss / 2**20)

    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = load("127.0.0.1", arguments.port, 256, seconds, questions=questions, rate=2 * capacity)
    done.set()
    watcher.join()
    half = len(memory) // 2
    print(f"\n## Twice the capacity\n\n{2 * capacity:.0f} requests a second for {seconds:.0f} s.\n")
    print("| | |\n|---|---|")
    print(f"| answered 200 | {result.statuses[200]} ({result.rate:.1f} a second) |")
    print(f"| answered 503 with Retry-After | {result.statuses[503] - result.without_retry} |")
    others = {code: n for code, n in result.statuses.items() if code not in (200, 503)}
    print(f"| anything else | {others or 0} |")
    print(f"| answers that are not the Detector's | {result.wrong} |")
    print(
        f"| latency of those answered, p50 and p99 | {result.percentile(50):.0f} and "
        f"{result.percentile(99):.0f} ms |"
    )
    print(
        f"| memory, median of the first and of the second half | "
        f"{statistics.median(memory[:half]):.0f} and {statistics.median(memory[half:]):.0f} MiB |"
    )


if __name__ == "__main__":
    main()
