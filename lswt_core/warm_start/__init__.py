"""Word embeddings taken from a pretrained model: where a table comes from, and which of its rows go where."""

from __future__ import annotations

from lswt_core.warm_start.rows import Moved, move_rows
from lswt_core.warm_start.sources import Pretrained, pretrained

__all__ = ["Moved", "Pretrained", "move_rows", "pretrained"]
