"""Multi-head latent attention (MLA): keys and values from one narrow vector a token."""

from __future__ import annotations

from lswt_core.hooks import hookimpl
from lswt_latent_attention.mixer import LatentAttention


@hookimpl
def lswt_components() -> list[type]:
    """Offer latent attention."""
    return [LatentAttention]
