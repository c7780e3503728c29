"""The HuggingFace Hub: how it is reached, and what to say when it is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lswt_core.errors import DataError

FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # never pickled weights, never code


def access() -> dict[str, Any]:
    """The place for downloads and the key; where these variables are not set, HuggingFace's own hold."""
    return {"cache_dir": os.environ.get("HF_CACHE_DIR"), "token": os.environ.get("HF_API_KEY")}


def snapshot(name: str, revision: str = "") -> Path:
    """A model's files, downloaded or found in the cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=FILES, **access()))
    except Exception as error:  # the library's own and its network client's have no common base
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise DataError(
            f"{name!r} is neither a directory here nor a model that can be had from the Hub: {cause}\n"
            "  fix: check the name; without a network download it elsewhere and give the directory"
        ) from error
