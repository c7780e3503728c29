"""Rotary position embedding (RoPE) and its variants."""

from __future__ import annotations

from lswt_core.hooks import hookimpl
from lswt_rope.log_n import LogN, ScalableSoftmax
from lswt_rope.partial import HighFrequencyRope, PartialRope
from lswt_rope.rotary import Rope
from lswt_rope.scaled import DynamicRope, InterpolatedRope, NtkRope, YarnRope
from lswt_rope.xpos import XPos


@hookimpl
def lswt_components() -> list[type]:
    """Offer rotary embeddings."""
    return [
        Rope,
        PartialRope,
        HighFrequencyRope,
        XPos,
        InterpolatedRope,
        NtkRope,
        YarnRope,
        DynamicRope,
        LogN,
        ScalableSoftmax,
    ]
