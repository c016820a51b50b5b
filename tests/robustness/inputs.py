"""The genuine small inputs that mutations start from, and the targets: what is done with each.

Everything is generated; the model is `tiny` with its shipped weights.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from robustness.campaign import Prepared, Target
from robustness.mutations import json_bytes, mutate_bytes, mutate_lines, mutate_tree

from tood_deploy import Detector
from tood_deploy.demo import scenes
from tood_deploy.inference import detector as detector_module

WEIGHTS = Path(scenes.__file__).parents[1] / "weights" / "tiny-demo.safetensors"
IMAGES = ("jpg", "png", "webp", "tif", "bmp", "gif")
VIDEOS = ("mp4", "mkv", "avi")
FRAMES = 24
SOAK_FRAMES = 6000
SMALL = ("--imgsz", "64", "96", "--threads", "1", "--quiet", "--conf", "0.1")


class Seeds:
    """Made once in a folder; `Seeds(folder)` makes what is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "ready").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._make()
            (folder / "ready").touch()

    def __getitem__(self, name: str) -> Path:
        if name == "soak.mp4" and not (self.folder / name).exists():
            write_clip(self.folder / name, SOAK_FRAMES)
        return self.folder / name

    def _make(self) -> None:
        annotations = scenes.write_scenes(self["scenes"], 6, 2026)
        shutil.copy(annotations, self["annotations.json"])
        files = sorted((annotations.parent / "images").iterdir())
        for which, file in enumerate(files[:2]):
            image = cv2.resize(cv2.imread(str(file)), (96, 72))  # pyright: ignore
            for suffix in IMAGES:
                cv2.imwrite(str(self[f"{which}.{suffix}"]), image)
            for suffix in VIDEOS:
                write_clip(self[f"{which}.{suffix}"], FRAMES + 6 * which)
        write_clip(self["long.mp4"], 240)
        self._make_models()

    def _make_models(self) -> None:
        from tood_deploy.cli import export
        from tood_deploy.cli import infer as infer_command
        from tood_deploy.model import load_checkpoint

        model, images = self["tiny.onnx"], self["scenes"] / "images"
        run(export.main, WEIGHTS, "--output", model, "--quiet")
        run(export.main, model, "--to", "openvino", "--output", self["ov.xml"], "--quiet")
        annotations = ("--coco-annotations", self["annotations.json"])
        results = ("--json", self["results.json"])
        run(infer_command.main, model, images, *results, *annotations, "--quiet", "--conf", "0.05")
        shutil.copy(WEIGHTS, self["weights.safetensors"])
        import torch

        state = load_checkpoint(WEIGHTS).state_dict()
        classes = ["disc", "square"]
        torch.save({"state_dict": state, "meta": {"classes": classes}}, self["weights.pth"])


def moving(count: int) -> list[np.ndarray]:
    """Images (120, 160, 3) of a square that moves."""
    return [moved(number) for number in range(count)]


def moved(number: int) -> np.ndarray:
    """Return the image (120, 160, 3) of a number."""
    image = np.full((120, 160, 3), 60, np.uint8)
    left = 3 * number % 120
    image[30:70, left : left + 40] = (200, 40, 60)
    return image


def write_clip(path: Path, count: int) -> None:
    """Write that many images as a video of 25 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".avi" else "libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 120, 160, "yuv420p"
        stream.codec_context.gop_size = 12
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(moved(number), format="bgr24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def run(main: Callable[[list[str]], int], *arguments: object) -> None:
    """Run a command that must succeed."""
    code = main([str(argument) for argument in arguments])
    assert code == 0, (main.__module__, arguments, code)


def targets(seeds: Seeds) -> dict[str, tuple[Target, int]]:
    """Return every target by name, with its share of ten thousand cases."""
    share: dict[str, tuple[Target, int]] = {}
    share |= {name: (_media(seeds, name, _infer_image), 450) for name in IMAGES}
    share |= {name: (_media(seeds, name, _infer_video), 400) for name in VIDEOS}
    share |= {
        "annotations": (_json(seeds, "annotations.json", _score_with), 1200),
        "results": (_json(seeds, "results.json", _score), 900),
        "mapping": (_mapping(seeds), 300),
        "manifest": (_json(seeds, "tiny.json", _open_beside), 1200),
        "classes": (_lines(seeds, [b"disc", b"square", b"ring", b"triangle"], _classes), 300),
        "list": (_lines(seeds, [b"0.jpg", b"1.png"], _list), 300),
        "onnx": (_bytes(seeds, "tiny.onnx", "ov.bin", _open_onnx), 300),
        "xml": (_bytes(seeds, "ov.xml", "tiny.json", _open_xml), 200),
        "bin": (_bytes(seeds, "ov.bin", "tiny.onnx", _open_xml), 100),
        "pth": (_bytes(seeds, "weights.pth", "tiny.onnx", _load), 300),
        "safetensors": (_bytes(seeds, "weights.safetensors", "tiny.onnx", _load), 300),
        "predictions": (_predictions, 300),
        "source": (_bytes(seeds, "tiny.onnx", "ov.bin", _export_again), 100),
    }
    return share


@cache
def _detector_of(model: Path) -> Any:
    from tood_deploy.engines import open_engine

    engine = open_engine(model, threads=1)
    engine.close = lambda: None  # it serves many commands
    return engine


def infer(model: Path, *arguments: object) -> int:
    """Run tood-infer with an engine that stays open from case to case."""
    from tood_deploy.cli.infer import main

    detector_module.open_engine = lambda *_, **__: _detector_of(model)
    return main([str(model), *map(str, arguments), *SMALL])


def _bytes(seeds: Seeds, name: str, other: str, call: Callable[[Seeds, Path], Prepared]) -> Target:
    """Return a target that changes the bytes of one file of a model."""

    def prepare(folder: Path, chance: random.Random) -> Prepared:
        for part in seeds.folder.glob(f"{Path(name).stem}.*"):
            if part.suffix not in (*(f".{ending}" for ending in (*IMAGES, *VIDEOS)),):
                os.link(part, folder / part.name)
        data, mutation = mutate_bytes(seeds[name].read_bytes(), chance, seeds[other].read_bytes())
        (folder / name).unlink()
        (folder / name).write_bytes(data)
        prepared = call(seeds, folder / name)
        return Prepared(prepared.call, mutation, prepared.wrong)

    return prepare


def _media(seeds: Seeds, suffix: str, call: Callable[[Seeds, Path], Prepared]) -> Target:
    def prepare(folder: Path, chance: random.Random) -> Prepared:
        which = chance.randrange(2)
        data = seeds[f"{which}.{suffix}"].read_bytes()
        other = seeds[f"{1 - which}.{suffix}"].read_bytes()
        data, mutation = mutate_bytes(data, chance, other)
        path = folder / f"in.{suffix}"
        path.write_bytes(data)
        prepared = call(seeds, path)
        return Prepared(prepared.call, mutation, prepared.wrong)

    return prepare


def _infer_image(seeds: Seeds, path: Path) -> Prepared:
    out = path.parent
    outputs = ("--output", out / "drawn", "--json", out / "o.json", "--jsonl", out / "o.jsonl")
    return Prepared(lambda: infer(seeds["tiny.onnx"], path, *outputs), "")


def _infer_video(seeds: Seeds, path: Path) -> Prepared:
    out = path.parent
    outputs = ("--output", out / "drawn.mp4", "--json", out / "o.json", "--jsonl", out / "o.jsonl")

    def wrong() -> str:
        frames = (out / "o.jsonl").read_bytes().count(b"\n")
        return f"{frames} of {FRAMES} frames, and exit code 0" if frames < FRAMES else ""

    return Prepared(lambda: infer(seeds["tiny.onnx"], path, *outputs), "", wrong)


def _json(seeds: Seeds, name: str, call: Callable[[Seeds, Path], Prepared]) -> Target:
    def prepare(folder: Path, chance: random.Random) -> Prepared:
        tree, mutation = mutate_tree(json.loads(seeds[name].read_bytes()), chance)
        (folder / name).write_bytes(json_bytes(tree, chance))
        return Prepared(call(seeds, folder / name).call, mutation)

    return prepare


def _score_with(seeds: Seeds, path: Path) -> Prepared:
    return Prepared(lambda: _evaluate(seeds["results.json"], path), "")


def _score(seeds: Seeds, path: Path) -> Prepared:
    return Prepared(lambda: _evaluate(path, seeds["annotations.json"]), "")


def _evaluate(results: Path, annotations: Path, mapping: Path | None = None) -> None:
    """Score as tood-eval does, without the figures of its report."""
    from tood_deploy.benchmark.evaluation.evaluate import evaluate_file, open_data_set
    from tood_deploy.data.categories import map_categories
    from tood_deploy.reporter import Reporter

    data = open_data_set(annotations, None)
    if mapping is not None:
        map_categories(["disc", "square", "ring", "triangle"], data.truth, mapping)
    evaluate_file(results, data, "tood-eval", Reporter.silent())


def _mapping(seeds: Seeds) -> Target:
    def prepare(folder: Path, chance: random.Random) -> Prepared:
        names = {"disc": "disc", "square": None, "ring": "ring"}
        tree, mutation = mutate_tree(names, chance)
        (folder / "mapping.json").write_bytes(json_bytes(tree, chance))
        parts = seeds["results.json"], seeds["annotations.json"], folder / "mapping.json"
        return Prepared(lambda: _evaluate(*parts), mutation)

    return prepare


def _open_beside(seeds: Seeds, manifest: Path) -> Prepared:
    """Open the model of a manifest, and run it."""
    model = manifest.with_suffix(".onnx")
    os.link(seeds["tiny.onnx"], model)
    return _opened(model)


def _open_onnx(seeds: Seeds, model: Path) -> Prepared:
    return _opened(model)


def _open_xml(seeds: Seeds, path: Path) -> Prepared:
    return _opened(path.with_suffix(".xml"))


def _opened(model: Path) -> Prepared:
    """Open an artefact as tood-infer does, and detect in one image."""
    from tood_deploy.engines import open_engine

    def call() -> None:
        from tood_deploy.cli.infer import build_parser, check_bytes

        check_bytes(build_parser().parse_args([str(model), "a.jpg"]))
        with Detector(open_engine(model, threads=1), conf=0.1) as detector:
            detector(moving(1)[0])

    return Prepared(call, "")


def _load(seeds: Seeds, path: Path) -> Prepared:
    from tood_deploy.model import load_checkpoint

    return Prepared(lambda: load_checkpoint(path) and 0, "")


def _export_again(seeds: Seeds, path: Path) -> Prepared:
    """Read an .onnx that has no manifest beside it, as tood-export does."""
    from tood_deploy.onnx_file import read_onnx
    from tood_deploy.parity.onnx_reference import OnnxRunner

    path.with_suffix(".json").unlink()

    def call() -> None:
        image = np.zeros((1, 64, 96, 3), np.uint8)
        OnnxRunner(read_onnx(path).model)(image, np.array([[64, 96]], np.int32), 0.1, 0.6)

    return Prepared(call, "")


def _lines(seeds: Seeds, lines: list[bytes], call: Callable[[Seeds, Path], Prepared]) -> Target:
    def prepare(folder: Path, chance: random.Random) -> Prepared:
        for name in ("0.jpg", "1.png"):
            os.link(seeds[name], folder / name)
        data, mutation = mutate_lines(lines, chance)
        (folder / "lines.txt").write_bytes(data)
        return Prepared(call(seeds, folder / "lines.txt").call, mutation)

    return prepare


def _classes(seeds: Seeds, path: Path) -> Prepared:
    from tood_deploy.cli.common import class_names_from

    return Prepared(lambda: class_names_from(str(path)) and 0, "")


def _list(seeds: Seeds, path: Path) -> Prepared:
    return Prepared(lambda: infer(seeds["tiny.onnx"], path, "--json", path.parent / "o.json"), "")


def _predictions(folder: Path, chance: random.Random) -> Prepared:
    """Go on from the predictions that an evaluation was writing when it was killed."""
    from tood_deploy.benchmark.evaluation.predict import Key, PredictionFile
    from tood_deploy.detections import Detections

    path, key = folder / "predictions.jsonl", Key({"model": "a"})
    boxes, scores = np.ones((2, 4), np.float32), np.array([0.9, 0.8], np.float32)
    found = Detections(boxes, scores, np.zeros(2, np.int32), ("disc",))
    with PredictionFile(path, key) as kept:
        for image in range(3):
            kept.add(image, (10, 20), found)
    data, mutation = mutate_bytes(path.read_bytes(), chance, path.read_bytes())
    path.write_bytes(data)

    def call() -> None:
        with PredictionFile(path, key) as again:
            again.add(9, (10, 20), found)
            again.results([1])

    return Prepared(call, mutation)
