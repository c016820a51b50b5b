"""What a job says of its workers, and how many of them a cluster has room for."""

from types import SimpleNamespace

import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa

from tood_deploy.batch.run import ClusterOptions, Progress, plan_workers
from tood_deploy.errors import DeviceError


def worked(**seconds_of_image: float) -> Progress:
    """Return the progress of workers that have done ten images each, at so many seconds an image.

    Args:
        seconds_of_image: by the worker's name.
    """
    progress = Progress()
    for worker, seconds in seconds_of_image.items():
        progress.add(pa.table({"worker": [worker] * 10, "seconds": [seconds] * 10}))
    return progress


def test_workers_slower_than_half_the_median_are_named() -> None:
    (line,) = worked(a=0.1, b=0.1, c=0.11, d=0.25).stragglers()
    assert line.startswith("d (4.0 images/s")
    assert worked(a=0.1, b=0.1, c=0.19).stragglers() == []
    assert worked(a=0.1, b=10.0).stragglers() == []  # of two nobody knows which one is slow


def test_rate_and_workers_are_shown() -> None:
    progress = worked(a=0.1, b=0.1)
    progress.started_s -= 4.0
    assert progress.rate == pytest.approx(5.0, rel=0.1)
    assert progress.state().endswith("images/s, 2 workers")
    assert worked(a=0.1).state().endswith(", 1 worker")


@pytest.mark.parametrize(
    ("machines", "options", "expected"),
    [
        ([{"CPU": 2.0}], ClusterOptions(), (2, 1, 1)),
        ([{"CPU": 16.0}, {"CPU": 8.0}], ClusterOptions(), (4, 6, 6)),
        ([{"CPU": 16.0}, {}], ClusterOptions(cpus_per_worker=8), (8, 2, 2)),
        ([{"CPU": 8.0, "GPU": 1.0}], ClusterOptions(gpus_per_worker=0.5), (4, 2, 2)),
        ([{"CPU": 4.0}], ClusterOptions(workers=9, cpus_per_worker=8), (8, 1, 9)),
    ],
)
def test_as_many_workers_as_there_is_room_for(
    machines: list[dict[str, float]], options: ClusterOptions, expected: tuple[int, int, int]
) -> None:
    """On machines of the cluster; CPUs of a worker, workers at first, and at most."""
    nodes = [{"Alive": True, "Resources": machine} for machine in machines]
    nodes.append({"Alive": False, "Resources": {"CPU": 99.0}})
    pool = plan_workers(SimpleNamespace(nodes=lambda: nodes), options)
    assert (pool.cpus, pool.first, pool.most) == expected


def test_no_room_for_one_worker() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}]
    with pytest.raises(DeviceError, match="--cpus-per-worker"):
        plan_workers(SimpleNamespace(nodes=lambda: nodes), ClusterOptions(cpus_per_worker=8))
