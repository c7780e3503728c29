"""Word embeddings taken from a pretrained model: where a table comes from, and which of its rows go
where.
"""

from __future__ import annotations

from lswt_core.model.embedding_init.rows import CopiedRows, copy_rows
from lswt_core.model.embedding_init.sources import PretrainedEmbedding, load_pretrained

__all__ = ["Moved", "Pretrained", "move_rows", "pretrained"]
