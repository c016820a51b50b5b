"""Download published weights once, into the user's cache.

A preset in, the path of its checkpoint out. Knows no torch, and not what a checkpoint holds.

A file in the cache always has the published hash: a download grows in a `.part` beside it, which a
broken transfer leaves behind for the next try to resume.
"""

import http
import http.client
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from filelock import FileLock

from tood_deploy.errors import DownloadError
from tood_deploy.files import file_sha256, home_folder
from tood_deploy.presets import Preset, PublishedWeights, published_weights
from tood_deploy.reporter import Reporter

TIMEOUT_S = 30.0
ATTEMPTS = 4
PAUSE_S = 1.0
CHUNK_BYTES = 1 << 18


def fetch_weights(
    preset: Preset, cache: Path | None = None, reporter: Reporter | None = None
) -> Path:
    """Return the preset's published checkpoint on this disk, downloaded if it is not there yet.

    Args:
        preset: whose weights.
        cache: the folder to keep them in; `home_folder("weights")` where not given.
        reporter: shows how far a download is; one that is not quiet where not given.

    Returns:
        The file, whose SHA-256 was compared with the published one just now.

    Raises:
        DownloadError: nothing is published for this preset, or it cannot be downloaded or stored,
            or arrived with another hash.
    """
    weights = published_weights(preset)
    folder = home_folder("weights") if cache is None else cache
    target = folder / weights.url.rsplit("/", 1)[1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{target.name}.lock"):
            if not (target.is_file() and _is_published(target, weights)):
                _fetch(weights, target, reporter or Reporter())
    except OSError as error:
        reason = error.strerror or error
        raise DownloadError(
            f"{folder}: cannot store weights ({reason}); "
            "make room, or name another folder in TOOD_HOME"
        ) from error
    return target


def _is_published(path: Path, weights: PublishedWeights) -> bool:
    return file_sha256(path).startswith(weights.sha256_prefix)


def _fetch(weights: PublishedWeights, target: Path, reporter: Reporter) -> None:
    """Download a file, check its hash, and give it its name.

    Args:
        weights: where it is published, and its hash.
        target: the file's path in the cache.
        reporter: shows how far the download is.
    """
    part = target.with_name(f"{target.name}.part")
    if not (part.is_file() and _is_published(part, weights)):
        by_hand = f"download it by other means and save it as {target}"
        _download(weights.url, part, reporter, by_hand)
    sha256 = file_sha256(part)
    if not sha256.startswith(weights.sha256_prefix):
        part.unlink()
        raise DownloadError(
            f"{weights.url}: what arrived has SHA-256 {sha256}, expected one starting with "
            f"{weights.sha256_prefix}; it was deleted: try again, or save the right file as "
            f"{target}"
        )
    part.replace(target)


def _download(url: str, part: Path, reporter: Reporter, by_hand: str) -> None:
    """Let `part` grow to the server's whole file, resuming a transfer that breaks off.

    Args:
        url: of the file.
        part: what was received before, if it exists.
        reporter: shows how far it is.
        by_hand: how a user can do without, for errors.
    """
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE_S * attempt)
        try:
            response = _request(url, part.stat().st_size if part.exists() else 0)
        except HTTPError as error:
            error.close()
            raise DownloadError(
                f"{url}: the server answers {error.code} {error.reason}; {by_hand}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise DownloadError(
                f"{url}: cannot be reached ({reason}); check the network, or {by_hand}"
            ) from error
        with response:
            if _receive(response, part, reporter):
                return
    kept = f"{part.stat().st_size} bytes are kept"
    raise DownloadError(
        f"{url}: broke off {ATTEMPTS} times; {kept}: try again to go on from there, or {by_hand}"
    )


def _request(url: str, offset: int) -> http.client.HTTPResponse:
    """Ask for the file from `offset` on.

    Returns:
        The answer: status 206, or 200 and the whole file where the server, or an offset past the
        file's end, does not allow that.
    """
    headers = {"User-Agent": "tood_deploy"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not offset:
            raise
        error.close()
        return _request(url, 0)
    served_range = response.headers.get("Content-Range", "")
    partial = offset and response.status == http.HTTPStatus.PARTIAL_CONTENT
    if partial and not served_range.startswith(f"bytes {offset}-"):  # another part than asked for
        response.close()
        return _request(url, 0)
    return response


def _receive(response: http.client.HTTPResponse, part: Path, reporter: Reporter) -> bool:
    """Write a response to the end of `part`, or from its start if it is the whole file.

    Args:
        response: of the server.
        part: the file.
        reporter: shows how far it is.

    Returns:
        Whether the file is whole now, and the transfer did not break off.
    """
    resumes = response.status == http.HTTPStatus.PARTIAL_CONTENT
    with part.open("ab" if resumes else "wb") as file:
        start, length = file.tell(), response.length
        total = None if length is None else start + length
        with reporter.progress(part.stem, total, unit="bytes") as task:
            task.update(start)
            for chunk in _chunks(response):
                file.write(chunk)
                task.advance(len(chunk))
        return response.isclosed() if total is None else file.tell() == total


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield what arrives, until the end or until the connection breaks."""
    while True:
        try:
            chunk = response.read(CHUNK_BYTES)
        except (OSError, http.client.HTTPException):
            return
        if not chunk:
            return
        yield chunk
