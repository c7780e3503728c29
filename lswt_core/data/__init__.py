"""Data: texts as cached token ids, and rows of continuous tokens whose cursor can be saved and restored."""

from lswt_core.data.keys import keyed
from lswt_core.data.measures import check_vocabulary, unigram_perplexity
from lswt_core.data.prefetch import Prefetched
from lswt_core.data.rows import Lanes, Rows
from lswt_core.data.stream import Stream
from lswt_core.data.tokens import Tokens, cache_directory, tokenise

__all__ = [
    "Lanes",
    "Prefetched",
    "Rows",
    "Stream",
    "Tokens",
    "cache_directory",
    "check_vocabulary",
    "keyed",
    "tokenise",
    "unigram_perplexity",
]
