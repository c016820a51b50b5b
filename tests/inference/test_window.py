import cv2
import numpy as np
import pytest
from inference.fakes import found, red_image, video_frame, write_all
from numpy.typing import NDArray

from tood_deploy.errors import OutputError
from tood_deploy.inference import sinks as window_module
from tood_deploy.inference.sinks import Finished, Window

ONE = found((8, 8, 24, 24))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.uint8]]:
    """A stand-in for a display: the frames it was asked to show; the third one is answered with the key q."""
    images: list[NDArray[np.uint8]] = []
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:   QT5\n")
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "imshow", lambda title, image: images.append(image))
    monkeypatch.setattr(cv2, "waitKey", lambda ms: ord("q") if len(images) == 3 else -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda title, what: 1.0)
    monkeypatch.setattr(
        cv2, "destroyAllWindows", lambda: images.append(np.zeros((1, 1, 3), np.uint8))
    )
    return images


def test_frames_are_shown_until_q(shown: list[NDArray[np.uint8]]) -> None:
    sink = Window()
    with pytest.raises(Finished):
        write_all(sink, *((video_frame(i, i), ONE) for i in range(10)))
    assert len(shown) == 4
    assert (shown[0] == ONE.plot(red_image())).all()


def test_without_windows_in_opencv() -> None:
    if "GUI:                           NONE" not in cv2.getBuildInformation():
        pytest.skip("this OpenCV has windows")
    with pytest.raises(OutputError, match="opencv-python"):
        Window()


def test_without_a_display(shown: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_module.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(OutputError, match="no display"):
        Window()
