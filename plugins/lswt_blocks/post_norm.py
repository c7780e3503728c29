"""The post-norm block with DeepNorm's scaling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from lswt_core.interfaces import (
    Block,
    BlockParts,
    Dims,
    LayerContext,
    LayerOutput,
    State,
    Unsupported,
)
from lswt_core.plugin_api.blocks import SublayerRunner

SCALED_PROJECTIONS = ("value", "output")  # of a mixer, by the names of its linear layers


class PostNorm(Block):
    """``norm(alpha * x + mixer(x))``, then ``norm(alpha * x + ffn(x))``, with DeepNorm's residual
    factor alpha and initial gain beta (Wang et al. 2022, arXiv 2203.00555, figure 2).

    For N decoder layers alpha = (2 N)^(1/4) and beta = (8 N)^(-1/4): initial weights of the
    feed-forward layer and of the mixer's value and output projections are multiplied by beta.
    ``alpha`` = 1 and ``beta`` = 1 are the original Transformer (Vaswani et al. 2017). Weights that
    beta multiplies are those of the recipe's ``init_std``, where the paper has Xavier's. The
    decoder norms the last hidden state once more.
    """

    name = "post-norm"
    citation = """@article{wang2022deepnet,
  title={DeepNet: Scaling Transformers to 1,000 Layers},
  author={Wang, Hongyu and Ma, Shuming and Dong, Li and Huang, Shaohan and Zhang, Dongdong and
    Wei, Furu},
  journal={arXiv preprint arXiv:2203.00555}, year={2022}}"""

    def __init__(
        self,
        dims: Dims,
        parts: BlockParts,
        *,
        alpha: Annotated[float, Gt(0)] | None = None,
        beta: Annotated[float, Gt(0)] | None = None,
    ) -> None:
        super().__init__(dims, parts)
        self.attention_norm, self.attention = parts.norm(dims), parts.mixer(dims)
        self.ffn_norm, self.ffn = parts.norm(dims), parts.ffn(dims)
        self.alpha = (2 * dims.n_layers) ** 0.25 if alpha is None else alpha
        self.beta = (8 * dims.n_layers) ** -0.25 if beta is None else beta
        if self.beta != 1 and not any(True for _ in self.scaled_projections()):
            raise Unsupported(
                f"post-norm scales the initial weights of the mixer's linear layers"
                f" {' and '.join(SCALED_PROJECTIONS)}, and {self.attention.name!r} has none of"
                " these names; set block.beta = 1"
            )

    def scaled_projections(self) -> Iterator[Tensor]:
        """The weights of the mixer's value and output projections."""
        for name, module in self.attention.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in SCALED_PROJECTIONS:
                yield module.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Multiply by beta what the parts have just been initialised with."""
        matrices = [parameter for parameter in self.ffn.parameters() if parameter.ndim > 1]
        for weight in (*matrices, *self.scaled_projections()):
            weight.mul_(self.beta)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]."""
        parts = SublayerRunner(state, context)
        x = self.attention_norm(self.alpha * x + parts.mix(self.attention, x))
        x = self.ffn_norm(self.alpha * x + parts.feed_forward(self.ffn, x))
        return parts.output(x)
