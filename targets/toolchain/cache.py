"""Where downloaded and generated tool files are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_place(*parts: str) -> Path:
    """Return a folder below ``$XDG_CACHE_HOME/bitwright``, by default ``~/.cache/bitwright``; it may not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "bitwright", *parts)


def cache_folder(*parts: str) -> Path:
    """Return (and create) a folder below ``$XDG_CACHE_HOME/bitwright``, by default ``~/.cache/bitwright``."""
    folder = cache_place(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
