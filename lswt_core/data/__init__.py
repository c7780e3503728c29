"""Data: cached token ids of texts, and batches of contiguous rows with a position that can be saved
and restored.
"""

from lswt_core.data.cache_keys import cache_key
from lswt_core.data.contiguous import ContiguousRows
from lswt_core.data.prefetch import PrefetchedRows
from lswt_core.data.rows import BatchStream, Rows
from lswt_core.data.streaming import StreamingRows
from lswt_core.data.token_cache import cache_directory, tokenise
from lswt_core.data.token_file import Tokens
from lswt_core.data.unigram import check_vocabulary, unigram_perplexity

__all__ = [
    "BatchStream",
    "ContiguousRows",
    "PrefetchedRows",
    "Rows",
    "StreamingRows",
    "Tokens",
    "cache_directory",
    "cache_key",
    "check_vocabulary",
    "tokenise",
    "unigram_perplexity",
]
