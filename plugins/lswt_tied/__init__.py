"""The tied embedding, the default head."""

from __future__ import annotations

from lswt_core.hooks import hookimpl
from lswt_core.plugin_api.lm_head import LMHead


class Tied(LMHead):
    """One table for token embeddings and the LM head (Press and Wolf 2017, arXiv 1608.05859), with
    linear projections between its width ``embedding.d_vocab`` and the model's.
    """

    name = "tied"
    citation = """@inproceedings{press2017using,
  title={Using the Output Embedding to Improve Language Models},
  author={Press, Ofir and Wolf, Lior},
  booktitle={EACL}, year={2017}, note={arXiv 1608.05859}}"""


@hookimpl
def lswt_components() -> list[type]:
    """Offer the tied embedding."""
    return [Tied]
