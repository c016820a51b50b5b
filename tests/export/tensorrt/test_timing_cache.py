"""The timing cache's file. TensorRT-RTX has none, so the library's side is faked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tood_deploy.engines.tensorrt.library import Flavour, load_flavour
from tood_deploy.errors import ArtefactError
from tood_deploy.export.tensorrt.build import kept_timings

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def flavour() -> Flavour:
    """TensorRT-RTX's logger under TensorRT's name."""
    return Flavour("tensorrt", None, "11.4", load_flavour("tensorrt_rtx").logger)


class FakeConfig:
    """A builder configuration that takes what begins with "timings"."""

    def __init__(self, here: bool = True) -> None:
        self.here, self.content = here, b""

    def create_timing_cache(self, content: bytes) -> Any:
        if content and not content.startswith(b"timings"):
            library = load_flavour("tensorrt_rtx")
            cast(Any, library.logger).log(library.module.ILogger.ERROR, "timing cache is corrupted")
            return None
        self.content = content
        return SimpleNamespace(
            serialize=lambda: self.content + b" and more" if self.content else b"timings"
        )

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return self.here


def test_timings_are_read_and_written_faked(flavour: Flavour, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache.bin"
    with kept_timings(flavour, FakeConfig(), path):
        assert not path.exists()
    assert path.read_bytes() == b"timings"
    with kept_timings(flavour, FakeConfig(), path):
        pass
    assert path.read_bytes() == b"timings and more"


def test_without_a_file_nothing_is_asked_of_the_library_faked(flavour: Flavour) -> None:
    with kept_timings(flavour, object(), None):
        pass


def test_a_failed_build_leaves_the_file_as_it_was_faked(flavour: Flavour, tmp_path: Path) -> None:
    path = tmp_path / "cache.bin"
    path.write_bytes(b"timings")
    with (
        pytest.raises(ValueError, match="the build failed"),
        kept_timings(flavour, FakeConfig(), path),
    ):
        raise ValueError("the build failed")
    assert path.read_bytes() == b"timings"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_refused_before_the_build_faked(flavour: Flavour, tmp_path: Path) -> None:
    message = r"cannot be read as a file \(Is a directory\); give another --timing-cache"
    with pytest.raises(ArtefactError, match=message), kept_timings(flavour, FakeConfig(), tmp_path):
        raise AssertionError("builds")


@pytest.mark.parametrize(
    ("content", "here", "message"),
    [
        (
            b"corrupted",
            True,
            r"cache\.bin: not a timing cache \(timing cache is corrupted\); delete it, or give another --timing-cache",
        ),
        (
            b"timings",
            False,
            r"cache\.bin: measured on another GPU, or with another version than TensorRT 11\.4 .*; delete it",
        ),
    ],
)
def test_timings_that_do_not_fit_are_refused_faked(
    content: bytes, here: bool, message: str, flavour: Flavour, tmp_path: Path
) -> None:
    path = tmp_path / "cache.bin"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=message), kept_timings(flavour, FakeConfig(here), path):
        pass
    assert path.read_bytes() == content
