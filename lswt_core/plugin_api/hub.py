"""How the HuggingFace Hub is asked, and its errors in one line."""

from __future__ import annotations

import os
from typing import Any


def access(revision: str | None = None) -> dict[str, Any]:
    """What every request is made with: the place for downloads (HF_CACHE_DIR), the key (HF_API_KEY)
    and the version asked for (none: the newest). Where these variables are not set, HuggingFace's
    own hold (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, ...).
    """
    return {
        "cache_dir": os.environ.get("HF_CACHE_DIR"),
        "token": os.environ.get("HF_API_KEY"),
        "revision": revision or None,
    }


def cause(error: Exception) -> str:
    """An error of a library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
