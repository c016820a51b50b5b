"""Time sliced inference against the package sahi, which drives the very same engine.

    python benchmarks/slicing.py r50.onnx --runtime openvino

Needs sahi (tested with 0.12.8), which would replace OpenCV: install it with --no-deps beside
shapely, tqdm, click, fire, PyYAML and requests. Windows, thresholds, sizes and merging are equal,
and the objects are compared. Rounds take turns, so that other load on the machine hits both alike;
all times are medians.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sahi.models.base import DetectionModel  # pyright: ignore[reportMissingImports] - by hand
from sahi.predict import get_sliced_prediction  # pyright: ignore[reportMissingImports]
from sahi.prediction import ObjectPrediction  # pyright: ignore[reportMissingImports]

from tood_deploy import Detections, Detector, Slicing, __version__
from tood_deploy.benchmark.latency.machine import describe_machine
from tood_deploy.data.images import read_image
from tood_deploy.demo.scenes import make_scene
from tood_deploy.inference.frame import Frame
from tood_deploy.inference.pipeline import Timings, detect_frames
from tood_deploy.inference.sliced_pipeline import OneFrame

FOUR_K = (2160, 3840)


class ToodModel(DetectionModel):
    """A detector as sahi drives models: a window in, its own objects out."""

    def load_model(self) -> None:
        """Refuse: the detector is given."""
        raise NotImplementedError

    def set_model(self, model: Any, **_: Any) -> None:
        """Take an open detector."""
        self.model = model
        self.category_mapping = {str(i): name for i, name in enumerate(model.class_names)}

    def perform_inference(self, image: NDArray[np.uint8]) -> None:
        """Detect in a window (H, W, 3) uint8 BGR."""
        self._original_predictions = self.model(image)

    def _create_object_prediction_list_from_original_predictions(
        self, shift_amount_list: Any = None, full_shape_list: Any = None
    ) -> None:
        shift = shift_amount_list[0] if np.ndim(shift_amount_list) > 1 else shift_amount_list
        shape = full_shape_list[0] if np.ndim(full_shape_list) > 1 else full_shape_list
        found: Detections = self._original_predictions
        self._object_prediction_list_per_image = [
            [
                ObjectPrediction(
                    bbox=box,
                    score=score,
                    category_id=class_id,
                    category_name=name,
                    shift_amount=shift,
                    full_shape=shape,
                )
                for box, score, class_id, name in zip(
                    found.boxes.tolist(),
                    found.scores.tolist(),
                    found.class_ids.tolist(),
                    found.names(),
                    strict=True,
                )
            ]
        ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an artefact, .onnx or .xml")
    parser.add_argument("--image", type=Path, help="default: a generated scene of 2160 x 3840")
    parser.add_argument("--slice", type=int, nargs=2, default=(640, 640), metavar=("H", "W"))
    parser.add_argument("--imgsz", type=int, nargs=2, default=(640, 640), metavar=("H", "W"))
    parser.add_argument("--conf", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"))
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    image = four_k_scene() if arguments.image is None else read_image(arguments.image)
    print_table(arguments, image)


def four_k_scene() -> NDArray[np.uint8]:
    """Return a generated scene with hundreds of small objects, (2160, 3840, 3) uint8 BGR."""
    return make_scene((14, 0), FOUR_K, (300, 400), (8.0, 30.0)).image_bgr


def print_table(arguments: argparse.Namespace, whole: NDArray[np.uint8]) -> None:
    """Measure both in turn, and print the table."""
    options = {"conf": arguments.conf, "imgsz": arguments.imgsz}
    options |= {
        name: value
        for name in ("runtime", "threads")
        if (value := getattr(arguments, name)) is not None
    }
    slicing = Slicing(arguments.slice)
    ours = Detector(arguments.model, slicing=slicing, hint="throughput", **options)
    same = Detector(ours.engine, conf=arguments.conf, imgsz=arguments.imgsz)
    contenders = {  # an engine for throughput gives one call a part of the cores
        "sahi, the same engine": same,
        "sahi, an engine opened for latency": Detector(arguments.model, **options),
    }
    models = {name: ToodModel(model=found, device="cpu") for name, found in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in ("tood_deploy", *models)}
    shares: list[float] = []
    objects: dict[str, NDArray[np.float64]] = {}
    height, width = arguments.slice
    few = np.ascontiguousarray(whole[: 3 * height // 2, : 3 * width // 2])  # to warm up on
    for round_ in range(arguments.rounds + 1):
        image = few if not round_ else whole
        started = time.perf_counter()
        found, share = detect(ours, image, arguments.batch)
        times["tood_deploy"].append(time.perf_counter() - started)
        objects["tood_deploy"] = rows(found)
        shares.append(share)
        for name, model in models.items():
            started = time.perf_counter()
            predicted = predict(model, image, arguments.slice)
            times[name].append(time.perf_counter() - started)
            objects[name] = rows_of_sahi(predicted)
    show(arguments, ours, times, shares, objects, len(slicing.windows(whole.shape[:2])))


def detect(detector: Detector, image: NDArray[np.uint8], batch: int) -> tuple[Detections, float]:
    """Return the objects, and the share of the time that cutting and merging took."""
    timings = Timings()
    (_, found), *_ = detect_frames(detector, OneFrame(Frame(image, "image")), batch, timings)
    beside = timings.mean_ms("pre") + timings.mean_ms("post")
    return found, beside / timings.mean_ms("end_to_end")


def predict(
    model: ToodModel, image: NDArray[np.uint8], size_hw: Sequence[int]
) -> list[ObjectPrediction]:
    """Return the objects that sahi gives with its own defaults, which are ours."""
    result = get_sliced_prediction(
        image,
        model,
        slice_height=size_hw[0],
        slice_width=size_hw[1],
        verbose=0,
        force_postprocess_type=True,
    )
    return result.object_prediction_list


def rows(found: Detections) -> NDArray[np.float64]:
    """Return (D, 6) box, score and class, sorted."""
    columns = (found.boxes, found.scores[:, None], found.class_ids[:, None])
    values = np.concatenate(columns, axis=1).astype(np.float64)
    return values[np.lexsort(values.T)]


def rows_of_sahi(found: Sequence[ObjectPrediction]) -> NDArray[np.float64]:
    """Return the same of sahi's objects."""
    values = np.array(
        [(*one.bbox.to_xyxy(), one.score.value, one.category.id) for one in found], np.float64
    ).reshape(-1, 6)
    return values[np.lexsort(values.T)]


def show(
    arguments: argparse.Namespace,
    detector: Detector,
    times: dict[str, list[float]],
    shares: list[float],
    objects: dict[str, NDArray[np.float64]],
    windows: int,
) -> None:
    """Print the table.

    Args:
        arguments: of the command line.
        detector: ours.
        times: seconds of every round, the first of them a warm-up, by name.
        shares: of cutting and merging, of every round.
        objects: of the last round, by name.
        windows: how many an image has.
    """
    machine = describe_machine()
    table = Table(title=f"{arguments.model}, {detector.engine.name}, {machine.cpu}")
    for column in ("", "s an image", "ratio", "objects"):
        table.add_column(column)
    own = statistics.median(times["tood_deploy"][1:])
    for name, seconds in times.items():
        median = statistics.median(seconds[1:])
        table.add_row(name, f"{median:.2f}", f"{median / own:.2f}", str(len(objects[name])))
    console = Console(width=110)
    console.print(table)
    size = " x ".join(map(str, arguments.slice))
    cost = statistics.median(shares[1:])
    console.print(
        f"{windows} windows of {size} and the whole, network input for {arguments.imgsz}, batch "
        f"{arguments.batch}, {arguments.rounds} rounds, tood_deploy {__version__}, "
        f"{machine.cores} cores; cutting, scaling and merging: {100 * cost:.1f}% of the time"
    )


if __name__ == "__main__":
    main()
