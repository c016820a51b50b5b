"""Addresses of streams and files: which kind one is, and how it is shown without its secrets."""

from __future__ import annotations

import re
import sys
from os import PathLike
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit
from urllib.request import url2pathname

from tood_deploy.files import absent_or

STDIN = "-"
STREAM_SCHEMES = ("rtsp", "rtsps", "http", "https", "udp", "rtp", "rtmp", "rtmps", "srt", "tcp")
RECONNECTING = ("rtsp", "rtsps", "http", "https")  # unless the user says otherwise
CAMERA = "/dev/video"
HIDDEN = "***"
SECRET_KEYS = re.compile(r"pass|pwd|secret|token|key|auth|sig|credential", re.IGNORECASE)


def stream_address(spec: str | PathLike[str]) -> str:
    """Return the device file or address of a camera or stream; "" for anything else."""
    text = str(spec)
    if text.isdecimal() and not absent_or(Path(text).exists):
        return f"{CAMERA}{text}"
    return text if text.startswith(CAMERA) or scheme_of(text) in STREAM_SCHEMES else ""


def scheme_of(address: str) -> str:
    """Return what stands before "://", in small letters; "" where nothing does."""
    return address.partition("://")[0].lower() if "://" in address else ""


def local_path(spec: str | PathLike[str]) -> str | PathLike[str]:
    """Return the path that a file:// address names; anything else as it is."""
    if scheme_of(str(spec)) != "file":
        return spec
    path = url2pathname(urlsplit(str(spec)).path)
    return path.lstrip("/") if sys.platform == "win32" else path


def for_ffmpeg(name: str) -> str:
    """Return a name so that FFmpeg takes a path for one: 12:30.mp4 is no protocol called "12"."""
    is_path = "://" not in name and name != STDIN and not name.startswith(CAMERA)
    return f"file:{name}" if is_path else name


def redacted(address: str) -> str:
    """Return an address as it may be printed: passwords, and values of keys that hold some, hidden.

    Anything that is not an address is returned as it is.
    """
    if "://" not in address:
        return address
    parts = urlsplit(address)
    login, at, host = parts.netloc.rpartition("@")
    user, colon, _ = login.partition(":")
    netloc = f"{user}{colon}{HIDDEN if colon else ''}{at}{host}"
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    if not any(SECRET_KEYS.search(key) for key, _ in pairs):
        return parts._replace(netloc=netloc).geturl()
    shown = [(key, HIDDEN if SECRET_KEYS.search(key) else value) for key, value in pairs]
    return parts._replace(netloc=netloc, query=urlencode(shown, safe="*", quote_via=quote)).geturl()


def without_secrets(text: str, address: str) -> str:
    """Return a message of a library with the address, and its password, hidden."""
    text = text.replace(address, redacted(address))
    login = urlsplit(address).netloc.rpartition("@")[0] if "://" in address else ""
    password = login.partition(":")[2]
    for secret in filter(None, (password, unquote(password))):
        text = text.replace(secret, HIDDEN)
    return text
