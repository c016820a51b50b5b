"""Measure ONNX Runtime against eager PyTorch, and what is around it; print one table.

    python benchmarks/onnx_speed.py r50.pth r50.onnx clip.mp4

That is pre- and post-processing, the pipeline, and memory. All figures are medians of one run;
compared calls take turns, so that other load on the machine hits both alike.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from tood_deploy import Detector, __version__
from tood_deploy.benchmark.latency.machine import describe_machine
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.graph_io import HEAD_OUTPUTS, INPUTS, OUTPUTS
from tood_deploy.onnx_file import cut_graph, with_outputs

FULL_HD = (1080, 1920)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--imgsz", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--frames", type=int, default=16, help="of the clip")
    parser.add_argument("--threads", type=int, default=2)
    print_table(parser.parse_args())


def print_table(arguments: argparse.Namespace) -> None:
    """Measure everything and print the table."""
    options = {"conf": 0.3, "imgsz": arguments.imgsz, "threads": arguments.threads}
    memory_mib = in_child(peak_memory, arguments.artefact, options)
    eager, fast = Detector(arguments.checkpoint, **options), Detector(arguments.artefact, **options)
    image = first_frame(arguments.clip)
    prepared = fast.prepare(image)
    eager_s, fast_s, whole_s = take_turns(
        arguments.rounds,
        lambda: eager.infer([prepared]),
        lambda: fast.infer([prepared]),
        lambda: fast(image),
    )
    full_hd = synthetic_image(*FULL_HD, seed=0)
    (pre_s,) = take_turns(10 * arguments.rounds, lambda: fast.prepare(full_hd))
    post_s = time_post_processing(arguments, fast, prepared.image, prepared.transform.resized_hw)
    stream_s = time_stream(fast, arguments.clip, arguments.frames)
    engines = f"{eager.engine.name} and {fast.engine.name}"
    sizes = f"input {prepared.transform.net_hw}, batch 1"
    table = Table(title=f"tood_deploy {__version__}, {engines}, {sizes}")
    for column in ("what", "median", "ratio", "of what"):
        table.add_column(column)
    rows = (
        ("eager PyTorch, network and post-processing", eager_s, None, ""),
        ("ONNX Runtime, the same", fast_s, eager_s / fast_s, "times as fast as eager"),
        ("ONNX Runtime, end to end from a decoded frame", whole_s, None, ""),
        ("post-processing: candidates and NMS", post_s, post_s / whole_s, "of end to end"),
        (
            f"pre-processing of a {FULL_HD[1]}x{FULL_HD[0]} frame",
            pre_s,
            pre_s / whole_s,
            "of end to end",
        ),
        ("one frame of the clip, streamed", stream_s, fast_s / stream_s, "of the engine-only rate"),
    )
    for what, seconds, ratio, meaning in rows:
        table.add_row(
            what, f"{seconds * 1e3:.1f} ms", "" if ratio is None else f"{ratio:.3f}", meaning
        )
    table.add_row("peak memory of a process with the artefact", f"{memory_mib:.0f} MiB", "", "")
    Console(width=140).print(table, describe_machine(), sep="\n")


def take_turns(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Return the median seconds of each call, after one warm-up of each."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def first_frame(clip: Path) -> np.ndarray:
    """Return the first frame, (H, W, 3) uint8 BGR."""
    read, frame = cv2.VideoCapture(str(clip)).read()
    if not read:
        raise SystemExit(f"{clip}: no frame")
    return np.asarray(frame, np.uint8)


def time_post_processing(
    arguments: argparse.Namespace, detector: Detector, image: np.ndarray, valid_hw: tuple[int, int]
) -> float:
    """Measure the part of the artefact behind the head's maps, cut out and fed with real maps.

    Args:
        arguments: of the script.
        detector: with the artefact.
        image: (H, W, 3) uint8 RGB, padded.
        valid_hw: rows and columns of it that hold real pixels.

    Returns:
        Median seconds.
    """
    shipped = onnx.load(arguments.artefact)
    feeds = {"images": image[None], "valid_hw": np.array([valid_hw], np.int32)}
    feeds |= {
        name: np.array(value, np.float32)
        for name, value in zip(INPUTS[2:], (detector.conf, detector.iou), strict=True)
    }
    maps = ort.InferenceSession(with_outputs(shipped, HEAD_OUTPUTS).SerializeToString()).run(
        list(HEAD_OUTPUTS), feeds
    )
    given = dict(zip(HEAD_OUTPUTS, maps, strict=True))
    part = cut_graph(
        onnx.shape_inference.infer_shapes(with_outputs(shipped, HEAD_OUTPUTS)),
        HEAD_OUTPUTS,
        OUTPUTS,
    )
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = arguments.threads
    session = ort.InferenceSession(part.SerializeToString(), settings)
    needed = {value.name for value in session.get_inputs()}
    given = {name: value for name, value in (feeds | given).items() if name in needed}
    return take_turns(10 * arguments.rounds, lambda: session.run(None, given))[0]


def time_stream(detector: Detector, clip: Path, frames: int) -> float:
    """Return the seconds for a frame of a stream, from the first result to the last.

    Args:
        detector: to stream with.
        clip: the video.
        frames: how many to take.
    """
    arrivals = [time.perf_counter() for _ in islice(detector.stream(clip), frames)]
    return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)


def peak_memory(
    artefact: Path, options: dict[str, Any], result: "multiprocessing.Queue[float]"
) -> None:
    """Open the artefact in this process, run three images, and put its highest resident size.

    Args:
        artefact: the .onnx file.
        options: of the detector.
        result: takes the size in MiB.
    """
    with Detector(artefact, **options) as detector:
        for seed in range(3):
            detector(synthetic_image(*FULL_HD, seed=seed))
    result.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def in_child(function: Callable[..., None], *arguments: object) -> float:
    """Run a function in a process of its own, and return what it puts into the queue."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=function, args=(*arguments, queue))
    child.start()
    child.join()
    return queue.get()


if __name__ == "__main__":
    main()
