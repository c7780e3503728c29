"""How the Hub is reached, and what to say when it is not."""

from __future__ import annotations

import os


def access(revision: str) -> dict[str, str | None]:
    """What every request is made with: the place for downloads, the key, and the version asked for ("" = the newest)."""
    return {"cache_dir": os.environ.get("HF_CACHE_DIR"), "token": os.environ.get("HF_API_KEY"), "revision": revision or None}


def cause(error: Exception) -> str:
    """An error of a library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
