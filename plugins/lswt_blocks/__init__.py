"""How a layer is wired: alternatives to the pre-norm block."""

from __future__ import annotations

from lswt_blocks.hyper_connections import HyperConnections
from lswt_blocks.post_norm import PostNorm
from lswt_blocks.residual import LayerScale, Parallel, Sandwich
from lswt_core.hooks import hookimpl


@hookimpl
def lswt_components() -> list[type]:
    """Offer the blocks."""
    return [Sandwich, Parallel, LayerScale, PostNorm, HyperConnections]
