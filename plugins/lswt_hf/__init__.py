"""Data sets and tokenizers of the HuggingFace libraries, from the Hub or from disk.

HF_CACHE_DIR says where downloads are kept and HF_API_KEY opens gated repositories; neither is ever
written anywhere.
"""

from __future__ import annotations

from lswt_core.hooks import hookimpl
from lswt_hf.source import HuggingFaceData
from lswt_hf.tokenizer import HuggingFaceTokenizer


@hookimpl
def lswt_components() -> list[type]:
    """Offer the data source and the tokenizer."""
    return [HuggingFaceData, HuggingFaceTokenizer]
