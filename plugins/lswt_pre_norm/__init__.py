"""The pre-norm block, the default: residual connections around normalised sublayers."""

from __future__ import annotations

from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Block, BlockParts, Dims, LayerContext, LayerOutput, State
from lswt_core.plugin_api.blocks import SublayerRunner


class PreNorm(Block):
    """``x + mixer(norm(x))``, then ``x + ffn(norm(x))`` (Xiong et al. 2020, arXiv 2002.04745)."""

    name = "pre-norm"
    citation = """@inproceedings{xiong2020layer,
  title={On Layer Normalization in the Transformer Architecture},
  author={Xiong, Ruibin and Yang, Yunchang and He, Di and Zheng, Kai and Zheng, Shuxin and
    Xing, Chen and Zhang, Huishuai and Lan, Yanyan and Wang, Liwei and Liu, Tie-Yan},
  booktitle={ICML}, year={2020}}"""

    def __init__(self, dims: Dims, parts: BlockParts) -> None:
        super().__init__(dims, parts)
        # initial values derive from these names, whatever the mixer is
        self.attention_norm, self.attention = parts.norm(dims), parts.mixer(dims)
        self.ffn_norm, self.ffn = parts.norm(dims), parts.ffn(dims)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]."""
        parts = SublayerRunner(state, context)
        x = x + parts.mix(self.attention, self.attention_norm(x))
        x = x + parts.feed_forward(self.ffn, self.ffn_norm(x))
        return parts.output(x)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the pre-norm block."""
    return [PreNorm]
