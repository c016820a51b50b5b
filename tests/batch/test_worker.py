"""One worker: a row for each image of its chunks, whatever is wrong with images or engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference.fakes import RedEngine, red_image, write_image
from inference.test_file_list import write_pages

pytest.importorskip("pyarrow")

import pyarrow as pa

from tood_deploy.batch.source import Chunk
from tood_deploy.batch.worker import ANSWER, Worker, WorkerOptions
from tood_deploy.data.image_file import ReadOptions
from tood_deploy.errors import ArtefactError
from tood_deploy.inference import detector as detector_module


class Link:
    """Stands for the job."""

    def __init__(self, hopeless: bool = False) -> None:
        self.hopeless = hopeless

    def model_files(self) -> dict[str, bytes]:
        return {"m.onnx": b"model", "m.json": b"{}"}

    def is_hopeless(self, chunk: Chunk) -> bool:
        return self.hopeless


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Worker]:
    """A function that makes a worker with a stand-in engine."""

    def make_worker(engine: RedEngine | None = None, link: Link | None = None, **reading: Any):
        def open_engine(model: Path, **options: Any) -> RedEngine:
            assert model.read_bytes() == b"model"
            assert model.with_suffix(".json").read_bytes() == b"{}"
            if engine is None:
                raise ArtefactError(f"{model}: not a model")
            return engine

        monkeypatch.setattr(detector_module, "open_engine", open_engine)
        options = WorkerOptions("m.onnx", {"conf": 0.3}, ReadOptions(**reading), 2)
        return Worker(link or Link(), options)

    return make_worker


def answer(worker: Worker, *paths: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of the images, as one chunk, by the files' names."""
    table = pa.Table.from_pylist([Chunk(tuple(map(str, paths))).to_row()])
    rows = worker(table)
    assert rows.schema == ANSWER
    return {Path(row["path"]).name: row for row in rows.to_pylist()}


def test_a_row_for_each_image(make: Callable[..., Worker], tmp_path: Path) -> None:
    images = [write_image(tmp_path / f"{i}.png", red_image(left=2 * i)) for i in range(5)]
    (tmp_path / "cut.png").write_bytes(images[0].read_bytes()[:60])
    rows = answer(make(RedEngine()), *images, tmp_path / "cut.png", tmp_path / "absent.png")
    assert len(rows) == 7
    for i, path in enumerate(images):
        row = rows[path.name]
        assert (row["height"], row["width"], row["error"]) == (48, 64, None)
        np.testing.assert_allclose(row["boxes"], [[2 * i, 8, 2 * i + 16, 24]], atol=0.5)
        assert (row["scores"], row["class_names"]) == ([0.75], ["red thing"])
        assert row["seconds"] > 0
    for name in ("cut.png", "absent.png"):
        assert name in rows[name]["error"]
        assert rows[name]["boxes"] is None


def test_images_that_the_engine_fails_at_are_rows_with_its_error(
    make: Callable[..., Worker], tmp_path: Path
) -> None:
    images = [write_image(tmp_path / f"{i}.png") for i in range(4)]
    rows = answer(make(RedEngine(fail_at_call=1)), *images)
    failed = [row for row in rows.values() if row["error"]]
    assert len(rows) == 4
    assert [Path(row["path"]).name for row in failed] == ["2.png", "3.png"]
    assert all("the engine broke" in row["error"] for row in failed)


def test_a_model_that_does_not_open_is_said_once(
    make: Callable[..., Worker], tmp_path: Path
) -> None:
    (row,) = answer(make(None), tmp_path / "a.png", tmp_path / "b.png").values()
    assert row["path"] == ""
    assert row["error"] == "m.onnx: not a model"


def test_what_kills_workers_is_done_alone_and_then_given_up(
    make: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = make(RedEngine(), Link(hopeless=True))
    assert answer(worker, tmp_path / "a.png", tmp_path / "b.png") == {}
    assert "a.png: workers were lost" in answer(worker, tmp_path / "a.png")["a.png"]["error"]


def test_pages_are_one_row_or_an_error(make: Callable[..., Worker], tmp_path: Path) -> None:
    pages = write_pages(tmp_path / "pages.tiff", 2)
    assert "--first-page" in answer(make(RedEngine()), pages)["pages.tiff"]["error"]
    row = answer(make(RedEngine(), first_page=True), pages)["pages.tiff"]
    assert row["error"] is None
    np.testing.assert_allclose(row["boxes"], [[8, 8, 24, 24]], atol=0.5)


def test_options_of_reading_count(make: Callable[..., Worker], tmp_path: Path) -> None:
    image = write_image(tmp_path / "a.png")
    assert "pixels" in answer(make(RedEngine(), max_pixels=100), image)["a.png"]["error"]
