"""Swappable components for pretraining and ablating language models of the LSWTransformer family."""

__version__ = "0.1.0"
