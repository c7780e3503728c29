"""Text from a model: methods that choose the next token, over one step function with the model's memories as cache."""

from lswt_core.decode.methods import METHODS, Contrastive, Greedy, Method, Sample, contrast, method_of, option_names
from lswt_core.decode.reader import Reader
from lswt_core.decode.stream import generate, texts

__all__ = ["METHODS", "Contrastive", "Greedy", "Method", "Reader", "Sample", "contrast", "generate", "method_of", "option_names", "texts"]
