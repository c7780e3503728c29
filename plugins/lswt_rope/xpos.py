"""Rotary embedding whose scores fade with distance."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from lswt_core.interfaces import Dims, PositionalEncoding
from lswt_rope.rotary import Rope, turn


class XPos(Rope, PositionalEncoding):
    """xPos: rotary embedding whose scores fade with distance, the fast pairs' most (Sun et al.
    2022, arXiv 2212.10554).

    The share of pair i is multiplied by zeta_i^(distance / ``scale_base``), zeta_i = (2i + 0.4 D) /
    1.4 D, of which a query carries the power of its position and a key that of its own, negated.
    Positions are counted from the middle of the segment, which cancels: the keys of a memory,
    however long, only shrink, and those of the segment grow by half of its length at most. A
    segment so long that even this would leave the range of the precision is refused. The paper's
    results on longer texts use blockwise causal attention too.
    """

    name = "xpos"
    cacheable_keys = False
    citation = """@article{sun2022length,
  title={A Length-Extrapolatable Transformer},
  author={Sun, Yutao and Dong, Li and Patra, Barun and Ma, Shuming and Huang, Shaohan and Benhaim, Alon and Chaudhary, Vishrav and
    Song, Xia and Wei, Furu},
  journal={arXiv preprint arXiv:2212.10554}, year={2022}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        scale_base: Annotated[float, Gt(0)] = 512.0,
        base: Annotated[float, Gt(1)] = 500_000.0,
    ) -> None:
        super().__init__(dims, base=base, reversed=False)
        self.scale_base = scale_base

    def encode(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate both; scale queries [B, T, H, D] by their distance from the segment's middle and
        keys [B, N, H, D] the other way.
        """
        longest = self.longest(q.dtype)
        if q.shape[1] > longest:
            raise ValueError(
                f"xpos cannot encode {q.shape[1]} tokens at once in {q.dtype}, {longest} at most:"
                " its scales would overflow; read the text in shorter segments, with a memory that"
                " reaches back as far, or raise scale_base"
            )
        middle = (q_positions[0] + q_positions[-1]).to(torch.float64) / 2
        return self.fade(q, q_positions, q_positions - middle), self.fade(
            k, k_positions, middle - k_positions
        )

    def longest(self, dtype: torch.dtype) -> int:
        """The longest segment whose scales, largest at its ends, stay below the root of the largest
        number of a precision.
        """
        return int(self.scale_base * math.log(torch.finfo(dtype).max) / math.log(1.4 / 0.4))

    def fade(self, x: Tensor, positions: Tensor, power: Tensor) -> Tensor:
        """Turn x [B, N, H, D] by its positions [N] and scale every pair by its zeta to the power
        [N] / ``scale_base``.
        """
        width, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        # [D/2]
        zeta = (torch.arange(0, width, 2, dtype=torch.float64, device=x.device) + 0.4 * width) / (
            1.4 * width
        )
        scale = (zeta ** (power[:, None, None] / self.scale_base)).to(wide)  # [N, 1, D/2]
        cos, sin = self.table(positions, width, wide)
        return turn(x, cos * scale, sin * scale)
