"""Run a batch job on Ray Data: workers with an engine each, and one writer of their answers.

Images never travel: workers read them where they lie, and send rows. Ray's actor pool grows with
the work, holds back what nobody has time for, and repeats what a lost worker had; the writer takes
each image once. Images of a chunk that workers do not survive are done alone in the end; the one
that kills them is a row with its error.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa  # pyright: ignore[reportMissingImports]

from tood_deploy.batch.output import BatchOutput
from tood_deploy.batch.source import Chunk, deal_out
from tood_deploy.batch.worker import Worker, WorkerLink, WorkerOptions, model_bytes
from tood_deploy.errors import DeviceError, ToodError, naming_extras
from tood_deploy.reporter import Reporter

LOCAL, AUTO = "local", "auto"
CONNECT_S = 5.0
OBJECT_STORE_BYTES = 128 * 2**20  # of a local cluster: no image goes through it
MAX_CPUS_OF_WORKER = 4  # by itself: more threads of one engine gain less than another engine
CHUNK_IMAGES = (16, 512)  # least and most that one worker takes at a time
CHUNKS_OF_WORKER = 32  # at least so many, where there are images enough, so that all end together
ATTEMPTS = 4  # at a chunk, until it counts as what kills workers
STRAGGLER = 0.5  # of the median worker's rate


@dataclass(frozen=True)
class ClusterOptions:
    """What to run on.

    Attributes:
        address: "local" for a cluster on this machine that ends with the job, "auto" for the one
            that this machine belongs to, or HOST:PORT.
        workers: the most at a time; as many as the cluster has room for where None.
        cpus_per_worker: those of the smallest machine, 4 at most, where None.
        gpus_per_worker: may be a part of one, such as 0.5.
    """

    address: str = LOCAL
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float = 0.0


@dataclass(frozen=True)
class WorkerPool:
    """How many workers, and what each needs.

    Attributes:
        cpus, gpus: of a worker.
        first: how many can start at once.
        most: at a time, as far as the cluster grows.
    """

    cpus: int
    gpus: float
    first: int
    most: int


@dataclass
class Progress:
    """What workers have done.

    Attributes:
        images: by worker.
        seconds: that they took, by worker.
        rate: images a second of all workers together, since the first answer was waited for.
    """

    images: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    started_s: float = field(default_factory=time.monotonic)

    def add(self, table: pa.Table) -> None:
        """Count the rows of an answer."""
        for worker, seconds in zip(
            table.column("worker").to_pylist(), table.column("seconds").to_pylist(), strict=True
        ):
            self.images[worker] += 1
            self.seconds[worker] += seconds

    @property
    def rate(self) -> float:
        """Images a second of all workers together."""
        return sum(self.images.values()) / max(time.monotonic() - self.started_s, 1e-9)

    def state(self) -> str:
        """Return a few words for a progress line."""
        count = len(self.images)
        return f"{self.rate:.1f} images/s, {count} worker{'' if count == 1 else 's'}"

    def stragglers(self) -> list[str]:
        """Return the workers that are slower than half the median one, with their rates."""
        rates = {name: self.images[name] / max(self.seconds[name], 1e-9) for name in self.images}
        if len(rates) < 3:
            return []
        median = statistics.median(rates.values())
        slow = sorted((rate, name) for name, rate in rates.items() if rate < STRAGGLER * median)
        return [f"{name} ({rate:.1f} images/s, the median is {median:.1f})" for rate, name in slow]


def run_batch(
    artefact: Path,
    listed: Sequence[Chunk],
    output: BatchOutput,
    options: WorkerOptions,
    cluster: ClusterOptions,
    reporter: Reporter,
) -> Progress:
    """Detect objects in all images that the output does not hold yet.

    What was done is kept, however this ends.

    Args:
        artefact: path of the model.
        listed: all images.
        output: takes the rows.
        options: of workers.
        cluster: what to run on.
        reporter: shows how it goes.

    Raises:
        ToodError: no such cluster, not enough of what workers need, a model that they cannot open,
            or an output that cannot be written.
    """
    total = sum(len(chunk.names) for chunk in listed)
    progress = Progress()
    if total == len(output.done):  # by a run that is resumed
        return progress
    with ray_session(cluster) as ray, reporter.progress("images", total) as task:
        task.update(len(output.done), state="workers start")
        attempts = ray.remote(_Attempts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        link = _RayLink(ray.put(model_bytes(artefact)), attempts.remote())
        try:
            pool = plan_workers(ray, cluster)
            output.begin()
            if options.detector["device"] == "cpu":
                threads = {**options.detector, "threads": pool.cpus}
                options = replace(options, detector=threads)
            progress.started_s = time.monotonic()
            left = total - len(output.done)
            size = max(
                CHUNK_IMAGES[0], min(left // (pool.most * CHUNKS_OF_WORKER), CHUNK_IMAGES[1])
            )
            for chunk_images in (size, 1):
                chunks = deal_out(listed, chunk_images, output.done)
                for table in answers(ray, chunks, link, options, pool):
                    progress.add(table)
                    output.write(table)
                    task.update(len(output.done), state=progress.state())
        finally:
            output.flush()
    return progress


def answers(
    ray: Any, chunks: Sequence[Chunk], link: WorkerLink, options: WorkerOptions, pool: WorkerPool
) -> Iterator[pa.Table]:
    """Yield the workers' tables as they come, in any order; chunks that were lost are missing.

    Args:
        ray: the module.
        chunks: what to do.
        link: from workers to the job.
        options: of workers.
        pool: how many workers, and what each needs.

    Raises:
        ToodError: no worker can open the model.
    """
    if not chunks:
        return
    most = min(pool.most, len(chunks))
    rows = [chunk.to_row() for chunk in chunks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        fn_constructor_kwargs={"link": link, "options": options},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=most, initial_size=min(most, pool.first)
        ),
    )
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        refusals = [path == "" for path in table.column("path").to_pylist()]
        if any(refusals):
            raise ToodError(str(table.column("error")[refusals.index(True)]))
        if len(table):
            yield table


class _Attempts:
    """Counts how often workers have begun a chunk; runs as an actor of its own.

    Ray calls a worker again as often as it is lost: of an image that kills workers there is no end.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)

    def begin(self, chunk: str) -> int:
        """Return how often this chunk was begun, this time counted."""
        self.counts[chunk] += 1
        return self.counts[chunk]


@dataclass(frozen=True)
class _RayLink:
    """What workers ask of the job, over Ray.

    Attributes:
        files: reference to the model's files.
        attempts: handle of `_Attempts`.
    """

    files: Any
    attempts: Any

    def model_files(self) -> dict[str, bytes]:
        import ray  # pyright: ignore[reportMissingImports]

        return ray.get(self.files)

    def is_hopeless(self, chunk: Chunk) -> bool:
        import ray  # pyright: ignore[reportMissingImports]

        key = f"{chunk.names[0]} {len(chunk.names)}"
        return int(ray.get(self.attempts.begin.remote(key))) > ATTEMPTS


def plan_workers(ray: Any, cluster: ClusterOptions) -> WorkerPool:
    """Return what workers get, and how many of them a cluster has room for.

    Raises:
        DeviceError: no machine of the cluster has room for one.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus_of = [int(machine["CPU"]) for machine in machines if machine.get("CPU")]
    cpus = cluster.cpus_per_worker or min([*cpus_of, MAX_CPUS_OF_WORKER])
    gpus = cluster.gpus_per_worker
    room = sum(
        min(
            int(machine.get("CPU", 0) // cpus),
            int(machine.get("GPU", 0) / gpus + 1e-9) if gpus else 1 << 30,
        )
        for machine in machines
    )
    if room == 0 and cluster.workers is None:
        most = max(cpus_of, default=0), max(machine.get("GPU", 0) for machine in machines)
        raise DeviceError(
            f"a worker needs {cpus} CPUs and {gpus:g} GPUs, the largest machines of the cluster "
            f"have {most[0]} and {most[1]:g}; ask for less by --cpus-per-worker and "
            "--gpus-per-worker, or say by --workers how far the cluster shall grow"
        )
    return WorkerPool(cpus, gpus, max(room, 1), cluster.workers or room)


@contextmanager
def ray_session(cluster: ClusterOptions) -> Iterator[Any]:
    """Yield Ray's module, connected; what ran before is left as it is.

    Raises:
        ToodError: the cluster does not answer.
    """
    # Ray sends statistics of use, and logs a lot, unless told otherwise before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if cluster.address == AUTO and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    with naming_extras("cluster"), _silent_stderr():
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    if cluster.address == LOCAL:
        quiet |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        with _silent_stderr(), _own_sigterm():
            ray.init(cluster.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split())
        raise ToodError(
            f"--address {cluster.address}: no Ray cluster can be used ({reason}); start one with "
            "ray start --head, set RAY_AUTH_MODE=token and its token, or use --address local"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # what is missing in the end is done again, alone
    try:
        yield ray
    finally:
        ray.shutdown()


def _has_token() -> bool:
    """Return whether there is a token: `ray start` on this machine then asks for it.

    Ray's driver gives none by itself. A cluster that asks for none does not run with one, so that
    for a cluster elsewhere RAY_AUTH_MODE says it.
    """
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or Path("~/.ray/auth_token").expanduser().is_file()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Put back what SIGTERM does here: Ray makes it end the process at once."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Leave out what libraries in C++ write to stderr; errors are raised all the same."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def check_address(address: str) -> None:
    """Ask whether anything listens there, before work begins: Ray would ask for half a minute.

    Raises:
        ToodError: nothing does, or it is no address.
    """
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise ToodError(f"--address {address}: expected local, auto or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ToodError(
            f"--address {address}: does not answer ({error}); expected the address that ray start "
            "--head printed"
        ) from error
