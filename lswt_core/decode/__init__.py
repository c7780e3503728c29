"""Text from a model: methods that choose the next token, over one step function with the model's memories as cache."""

from lswt_core.decode.methods import METHODS, Contrastive, Greedy, Method, Sample, contrast, method_of, option_names
from lswt_core.decode.reader import Reader, Reading
from lswt_core.decode.stream import complete, generate, texts

__all__ = [
    "METHODS",
    "Contrastive",
    "Greedy",
    "Method",
    "Reader",
    "Reading",
    "Sample",
    "complete",
    "contrast",
    "generate",
    "method_of",
    "option_names",
    "texts",
]
