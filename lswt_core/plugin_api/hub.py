"""Options and errors of requests to the HuggingFace Hub."""

from __future__ import annotations

import os
from typing import Any


def hub_options(revision: str | None = None) -> dict[str, Any]:
    """Keyword arguments of every request: cache directory (HF_CACHE_DIR), token (HF_API_KEY) and
    revision (None: the newest). Where these variables are not set, HuggingFace's own are used
    (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, ...).
    """
    return {
        "cache_dir": os.environ.get("HF_CACHE_DIR"),
        "token": os.environ.get("HF_API_KEY"),
        "revision": revision or None,
    }


def summarise_error(error: Exception) -> str:
    """A library's error in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
