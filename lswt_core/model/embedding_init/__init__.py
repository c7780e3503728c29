"""Initialise the embedding table from a pretrained model: load its table, and copy the rows of
tokens that both vocabularies have.
"""

from __future__ import annotations

from lswt_core.model.embedding_init.rows import CopiedRows, copy_rows
from lswt_core.model.embedding_init.sources import PretrainedEmbedding, load_pretrained

__all__ = ["CopiedRows", "PretrainedEmbedding", "copy_rows", "load_pretrained"]
