"""Run a batch job on Ray Data: workers with an engine each, and one writer of their answers.

Images never travel: workers read them where they lie, and send rows. Ray's actor pool grows with
the work, holds back what nobody has time for, and repeats what a lost worker had; the writer takes
each image once. What no worker survives is tried alone in the end, and is a row with its error.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from tood_deploy.batch.output import BatchOutput
from tood_deploy.batch.source import Chunk, deal_out
from tood_deploy.batch.worker import ANSWER, Worker, WorkerOptions, model_bytes
from tood_deploy.errors import DeviceError, ToodError, naming_extras
from tood_deploy.reporter import Reporter

LOCAL, AUTO = "local", "auto"
CONNECT_S = 5.0
OBJECT_STORE_BYTES = 128 * 2**20  # of a local cluster: no image goes through it
MAX_CPUS_OF_WORKER = 4  # by itself: more threads of one engine gain less than another engine
CHUNK_IMAGES = (16, 512)  # least and most that one worker takes at a time
CHUNKS_OF_WORKER = 32  # at least so many, where there are images enough, so that all end together
RETRIES = 3  # of a chunk whose worker was lost
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
        return f"{self.rate:.1f} images/s, {len(self.images)} workers"

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
    with ray_session(cluster) as ray, reporter.progress("images", total) as task:
        task.update(len(output.done), state="workers start")
        files = ray.put(model_bytes(artefact))
        try:
            cpus, workers = plan_workers(ray, cluster)
            progress.started_s = time.monotonic()
            left = total - len(output.done)
            size = max(CHUNK_IMAGES[0], min(left // (workers * CHUNKS_OF_WORKER), CHUNK_IMAGES[1]))
            for chunk_images in (size, 1):
                chunks = deal_out(listed, chunk_images, output.done)
                for table in answers(ray, chunks, files, options, cluster, cpus, workers):
                    progress.add(table)
                    output.write(table)
                    task.update(len(output.done), state=progress.state())
            for chunk in deal_out(listed, 1, output.done):
                output.write(_lost(chunk))
        finally:
            output.flush()
    return progress


def answers(
    ray: Any,
    chunks: Sequence[Chunk],
    files: Any,
    options: WorkerOptions,
    cluster: ClusterOptions,
    cpus: int,
    workers: int,
) -> Iterator[pa.Table]:
    """Yield the workers' tables as they come, in any order; chunks that were lost are missing.

    Args:
        ray: the module.
        chunks: what to do.
        files: Ray's reference to the model's files.
        options: of workers.
        cluster: what to run on.
        cpus: of a worker.
        workers: the most at a time.

    Raises:
        ToodError: no worker can open the model.
    """
    if not chunks:
        return
    pool_size = min(workers, len(chunks))
    rows = [chunk.to_row() for chunk in chunks]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        fn_constructor_kwargs={"files": _Fetch(files), "options": options},
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=cluster.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pool_size, initial_size=pool_size),
        max_restarts=-1,
        max_task_retries=RETRIES,
    )
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        refusals = [path == "" for path in table.column("path").to_pylist()]
        if any(refusals):
            raise ToodError(str(table.column("error")[refusals.index(True)]))
        if len(table):
            yield table


@dataclass(frozen=True)
class _Fetch:
    """Fetches the model's files on the machine of a worker."""

    reference: Any

    def __call__(self) -> dict[str, bytes]:
        import ray

        return ray.get(self.reference)


def _lost(chunk: Chunk) -> pa.Table:
    (name,) = chunk.names
    error = f"{name}: workers were lost at this image, {RETRIES + 1} times in a row; run it alone"
    return pa.Table.from_pylist([{"path": name, "error": error}], schema=ANSWER)


def plan_workers(ray: Any, cluster: ClusterOptions) -> tuple[int, int]:
    """Return the CPUs of a worker, and the most workers at a time.

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
            f"a worker needs {cpus} CPUs and {gpus:g} GPUs, and the largest machines of the cluster "
            f"have {most[0]} and {most[1]:g}; ask for less by --cpus-per-worker and "
            "--gpus-per-worker, or say by --workers how far the cluster shall grow"
        )
    return cpus, cluster.workers or room


@contextmanager
def ray_session(cluster: ClusterOptions) -> Iterator[Any]:
    """Yield Ray's module, connected; what ran before is left as it is.

    Raises:
        ToodError: the cluster does not answer.
    """
    # Ray sends statistics of use, and logs a lot, unless told otherwise before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with naming_extras("cluster"):
        import ray
        import ray.data
    _check_answers(cluster.address)
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    try:
        if cluster.address == LOCAL:
            size = OBJECT_STORE_BYTES
            ray.init("local", include_dashboard=False, object_store_memory=size, **quiet)
        else:
            ray.init(cluster.address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split())
        raise ToodError(
            f"--address {cluster.address}: no Ray cluster can be used ({reason}); start one with "
            "ray start --head, or use --address local"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # what is missing in the end is done again, alone
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ask whether anything listens there: Ray itself would ask for half a minute.

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
