"""Text generation: decoding methods over one step function, with the model's memories as KV
cache.
"""

from lswt_core.decode.engine import CachedSequence, InferenceEngine
from lswt_core.decode.sampling import (
    METHODS,
    Contrastive,
    DecodingMethod,
    Greedy,
    Sample,
    build_method,
    contrastive_score,
    option_names,
)
from lswt_core.decode.text import generate, generate_batch, stream_text

__all__ = [
    "METHODS",
    "CachedSequence",
    "Contrastive",
    "DecodingMethod",
    "Greedy",
    "InferenceEngine",
    "Sample",
    "build_method",
    "contrastive_score",
    "generate",
    "generate_batch",
    "option_names",
    "stream_text",
]
