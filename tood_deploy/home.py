"""Where this package keeps what it can get or make again: downloads, caches, passed self-tests."""

import os
from pathlib import Path


def home_folder(name: str) -> Path:
    """`$TOOD_HOME/<name>`, else `tood_deploy/<name>` in `$XDG_CACHE_HOME` or `~/.cache`. May not exist yet."""
    if home := os.environ.get("TOOD_HOME"):
        return Path(home).expanduser() / name
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "tood_deploy" / name
