"""Text from a model: methods that choose the next token, over one step function with the model's
memories as cache.
"""

from lswt_core.decode.engine import CachedSequence, InferenceEngine
from lswt_core.decode.sampling import (
    METHODS,
    Contrastive,
    Greedy,
    Method,
    Sample,
    contrast,
    method_of,
    option_names,
)
from lswt_core.decode.text import complete, generate, texts

__all__ = [
    "METHODS",
    "CachedSequence",
    "Contrastive",
    "Greedy",
    "InferenceEngine",
    "Method",
    "Sample",
    "complete",
    "contrast",
    "generate",
    "method_of",
    "option_names",
    "texts",
]
