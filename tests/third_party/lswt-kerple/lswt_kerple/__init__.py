"""KERPLE, kernelised relative positional embedding, with the logarithmic kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Bias, DenseBias, Dims, PositionalEncoding

MINIMUM = 1e-2  # of r1 and r2, as in the authors' code


class Kerple(PositionalEncoding):
    """The bias -r1 log(1 + r2 distance) with r1 and r2 learned per head (Chi et al. 2022, arXiv
    2205.09921).
    """

    name = "kerple"
    cacheable_keys = True
    has_bias = True
    citation = """@inproceedings{chi2022kerple,
  title={KERPLE: Kernelized Relative Positional Embedding for Length Extrapolation},
  author={Chi, Ta-Chung and Fan, Ting-Han and Ramadge, Peter J. and Rudnicky, Alexander I.},
  booktitle={NeurIPS}, year={2022}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.r1, self.r2 = (nn.Parameter(torch.empty(dims.n_heads)) for _ in range(2))  # [H]

    def reset_parameters(self) -> None:
        """Draw r1 from [0, 2) and r2 from [0, 1)."""
        nn.init.uniform_(self.r1, 0, 2)
        nn.init.uniform_(self.r2, 0, 1)

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias:
        """The bias of every head, query and key, [H, T, N]; the causal mask hides later keys."""
        r1, r2 = (r.clamp_min(MINIMUM)[:, None, None] for r in (self.r1, self.r2))
        distance = (q_positions[:, None] - k_positions[None, :]).clamp_min(0)
        return DenseBias(-r1 * torch.log1p(r2 * distance))


@hookimpl
def lswt_components() -> list[type]:
    """Offer KERPLE."""
    return [Kerple]
