"""The page in headless Chromium: a dropped, pasted and chosen image, the slider, the camera."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from axe import accessibility_problems
from serve.served import Running, running

from tood_deploy import Detector
from tood_deploy.data.image_set import synthetic_image

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt-get install chromium"),
]
FLAGS = ("--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
DROP = """([name, text]) => {
  const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "image.png", {type: "image/png"}));
  const event = name === "paste"
    ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
    : new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
  document.getElementById("drop").dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def server(tiny_artefact: Path) -> Iterator[Running]:
    with running({"tiny": Detector(tiny_artefact)}) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """The page, which may ask nobody but the server, and write no error to the console."""
    page = browser.new_page()
    strangers: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: strangers.append(request.url))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"http://localhost:{server.port}/")
    yield page
    page.close()
    own = (f"http://localhost:{server.port}/", "data:", "blob:")
    assert [url for url in strangers if not url.startswith(own)] == []
    assert [line for line in problems if "400" not in line] == []


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), synthetic_image(240, 320, 0))
    return path


def rows(page: Any) -> int:
    return page.locator("#objects tbody tr").count()


def wait_for_objects(page: Any) -> None:
    sync_api.expect(page.locator("#status")).to_contain_text("objects,", timeout=20_000)


def test_a_chosen_image_and_the_threshold(page: Any, image: Path, tiny_artefact: Path) -> None:
    page.set_input_files("#file", image)
    wait_for_objects(page)
    assert "ms (server" in page.inner_text("#status")
    with Detector(tiny_artefact, conf=0.05) as detector:
        scores = detector(synthetic_image(240, 320, 0)).scores
    for threshold in (0.3, 0.05, 0.95):
        page.eval_on_selector(
            "#threshold",
            "(slider, value) => {"
            " slider.value = value; slider.dispatchEvent(new Event('input')); }",
            threshold,
        )
        assert rows(page) == int((scores > threshold).sum())
    assert page.inner_text("#threshold-value") == "0.95"
    size = page.eval_on_selector("#view", "canvas => [canvas.width, canvas.height]")
    assert size == [320, 240]


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_dropped_and_a_pasted_image(page: Any, image: Path, how: str) -> None:
    page.evaluate(DROP, [how, base64.b64encode(image.read_bytes()).decode()])
    wait_for_objects(page)
    assert rows(page) > 0


def test_the_camera(page: Any) -> None:
    page.click("#camera")
    wait_for_objects(page)
    assert page.get_attribute("#camera", "aria-pressed") == "true"
    page.click("#camera")
    assert page.inner_text("#camera") == "Use the camera"


def test_what_is_no_image_is_said(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "note.png"
    path.write_text("no image")
    page.set_input_files("#file", path)
    page.wait_for_selector("#status.problem")
    assert rows(page) == 0


def test_keyboard_and_names_for_screen_readers(page: Any, image: Path) -> None:
    focused = []
    for _ in range(6):
        page.keyboard.press("Tab")
        focused.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
    assert focused == ["API", "Metrics", "model", "file", "threshold", "camera"]
    for role, name in (
        ("combobox", "Model"),
        ("slider", "Score above"),
        ("button", "Use the camera"),
    ):
        assert page.get_by_role(role, name=name).count() == 1
    page.set_input_files("#file", image)
    wait_for_objects(page)
    assert "objects" in page.get_attribute("#view", "aria-label")
    page.focus("#threshold")
    before = page.inner_text("#threshold-value")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#threshold-value") > before


def test_the_page_of_the_api(page: Any, server: Running) -> None:
    page.goto(f"http://localhost:{server.port}/docs")
    page.wait_for_selector("details")
    text = page.inner_text("#calls")
    for path in ("/detect/{name}", "/v2/models/{name}/infer", "/metrics"):
        assert path in text
    assert "/detect/tiny" in page.inner_text("#examples")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_stands_in_the_way_of_keyboards_and_screen_readers(
    page: Any, image: Path, server: Running, scheme: Any
) -> None:
    """In a narrow window, before and after detection; nothing reaches out of it sideways."""
    page.set_viewport_size({"width": 320, "height": 640})
    page.emulate_media(color_scheme=scheme)
    assert accessibility_problems(page) == []
    page.set_input_files("#file", image)
    wait_for_objects(page)
    assert accessibility_problems(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.goto(f"http://localhost:{server.port}/docs")
    page.wait_for_selector("details")
    page.click("summary")
    assert accessibility_problems(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_the_slider_changes_what_is_said(page: Any, image: Path) -> None:
    page.set_input_files("#file", image)
    wait_for_objects(page)
    page.eval_on_selector(
        "#threshold", "slider => { slider.value = 0.05; slider.dispatchEvent(new Event('input')); }"
    )
    assert page.inner_text("#status").startswith(f"{rows(page)} objects, ")
