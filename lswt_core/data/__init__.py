"""Data: texts as cached token ids, and rows of continuous tokens whose cursor can be saved and
restored.
"""

from lswt_core.data.cache_keys import keyed
from lswt_core.data.contiguous import ContiguousRows, Rows
from lswt_core.data.prefetch import Prefetched
from lswt_core.data.streaming import StreamingRows
from lswt_core.data.token_cache import Tokens, cache_directory, tokenise
from lswt_core.data.unigram import check_vocabulary, unigram_perplexity

__all__ = [
    "ContiguousRows",
    "Prefetched",
    "Rows",
    "StreamingRows",
    "Tokens",
    "cache_directory",
    "check_vocabulary",
    "keyed",
    "tokenise",
    "unigram_perplexity",
]
