"""Data sets and tokenizers of the HuggingFace libraries, from the Hub or from disk.

Environment variables: HF_CACHE_DIR is the directory of downloads, HF_API_KEY the token for gated
repositories; neither is ever written to a file.
"""

from __future__ import annotations

from lswt_core.hooks import hookimpl
from lswt_hf.source import HuggingFaceData
from lswt_hf.tokenizer import HuggingFaceTokenizer


@hookimpl
def lswt_components() -> list[type]:
    """Offer the data source and the tokenizer."""
    return [HuggingFaceData, HuggingFaceTokenizer]
