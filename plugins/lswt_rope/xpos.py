"""xPos, a rotary embedding whose scores decay with distance."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from lswt_core.interfaces import Dims, PositionalEncoding
from lswt_rope.rotary import Rope, keep_table, rotate_pairs


class XPos(Rope, PositionalEncoding):
    """xPos: rotary embedding whose scores decay with distance, those of high frequencies fastest
    (Sun et al. 2022, arXiv 2212.10554).

    The term of pair i is multiplied by zeta_i^(distance / ``scale_base``), zeta_i = (2i + 0.4 D) /
    1.4 D: queries are scaled by the power of their position, keys by that of theirs, negated.
    Positions are relative to the middle of the segment, which cancels: keys in memory only shrink,
    and those of the segment grow by the power of half its length at most. A segment that would
    overflow the dtype is refused. The paper's extrapolation results also use blockwise causal
    attention.
    """

    name = "xpos"
    cacheable_keys = False
    citation = """@article{sun2022length,
  title={A Length-Extrapolatable Transformer},
  author={Sun, Yutao and Dong, Li and Patra, Barun and Ma, Shuming and Huang, Shaohan and
    Benhaim, Alon and Chaudhary, Vishrav and Song, Xia and Wei, Furu},
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
        """Rotate both; scale queries [B, T, H, D] by zeta to the power of their distance from the
        segment's middle, keys [B, N, H, D] by the inverse.
        """
        limit = self.max_segment(q.dtype)
        if q.shape[1] > limit:
            raise ValueError(
                f"xpos cannot encode a segment of {q.shape[1]} tokens in {q.dtype}, at most"
                f" {limit}: its scales would overflow; use shorter segments with a longer memory,"
                " or raise scale_base"
            )
        middle = (q_positions[0] + q_positions[-1]).to(torch.float64) / 2
        q = self.rotate_and_scale(q, q_positions, q_positions - middle)
        return q, self.rotate_and_scale(k, k_positions, middle - k_positions)

    def max_segment(self, dtype: torch.dtype) -> int:
        """The longest segment whose scales, largest at its ends, stay below the square root of the
        largest number of a dtype.
        """
        return int(self.scale_base * math.log(torch.finfo(dtype).max) / math.log(1.4 / 0.4))

    def rotate_and_scale(self, x: Tensor, positions: Tensor, power: Tensor) -> Tensor:
        """Rotate x [B, N, H, D] at positions [N], and scale every pair by its zeta to the power [N]
        / ``scale_base``.
        """
        width, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        dimensions = torch.arange(0, width, 2, dtype=torch.float64, device=x.device)
        zeta = (dimensions + 0.4 * width) / (1.4 * width)  # [D/2]
        scale = (zeta ** (power[:, None, None] / self.scale_base)).to(dtype)  # [N, 1, D/2]
        cos, sin = self.table(positions, width, dtype)
        return rotate_pairs(x, keep_table(cos * scale), keep_table(sin * scale))
