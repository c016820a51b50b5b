"""Downloads from a local HTTP server, whose manners every test chooses."""

import hashlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tood_deploy.errors import DownloadError
from tood_deploy.files import home_folder
from tood_deploy.model import download
from tood_deploy.model.download import fetch_weights
from tood_deploy.presets import PRESETS, Preset, PublishedWeights
from tood_deploy.reporter import Reporter

PAYLOAD = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()
NAME = "weights.pth"


class WeightsServer(ThreadingHTTPServer):
    """Serves PAYLOAD under every path and keeps the Range header of each request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WeightsHandler)
        self.payload = PAYLOAD
        self.status = 200
        self.honours_range = True
        self.shifts_range = 0  # how far past the requested offset a range starts
        self.says_length = True
        self.pause_s = 0.0
        self.cuts: list[int] = []  # bytes after which the coming responses break off
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{NAME}"


class WeightsHandler(BaseHTTPRequestHandler):
    server: WeightsServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        requested = self.headers["Range"]
        self.server.ranges.append(requested)
        if self.server.status != 200:
            return self.send_error(self.server.status)
        start = 0
        if requested and self.server.honours_range:
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
            start += self.server.shifts_range
        time.sleep(self.server.pause_s)
        total = len(self.server.payload)
        if start >= total:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if self.server.says_length:
            self.send_header("Content-Length", str(total - start))
        self.end_headers()
        end = start + self.server.cuts.pop(0) if self.server.cuts else total
        self.wfile.write(self.server.payload[start:end])
        return None

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightsServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    with WeightsServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def preset_at(url: str, prefix: str = SHA256[:8]) -> Preset:
    return replace(PRESETS["r50-1x"], weights=PublishedWeights(url, prefix))


def test_downloads_whole_file(
    server: WeightsServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = fetch_weights(preset_at(server.url), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / NAME
    assert path.read_bytes() == PAYLOAD
    assert not list(path.parent.glob("*.part"))
    assert capfd.readouterr() == ("", "")  # no bar where there is no terminal


@pytest.mark.parametrize("quiet", [False, True])
def test_a_long_download_shows_how_far_it_is(
    quiet: bool, server: WeightsServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count(step=10.0)
    reporter = Reporter(quiet, clock=lambda: next(seconds))
    fetch_weights(preset_at(server.url), tmp_path, reporter)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("of 1.0 MB" in err) != quiet


def test_second_time_asks_no_server(server: WeightsServer, tmp_path: Path) -> None:
    first = fetch_weights(preset_at(server.url), tmp_path)
    assert fetch_weights(preset_at(server.url), tmp_path) == first
    assert len(server.ranges) == 1


def test_broken_transfer_is_resumed_at_once(server: WeightsServer, tmp_path: Path) -> None:
    server.cuts = [300_000, 200_000]
    path = fetch_weights(preset_at(server.url), tmp_path)
    assert path.read_bytes() == PAYLOAD
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]


def test_transfer_that_keeps_breaking_is_resumed_next_time(
    server: WeightsServer, tmp_path: Path
) -> None:
    server.cuts = [1000] * download.ATTEMPTS
    with pytest.raises(DownloadError, match="4000 bytes are kept"):
        fetch_weights(preset_at(server.url), tmp_path)
    assert not (tmp_path / NAME).exists()
    assert fetch_weights(preset_at(server.url), tmp_path).read_bytes() == PAYLOAD
    assert server.ranges[-1] == "bytes=4000-"


@pytest.mark.parametrize(
    ("manner", "value", "more"), [("honours_range", False, []), ("shifts_range", 10, [None])]
)
def test_server_without_the_range_starts_over(
    manner: str, value: int, more: list[None], server: WeightsServer, tmp_path: Path
) -> None:
    setattr(server, manner, value)
    server.cuts = [300_000]
    assert fetch_weights(preset_at(server.url), tmp_path).read_bytes() == PAYLOAD
    assert server.ranges == [None, "bytes=300000-", *more]


def test_server_without_length(server: WeightsServer, tmp_path: Path) -> None:
    server.says_length = False
    assert fetch_weights(preset_at(server.url), tmp_path).read_bytes() == PAYLOAD


def test_part_that_is_whole_needs_no_server(server: WeightsServer, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(PAYLOAD)
    assert fetch_weights(preset_at(server.url), tmp_path).read_bytes() == PAYLOAD
    assert server.ranges == []


def test_part_longer_than_the_file_starts_over(server: WeightsServer, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(PAYLOAD + b"more")
    assert fetch_weights(preset_at(server.url), tmp_path).read_bytes() == PAYLOAD
    assert server.ranges == [f"bytes={len(PAYLOAD) + 4}-", None]


def test_wrong_hash_is_deleted_and_named(server: WeightsServer, tmp_path: Path) -> None:
    server.payload = b"<html>please log in</html>"
    sha256 = hashlib.sha256(server.payload).hexdigest()
    with pytest.raises(DownloadError, match=f"{sha256}.*{SHA256[:8]}"):
        fetch_weights(preset_at(server.url), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_file_cut_in_the_cache_is_fetched_again(server: WeightsServer, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(PAYLOAD[:1000])
    assert fetch_weights(preset_at(server.url), tmp_path).read_bytes() == PAYLOAD


def test_missing_on_the_server(server: WeightsServer, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(DownloadError, match=f"{server.url}.*404.*{tmp_path / NAME}"):
        fetch_weights(preset_at(server.url), tmp_path)
    assert len(server.ranges) == 1  # a clear answer is not asked for again


def test_no_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(DownloadError, match=r"refused.*save it as"):
        fetch_weights(preset_at(f"http://127.0.0.1:{port}/{NAME}"), tmp_path)


def test_folder_that_cannot_be_written(server: WeightsServer, tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    with pytest.raises(DownloadError, match="TOOD_HOME"):
        fetch_weights(preset_at(server.url), blocked / "weights")


def test_full_disk_is_said(
    server: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "_receive", full)
        with pytest.raises(DownloadError, match="No space left on device"):
            fetch_weights(preset_at(server.url), tmp_path)
    assert fetch_weights(preset_at(server.url), tmp_path).read_bytes() == PAYLOAD


def test_two_at_once_download_once(server: WeightsServer, tmp_path: Path) -> None:
    server.pause_s = 0.1  # so that all have begun before one is done
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch_weights(preset_at(server.url), tmp_path), range(4)))
    assert {path.read_bytes() for path in paths} == {PAYLOAD}
    assert server.ranges == [None]


@pytest.mark.parametrize(("name", "reason"), [("x101-dcn-2x", "by hand"), ("tiny", "no weights")])
def test_preset_without_weights(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"{name}: .*{reason}"):
        fetch_weights(PRESETS[name], tmp_path)


def test_weights_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOOD_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert home_folder("weights") == Path.home() / ".cache" / "tood_deploy" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home_folder("weights") == tmp_path / "tood_deploy" / "weights"
    monkeypatch.setenv("TOOD_HOME", str(tmp_path / "tood"))
    assert home_folder("weights") == tmp_path / "tood" / "weights"
