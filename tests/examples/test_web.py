"""Open examples/web in headless Chromium, and compare what it finds with what Python finds.

Needs npm, a Chromium and the Python package playwright. Where TOOD_EXPECT_WEB is set these are not
missing.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from axe import accessibility_problems
from examples.conftest import CONF, skip_or_fail
from same_detections import assert_same_detections

pytestmark = pytest.mark.slow
SOURCES = Path(__file__).resolve().parents[2] / "examples" / "web"
WAIT_MS = 120_000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, installed as its README says, from a folder of its own."""
    if shutil.which("npm") is None:
        skip_or_fail("TOOD_EXPECT_WEB", "npm is not installed")
    folder = tmp_path_factory.mktemp("web") / "web"
    shutil.copytree(SOURCES, folder, ignore=shutil.ignore_patterns("node_modules"))
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        skip_or_fail("TOOD_EXPECT_WEB", "Chromium is not installed")
    if importlib.util.find_spec("playwright") is None:
        skip_or_fail("TOOD_EXPECT_WEB", "the package playwright is not installed")
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, which may ask for nothing from elsewhere and may print no error."""
    context = browser.new_context()
    opened = context.new_page()
    elsewhere: list[str] = []
    errors: list[str] = []
    opened.on("request", lambda request: elsewhere.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda line: line.type == "error" and errors.append(line.text))
    opened.goto(address)
    yield opened
    context.close()
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def open_model(page: Any, artefact: Path) -> None:
    page.set_input_files("#model", [str(artefact), str(artefact.with_suffix(".json"))])
    page.wait_for_function(
        "/is open|cannot|not /.test(document.querySelector('#status').textContent)", timeout=WAIT_MS
    )


def status(page: Any) -> str:
    return page.text_content("#status")


def set_conf(page: Any, conf: float) -> None:
    page.eval_on_selector(
        "#conf",
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }",
        str(conf),
    )


def results(page: Any, images: list[Path]) -> list[dict[str, Any]]:
    page.set_input_files("#images", list(map(str, images)))
    page.wait_for_function(
        f"document.querySelector('#status').textContent.includes('image {len(images)} of')",
        timeout=WAIT_MS,
    )
    return list(map(json.loads, page.text_content("#lines").splitlines()))


def test_detections_are_pythons(
    page: Any, demo_artefact: Path, scenes: list[Path], expected_lines: dict[str, dict[str, Any]]
) -> None:
    open_model(page, demo_artefact)
    assert "is open (wasm)" in status(page)
    set_conf(page, CONF)
    lines = results(page, scenes)
    assert [line["source"] for line in lines] == [path.name for path in scenes]
    for line, path in zip(lines, scenes, strict=True):
        expected = expected_lines[str(path)]
        assert line.keys() == expected.keys()
        assert (line["height"], line["width"]) == (expected["height"], expected["width"])
        assert_same_detections(expected["detections"], line["detections"], 1e-3, 0.05)
    assert sum(len(line["detections"]) for line in lines) > 40


def test_boxes_are_drawn_and_the_slider_filters(
    page: Any, demo_artefact: Path, scenes: list[Path]
) -> None:
    open_model(page, demo_artefact)
    (line,) = results(page, scenes[1:2])
    rows = page.locator("#objects tr")
    assert rows.count() == len(line["detections"]) > 0
    pixels = "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
    drawn = page.evaluate(f"Array.from({pixels})")
    image = cv2.imread(str(scenes[1]))
    assert image is not None
    shown = np.array(drawn, np.uint8).reshape(*image.shape[:2], 4)[..., 2::-1]
    assert 0.001 < np.mean(np.any(shown != image, axis=2)) < 0.5
    best = max(one["score"] for one in line["detections"])
    set_conf(page, 0.95)
    assert rows.count() == sum(one["score"] > 0.95 for one in line["detections"])
    assert best < 0.95 or rows.count() > 0


def test_nothing_stands_in_the_way_of_keyboards_and_screen_readers(
    page: Any, demo_artefact: Path, scenes: list[Path]
) -> None:
    assert accessibility_problems(page) == []
    open_model(page, demo_artefact)
    results(page, scenes[1:2])
    page.click("summary")
    page.set_viewport_size({"width": 320, "height": 640})
    page.emulate_media(color_scheme="dark")
    assert accessibility_problems(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


@pytest.mark.parametrize("seed", [1, 2])
def test_resizing_is_opencvs_to_the_bit(page: Any, seed: int) -> None:
    """Noise shows every difference; sizes are drawn at random, exact halves among them."""
    rng = np.random.default_rng(seed)
    for i in range(12):
        height, width, rows, columns = map(int, rng.integers(1, 90, 4))
        if i % 3 == 0:
            height, width = 2 * rows, 2 * columns
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        rgba = np.dstack([image, np.full((height, width), 255, np.uint8)])
        resized = page.evaluate(
            """async ([data, width, height, columns, rows]) => {
                const {resizeAndPad} = await import("./resize.js");
                const size = {width: columns, height: rows};
                return Array.from(resizeAndPad(Uint8Array.from(data), {width, height}, size, size));
            }""",
            [rgba.ravel().tolist(), width, height, columns, rows],
        )
        expected = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(np.array(resized).reshape(rows, columns, 3), expected)


def test_other_sizings_are_pythons(page: Any) -> None:
    from tood_deploy.preprocess import fit_imgsz, fit_size, padded_size
    from tood_deploy.presets import Sizing

    sizings = [
        Sizing((240, 320)),
        Sizing((200, 330), "stretch"),
        Sizing((240, 320), canvas_hw=(192, 192)),
        Sizing((240, 320), divisor=64),
        Sizing((240, 320), scale_factor=(0.5, 0.4)),
        Sizing((240, 320), "stretch", (0.5, 0.4), canvas_hw=(320, 100)),
    ]
    for sizing in sizings:
        for image_hw in ((240, 320), (333, 500), (500, 333), (1, 900), (719, 1281)):
            preset = {
                "imgsz": sizing.imgsz,
                "resize": sizing.resize,
                "scale_factor": sizing.scale_factor,
                "pad_divisor": sizing.divisor,
                "canvas_hw": sizing.canvas_hw,
            }
            given = page.evaluate(
                """async ([image, preset]) => {
                    const {networkSize} = await import("./detector.js");
                    const {resized, padded} = networkSize(image, preset);
                    return [resized.height, resized.width, padded.height, padded.width];
                }""",
                [{"height": image_hw[0], "width": image_hw[1]}, preset],
            )
            net_hw = padded_size(image_hw, sizing)
            resized_hw = fit_size(image_hw, fit_imgsz(image_hw, sizing, net_hw))
            assert given == [*resized_hw, *net_hw], (sizing, image_hw)


def test_what_cannot_be_read_is_said(
    page: Any, demo_artefact: Path, scenes: list[Path], tmp_path: Path
) -> None:
    page.set_input_files("#images", str(scenes[0]))
    page.wait_for_selector("#status.error")
    assert "model first" in status(page)
    (tmp_path / "cut.png").write_bytes(scenes[0].read_bytes()[:60])
    open_model(page, demo_artefact)
    page.set_input_files("#images", str(tmp_path / "cut.png"))
    page.wait_for_selector("#status.error")
    assert "cut.png" in status(page)
    assert len(results(page, scenes[:1])) == 1


def test_another_json_is_no_manifest(page: Any, demo_artefact: Path, tmp_path: Path) -> None:
    shutil.copy(demo_artefact, tmp_path / "model.onnx")
    (tmp_path / "model.json").write_text("[]")
    open_model(page, tmp_path / "model.onnx")
    assert "manifest" in status(page)
