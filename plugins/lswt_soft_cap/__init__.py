"""The tied embedding with soft-capped logits."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims
from lswt_core.plugin_api.lm_head import LMHead


class SoftCapped(LMHead):
    """The tied embedding whose logits are ``cap * tanh(logits / cap)`` (Gemma 2, Riviere et al.
    2024, arXiv 2408.00118, section 2; its cap is 30): no logit exceeds the cap, and none drifts.

    Losses, sampled labels and the exported model all see the capped logits. The cross-entropy caps
    in float32 at least, transformers in the dtype of the logits.
    """

    name = "soft-cap"
    citation = """@article{riviere2024gemma2,
  title={Gemma 2: Improving Open Language Models at a Practical Size},
  author={Riviere, Morgane and Pathak, Shreya and Sessa, Pier Giuseppe and Hardin, Cassidy and
    Bhupatiraju, Surya and Hussenot, L{\\'e}onard and others},
  journal={arXiv preprint arXiv:2408.00118}, year={2024}}"""

    def __init__(self, dims: Dims, *, cap: Annotated[float, Gt(0)] = 30.0) -> None:
        super().__init__(dims)
        self.soft_cap = cap


@hookimpl
def lswt_components() -> list[type]:
    """Offer the head with soft-capped logits."""
    return [SoftCapped]
