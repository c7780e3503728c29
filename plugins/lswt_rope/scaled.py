"""Rotary embeddings for longer contexts than a model was trained on."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from lswt_core.interfaces import Dims, PositionalEncoding, Unsupported
from lswt_rope.rotary import Rope, cos_sin, frequencies, rotate_pairs

YARN = """@article{peng2023yarn,
  title={YaRN: Efficient Context Window Extension of Large Language Models},
  author={Peng, Bowen and Quesnelle, Jeffrey and Fan, Honglu and Shippole, Enrico},
  journal={arXiv preprint arXiv:2309.00071}, year={2023}}"""


class InterpolatedRope(Rope, PositionalEncoding):
    """Position interpolation of a trained ``rope``: positions divided by ``factor`` (Chen et al.
    2023, arXiv 2306.15595).

    The other options must be those the model was trained with. Meant to be fine-tuned on texts
    ``factor`` times as long.
    """

    name = "rope-pi"
    citation = """@article{chen2023extending,
  title={Extending Context Window of Large Language Models via Positional Interpolation},
  author={Chen, Shouyuan and Wong, Sherman and Chen, Liangjian and Tian, Yuandong},
  journal={arXiv preprint arXiv:2306.15595}, year={2023}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        factor: Annotated[float, Ge(1)] = 2.0,
        base: Annotated[float, Gt(1)] = 500_000.0,
        reversed: bool = True,
        sink_frame: Literal["none", "reference"] = "none",
        angles: Literal["float64", "float32", "float16"] = "float64",
    ) -> None:
        super().__init__(dims, base=base, reversed=reversed, sink_frame=sink_frame, angles=angles)
        self.factor = factor

    def frequency(self, width: int, device: torch.device) -> Tensor:
        """Rope's frequencies divided by the factor, [D/2]."""
        return super().frequency(width, device) / self.factor


class NtkRope(Rope, PositionalEncoding):
    """NTK-aware scaling of a trained ``rope``: the base times ``factor``^(D / (D - 2)) (bloc97;
    Peng et al. 2023, arXiv 2309.00071).

    The lowest frequency is interpolated by ``factor``, the highest not at all. The other options
    must be those the model was trained with. Works without fine-tuning up to somewhat less than
    ``factor`` times the trained length.
    """

    name = "rope-ntk"
    citation = YARN

    def __init__(
        self,
        dims: Dims,
        *,
        factor: Annotated[float, Ge(1)] = 2.0,
        base: Annotated[float, Gt(1)] = 500_000.0,
        reversed: bool = True,
        sink_frame: Literal["none", "reference"] = "none",
        angles: Literal["float64", "float32", "float16"] = "float64",
    ) -> None:
        if dims.d_head <= 2:
            raise Unsupported(f"rope-ntk needs heads wider than 2, not {dims.d_head}")
        stretched = base * factor ** (dims.d_head / (dims.d_head - 2))
        super().__init__(
            dims, base=stretched, reversed=reversed, sink_frame=sink_frame, angles=angles
        )


class YarnRope(Rope, PositionalEncoding):
    """YaRN of a ``rope`` trained on texts of ``trained_length`` tokens (Peng et al. 2023, arXiv
    2309.00071).

    Pairs of dimensions that make more than ``beta_fast`` rotations within the trained length are
    kept, those with fewer than ``beta_slow`` are interpolated by ``factor``, and a ramp lies
    between: linear in the index of the pair, from integer to integer, as in the authors' code,
    transformers and their models (in the paper it is linear in the rotations). Scores are
    multiplied by (``temperature_slope`` * ln(factor) + 1)^2, those of sinks as well, since it is
    the softmax's temperature; a slope of 0 does not change them ("NTK-by-parts"). The other options
    must be those the model was trained with.
    """

    name = "rope-yarn"
    citation = YARN

    def __init__(
        self,
        dims: Dims,
        *,
        factor: Annotated[float, Ge(1)] = 2.0,
        trained_length: Annotated[int, Ge(1)] = 4096,
        beta_fast: Annotated[float, Gt(0)] = 32.0,
        beta_slow: Annotated[float, Gt(0)] = 1.0,
        temperature_slope: Annotated[float, Ge(0)] = 0.1,
        base: Annotated[float, Gt(1)] = 500_000.0,
        reversed: bool = True,
        sink_frame: Literal["none", "reference"] = "none",
        angles: Literal["float64", "float32", "float16"] = "float64",
    ) -> None:
        super().__init__(dims, base=base, reversed=reversed, sink_frame=sink_frame, angles=angles)
        if beta_fast <= beta_slow:
            raise Unsupported(
                f"rope-yarn's beta_fast = {beta_fast} must be greater than its beta_slow ="
                f" {beta_slow}"
            )
        self.factor, self.trained_length = factor, trained_length
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.temperature = (temperature_slope * math.log(factor) + 1) ** 2

    def encode(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate both, and apply the temperature."""
        q, k = super().encode(q, k, q_positions, k_positions)
        return q, k * self.temperature

    def encode_sink(
        self, q: Tensor, k: Tensor, q_positions: Tensor, oldest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As in ``rope``, with the temperature."""
        q, k = super().encode_sink(q, k, q_positions, oldest)
        return q, k * self.temperature

    def frequency(self, width: int, device: torch.device) -> Tensor:
        """Rope's frequencies, the low ones divided by the factor, [D/2]."""
        original = super().frequency(width, device)
        first = max(math.floor(self.pair_index(self.beta_fast, width)), 0)
        last = min(math.ceil(self.pair_index(self.beta_slow, width)), width - 1)
        pairs = torch.arange(width // 2, dtype=original.dtype, device=device)
        ramp = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)  # 0: kept, 1: interpolated
        return original * (1 + ramp * (1 / self.factor - 1))

    def pair_index(self, rotations: float, width: int) -> float:
        """The fractional index of the pair with so many rotations within the trained length."""
        ratio = self.trained_length / (2 * math.pi * rotations)
        return width * math.log(ratio) / (2 * math.log(self.base))


class DynamicRope(Rope, PositionalEncoding):
    """Dynamic NTK scaling once more than ``trained_length`` tokens are attended to, as in the
    LSWTransformer's later version.

    With s = max(N / ``trained_length``, 1) for N attended tokens, the base is ``base`` *
    (``ntk_scale`` * s^2)^(D / (D - 2)) ("NTK-aware"; the usual exponent of s is 1) and queries and
    keys are multiplied by ``temperature_slope`` * ln(s) + ``temperature`` (the attention
    temperature of YaRN, Peng et al. 2023, arXiv 2309.00071, without its ramp). The original also
    multiplies the registers' values, a mistake that is not reproduced here.
    """

    name = "rope-dynamic"
    cacheable_keys = False
    length_dependent = True
    citation = YARN

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

    def encode(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate both, scaled for the number of keys."""
        length = q_positions.new_tensor(k.shape[1])
        q = self.rotate_scaled(q, q_positions, length)
        return q, self.rotate_scaled(k, k_positions, length)

    def encode_sink(
        self, q: Tensor, k: Tensor, q_positions: Tensor, oldest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As in ``rope``, with the temperature."""
        length = q_positions[-1] + 1 - oldest.amin()
        positions = torch.zeros_like(q_positions)
        if self.sink_frame != "none":
            positions = self.sink_position(q_positions, oldest)
        q = self.rotate_scaled(q, positions, length)
        return q, self.rotate_scaled(k, q_positions.new_zeros(k.shape[1]), length)

    def rotate_scaled(self, x: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        """Rotate x [B, N, H, D] at positions [N] or [B, N] with the base and the temperature for
        ``length`` [] attended tokens.
        """
        width = x.shape[-1]
        scale = (length.to(torch.float64) / self.trained_length).clamp_min(1.0)
        base = self.base * (self.ntk_scale * scale**2) ** (width / (width - 2))
        temperature = self.temperature_slope * scale.log() + self.temperature
        if self.reversed:
            positions = -positions
        dtype = torch.promote_types(x.dtype, torch.float32)
        table = cos_sin(positions, frequencies(width, base, positions.device), dtype)
        return temperature.to(x.dtype) * rotate_pairs(x, *table)
