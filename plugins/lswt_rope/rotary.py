"""Rotary position embedding, forward or reversed, with a raised base frequency."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from lswt_core.interfaces import Dims, PositionalEncoding, Unsupported

PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}


class Rope(PositionalEncoding):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), pairing dimension i
    with i + D/2.

    ``base`` 500,000 follows Xiong et al. 2023 (arXiv 2309.16039). ``reversed`` numbers positions
    from the newest token backwards, as the LSWTransformer does; scores between tokens then turn the
    other way, which without sinks is only a re-labelling of the weights (it is not Su's "ReRoPE").
    ``sink_frame`` says how queries meet sinks, which have no position: "none" scores them with the
    un-rotated query, so logits do not depend on how a text is cut into segments; "reference"
    rotates the query as the original code does, by its distance from the segment's end (reversed)
    or from the oldest remembered token (forward), and then they do. ``angles`` is the precision of
    frequencies and angles: float64 is exact at any position, float32 is the original's (off by 1e-4
    at position 4,096), float16 what the original's become under CUDA autocast, where neighbouring
    positions collapse beyond 2,048.
    """

    name = "rope"
    cacheable_keys = True
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
            raise Unsupported(
                "rope turns pairs of dimensions, but the head width d_model / n_heads ="
                f" {dims.d_head} is odd"
            )
        self.base, self.reversed, self.sink_frame, self.precision = (
            base,
            reversed,
            sink_frame,
            PRECISIONS[angles],
        )
        self.by_end = reversed and sink_frame != "none"  # as the original numbers its queries

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn every pair of dimensions by its frequency times the position: x [B, N, H, D],
        positions [N] or [B, N] -> [B, N, H, D].
        """
        return turn(
            x, *self.table(positions, x.shape[-1], torch.promote_types(x.dtype, torch.float32))
        )

    def encode_sink(
        self, q: Tensor, k: Tensor, q_positions: Tensor, oldest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries meet sinks un-rotated, or in the original code's frame (see the class)."""
        return (
            q
            if self.sink_frame == "none"
            else self.rotate(q, self.sink_position(q_positions, oldest))
        ), k

    def sink_position(self, q_positions: Tensor, oldest: Tensor) -> Tensor:
        """How the original code numbers queries [T] or [B, T] against sinks, which stand at 0."""
        return q_positions - (q_positions[-1] if self.reversed else oldest)

    def table(self, positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., 1, D/2] of all angles at positions [...]."""
        return circle(
            -positions if self.reversed else positions,
            self.frequency(width, positions.device),
            dtype,
            self.precision,
        )

    def frequency(self, width: int, device: torch.device) -> Tensor:
        """Radians a token by which every pair of dimensions of a head so wide turns, [D/2]."""
        return frequencies(
            width, self.base, device, torch.promote_types(self.precision, torch.float32)
        )


def frequencies(
    width: int, base: float | Tensor, device: torch.device, precision: torch.dtype = torch.float64
) -> Tensor:
    """``base``^(-2i/D) for every pair i of a head of a width, [D/2]."""
    return 1 / base ** (torch.arange(0, width, 2, dtype=precision, device=device) / width)


def circle(
    positions: Tensor, frequency: Tensor, dtype: torch.dtype, precision: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., 1, D/2] at positions [...] for frequencies [D/2]; angles in a
    precision.

    A broadcast product, not einsum or matmul, which autocast would compute in low precision.
    Nothing is kept in buffers, which loading on the meta device would leave uninitialised.
    """
    angle = positions.to(precision)[..., None, None] * frequency.to(precision)  # [..., 1, D/2]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of x [B, N, H, D] turned by angles [..., 1, D/2], in their precision."""
    if torch.compiler.is_compiling():  # which fuses the formula itself
        first, second = x.to(cos.dtype).chunk(2, dim=-1)  # [B, N, H, D/2]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(
            x.dtype
        )
    turned: Tensor = Turn.apply(x, cos, sin)
    return turned


class Turn(torch.autograd.Function):
    """A rotation, whose derivative is the rotation back: each costs few passes over memory, and
    nothing is kept between them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `turn`; cosines and sines take no gradient."""
        ctx.save_for_backward(cos, sin)
        first, second = x.to(cos.dtype).chunk(2, dim=-1)  # [B, N, H, D/2]
        left = (first * cos).sub_(second * sin)
        right = (second * cos).add_(first * sin)
        found = torch.empty_like(x)
        half = left.shape[-1]
        found[..., :half], found[..., half:] = left, right
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Turn back."""
        cos, sin = ctx.saved_tensors
        return Turn.apply(grad, cos, -sin), None, None
