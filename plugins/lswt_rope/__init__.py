"""Rotary position embedding, forward or reversed, with a raised base frequency; and one that stretches with the text."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, PositionalEncoding, Unsupported

PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}


class Rope(PositionalEncoding):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), pairing dimension i with i + D/2.

    ``base`` 500,000 follows Xiong et al. 2023 (arXiv 2309.16039). ``reversed`` numbers positions from the newest token
    backwards, as the LSWTransformer does; scores between tokens then turn the other way, which without sinks is only a
    re-labelling of the weights (it is not Su's "ReRoPE"). ``sink_frame`` says how queries meet sinks, which have no position:
    "none" scores them with the un-rotated query, so logits do not depend on how a text is cut into segments; "reference"
    rotates the query as the original code does, by its distance from the segment's end (reversed) or from the oldest
    remembered token (forward), and then they do. ``angles`` is the precision of frequencies and angles: float64 is exact at any
    position, float32 is the original's (off by 1e-4 at position 4,096), float16 what the original's become under CUDA autocast,
    where neighbouring positions collapse beyond 2,048.
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
        angles: Literal["float64", "float32", "float16"] = "float64",
    ) -> None:
        super().__init__(dims)
        if dims.d_head % 2:
            raise Unsupported(f"rope turns pairs of dimensions, but the head width d_model / n_heads = {dims.d_head} is odd")
        self.base, self.reversed, self.sink_frame, self.precision = base, reversed, sink_frame, PRECISIONS[angles]

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        """Turn every pair of dimensions by its frequency times the position: x [B, N, H, D], at [N] or [B, N] -> [B, N, H, D]."""
        return turn(x, *self.table(at, x.shape[-1], torch.promote_types(x.dtype, torch.float32)))

    def encode_sink(self, q: Tensor, k: Tensor, q_at: Tensor, oldest: Tensor) -> tuple[Tensor, Tensor]:
        """Queries meet sinks un-rotated, or in the original code's frame (see the class)."""
        return (q if self.sink_frame == "none" else self.rotate(q, self.sink_position(q_at, oldest))), k

    def sink_position(self, q_at: Tensor, oldest: Tensor) -> Tensor:
        """How the original code numbers queries [T] or [B, T] against sinks, which stand at 0."""
        return q_at - (q_at[-1] if self.reversed else oldest)

    def table(self, at: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., 1, D/2] of all angles at positions [...]."""
        return circle(-at if self.reversed else at, width, self.base, dtype, self.precision)


def circle(
    at: Tensor, width: int, base: float | Tensor, dtype: torch.dtype, precision: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., 1, D/2] at positions [...], for heads of a width; frequencies and angles in a precision.

    A broadcast product, not einsum or matmul, which autocast would compute in low precision. Nothing is kept in buffers, which
    loading on the meta device would leave uninitialised.
    """
    wide = torch.promote_types(precision, torch.float32)
    frequency = 1 / base ** (torch.arange(0, width, 2, dtype=wide, device=at.device) / width)  # [D/2]
    angle = at.to(precision)[..., None, None] * frequency.to(precision)  # [..., 1, D/2]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of x [B, N, H, D] turned by angles [..., 1, D/2], in their precision."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)  # [B, N, H, D/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class DynamicRope(Rope, PositionalEncoding):
    """Rotary embedding that stretches once more tokens are attended to than it was trained on, as in the LSWTransformer's later version.

    With s = max(N / ``trained_length``, 1) for N attended tokens, the base is ``base`` * (``ntk_scale`` * s^2)^(D / (D - 2)) ("NTK-aware";
    the usual exponent of s is 1) and queries and keys are multiplied by ``temperature_slope`` * ln(s) + ``temperature`` (the attention
    temperature of YaRN, Peng et al. 2023, arXiv 2309.00071, without its ramp). The original also multiplies the registers' values,
    which is a mistake that is not repeated here.
    """

    name = "rope-dynamic"
    stationary = False
    by_length = True
    citation = """@article{peng2023yarn,
  title={YaRN: Efficient Context Window Extension of Large Language Models},
  author={Peng, Bowen and Quesnelle, Jeffrey and Fan, Honglu and Shippole, Enrico},
  journal={arXiv preprint arXiv:2309.00071}, year={2023}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        trained_length: Annotated[int, Ge(1)] = 4096,
        ntk_scale: Annotated[float, Gt(0)] = 1.0,
        temperature_slope: float = 0.07,
        temperature: float = 1.0,
        base: Annotated[float, Gt(1)] = 500_000.0,
        reversed: bool = True,
        sink_frame: Literal["none", "reference"] = "none",
    ) -> None:
        super().__init__(dims, base=base, reversed=reversed, sink_frame=sink_frame)
        if dims.d_head <= 2:
            raise Unsupported(f"rope-dynamic needs heads wider than 2, not {dims.d_head}")
        self.trained_length, self.ntk_scale = trained_length, ntk_scale
        self.temperature_slope, self.temperature = temperature_slope, temperature

    def encode(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate both as the number of keys asks, and temper them."""
        length = q_at.new_tensor(k.shape[1])
        return self.stretch(q, q_at, length), self.stretch(k, k_at, length)

    def encode_sink(self, q: Tensor, k: Tensor, q_at: Tensor, oldest: Tensor) -> tuple[Tensor, Tensor]:
        """As Rope's; the scores are tempered as those of tokens are."""
        length = q_at[-1] + 1 - oldest.amin()
        at = torch.zeros_like(q_at) if self.sink_frame == "none" else self.sink_position(q_at, oldest)
        return self.stretch(q, at, length), self.stretch(k, q_at.new_zeros(k.shape[1]), length)

    def stretch(self, x: Tensor, at: Tensor, length: Tensor) -> Tensor:
        """Turn x [B, N, H, D] at [N] or [B, N] for ``length`` [] attended tokens, and temper it."""
        width = x.shape[-1]
        scale = (length.to(torch.float64) / self.trained_length).clamp_min(1.0)
        base = self.base * (self.ntk_scale * scale**2) ** (width / (width - 2))
        temperature = self.temperature_slope * scale.log() + self.temperature
        position = -at if self.reversed else at
        return temperature.to(x.dtype) * turn(x, *circle(position, width, base, torch.promote_types(x.dtype, torch.float32)))


@hookimpl
def lswt_components() -> list[type]:
    """Offer rotary embeddings."""
    return [Rope, DynamicRope]
