"""Rotary position embedding with forward or reversed positions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from lswt_core.interfaces import Dims, PositionalEncoding, Unsupported

ANGLE_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}


class Rope(PositionalEncoding):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34), pairing dimension i
    with i + D/2.

    ``base`` 500,000 follows Xiong et al. 2023 (arXiv 2309.16039). ``reversed`` numbers positions
    from the newest token backwards, as the LSWTransformer does: rotations have the opposite sign,
    which without sinks is equivalent up to a change of weights (it is not Su's "ReRoPE").
    ``sink_frame`` is how queries attend to sinks, which have no position: "none" leaves the query
    un-rotated, so logits do not depend on how a text is split into segments; "reference" rotates it
    as the original code does, by its distance from the segment's end (reversed) or from the oldest
    token in memory (forward), and then they do. ``angles`` is the dtype of frequencies and angles:
    float64 is exact at any position; float32 is the original's (off by 1e-4 at position 4,096);
    float16 is the original's under CUDA autocast, where neighbouring positions collapse beyond
    2,048.
    """

    name = "rope"
    cacheable_keys = True
    citation = """@article{su2021roformer,
  title={RoFormer: Enhanced Transformer with Rotary Position Embedding},
  author={Su, Jianlin and Lu, Yu and Pan, Shengfeng and Murtadha, Ahmed and Wen, Bo and
    Liu, Yunfeng},
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
                "rope rotates pairs of dimensions, but the head width d_model / n_heads ="
                f" {dims.d_head} is odd"
            )
        self.base, self.reversed, self.sink_frame = base, reversed, sink_frame
        self.angle_dtype = ANGLE_DTYPES[angles]
        self.sinks_depend_on_segment_end = reversed and sink_frame != "none"

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate every pair of dimensions by its frequency times the position: x [B, N, H, D],
        positions [N] or [B, N] -> [B, N, H, D].
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        return rotate_pairs(x, *self.table(positions, x.shape[-1], dtype))

    def encode_sink(
        self, q: Tensor, k: Tensor, q_positions: Tensor, oldest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sink keys are not rotated, queries as ``sink_frame`` says."""
        if self.sink_frame == "none":
            return q, k
        return self.rotate(q, self.sink_position(q_positions, oldest)), k

    def sink_position(self, q_positions: Tensor, oldest: Tensor) -> Tensor:
        """Positions of queries relative to sinks in the original code, [T] or [B, T]."""
        origin = q_positions[-1] if self.reversed else oldest
        return q_positions - origin

    def table(self, positions: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., 1, D/2] at positions [...]."""
        if self.reversed:
            positions = -positions
        frequency = self.frequency(width, positions.device)
        return cos_sin(positions, frequency, dtype, self.angle_dtype)

    def frequency(self, width: int, device: torch.device) -> Tensor:
        """The frequency of every pair of dimensions, in radians per position, [D/2]."""
        dtype = torch.promote_types(self.angle_dtype, torch.float32)
        return frequencies(width, self.base, device, dtype)


def frequencies(
    width: int, base: float | Tensor, device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``base``^(-2i/D) for every pair i of dimensions, D = ``width``, [D/2]."""
    return 1 / base ** (torch.arange(0, width, 2, dtype=dtype, device=device) / width)


def cos_sin(
    positions: Tensor,
    frequency: Tensor,
    dtype: torch.dtype,
    angle_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., 1, D/2] at positions [...] for frequencies [D/2], from angles in
    ``angle_dtype``.

    A broadcast product, not einsum or matmul, which autocast would compute in low precision. Not
    cached in buffers, which loading on the meta device would leave uninitialised.
    """
    frequency = frequency.to(angle_dtype)
    angle = positions.to(angle_dtype)[..., None, None] * frequency  # [..., 1, D/2]
    return keep_table(angle.cos().to(dtype)), keep_table(angle.sin().to(dtype))


def keep_table(table: Tensor) -> Tensor:
    """The table itself, which compiled code computes once and keeps in memory. Inductor would else
    move the formula, float64 powers and cosines, into the loop over every row and head of whatever
    is rotated; the base of a strided view has to be in memory.
    """
    if not torch.compiler.is_compiling():
        return table
    return table.as_strided(table.shape, table.stride())


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of x [B, N, H, D] by angles with cosines and sines [..., 1, D/2], in their
    dtype.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the formula
        first, second = x.to(cos.dtype).chunk(2, dim=-1)  # [B, N, H, D/2]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(x.dtype)
    out: Tensor = RotatePairs.apply(x, cos, sin)
    return out


class RotatePairs(torch.autograd.Function):
    """A rotation, whose backward pass is the inverse rotation: few passes over memory, and x is not
    saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `rotate_pairs`; cosines and sines get no gradient."""
        ctx.save_for_backward(cos, sin)
        first, second = x.to(cos.dtype).chunk(2, dim=-1)  # [B, N, H, D/2]
        left = (first * cos).sub_(second * sin)
        right = (second * cos).add_(first * sin)
        out = torch.empty_like(x)
        half = left.shape[-1]
        out[..., :half], out[..., half:] = left, right
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Rotate by the opposite angles."""
        cos, sin = ctx.saved_tensors
        return RotatePairs.apply(grad, cos, -sin), None, None
