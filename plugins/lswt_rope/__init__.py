"""Rotary position embedding, forward or reversed, with a raised base frequency."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, PositionalEncoding, Unsupported


class Rope(PositionalEncoding):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), pairing dimension i with i + D/2.

    ``base`` 500,000 follows Xiong et al. 2023 (arXiv 2309.16039). ``reversed`` numbers positions from the newest token
    backwards, as the LSWTransformer does; scores between tokens then turn the other way, which without sinks is only a
    re-labelling of the weights (it is not Su's "ReRoPE"). ``sink_frame`` says how queries meet sinks, which have no position:
    "none" scores them with the un-rotated query, so logits do not depend on how a text is cut into segments; "reference"
    rotates the query as the original code does, by its distance from the segment's end (reversed) or from the oldest
    remembered token (forward), and then they do. ``angles`` "float32" rounds frequencies and angles as the original code does.
    """

    name = "rope"
    stationary = True
    citation = """@article{su2021roformer,
  title={RoFormer: Enhanced Transformer with Rotary Position Embedding},
  author={Su, Jianlin and Lu, Yu and Pan, Shengfeng and Murtadha, Ahmed and Wen, Bo and Liu, Yunfeng},
  journal={arXiv preprint arXiv:2104.09864}, year={2021}}
@article{xiong2023effective,
  title={Effective Long-Context Scaling of Foundation Models},
  author={Xiong, Wenhan and others}, journal={arXiv preprint arXiv:2309.16039}, year={2023}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        base: Annotated[float, Gt(1)] = 500_000.0,
        reversed: bool = True,
        sink_frame: Literal["none", "reference"] = "none",
        angles: Literal["float64", "float32"] = "float64",
    ) -> None:
        super().__init__(dims)
        if dims.d_head % 2:
            raise Unsupported(f"rope turns pairs of dimensions, but the head width d_model / n_heads = {dims.d_head} is odd")
        self.base, self.reversed, self.sink_frame, self.angles = base, reversed, sink_frame, angles

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        """Turn every pair of dimensions by its frequency times the position: x [B, N, H, D], at [N] -> [B, N, H, D]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.table(at, x.shape[-1], dtype)
        first, second = x.to(dtype).chunk(2, dim=-1)  # [B, N, H, D/2]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def encode_sink(self, q: Tensor, k: Tensor, q_at: Tensor, oldest: int) -> tuple[Tensor, Tensor]:
        """Queries meet sinks un-rotated, or in the original code's frame (see the class)."""
        if self.sink_frame == "none":
            return q, k
        return self.rotate(q, q_at - (q_at[-1] if self.reversed else oldest)), k

    def table(self, at: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, D/2] of all angles at positions [N].

        Frequencies and angles are float64 by default: in float32 they are already off by 2e-4 at position 4,096. A broadcast product, not
        einsum or matmul, which autocast would compute in low precision. Nothing is kept in buffers, which loading on the meta
        device would leave uninitialised.
        """
        precise = torch.float64 if self.angles == "float64" else torch.float32
        exponent = torch.arange(0, width, 2, dtype=precise, device=at.device) / width
        position = at.to(precise) * (-1.0 if self.reversed else 1.0)
        angle = position[:, None, None] * (1.0 / self.base**exponent)  # [N, 1, D/2]
        return angle.cos().to(dtype), angle.sin().to(dtype)


@hookimpl
def lswt_components() -> list[type]:
    """Offer rotary embeddings."""
    return [Rope]
