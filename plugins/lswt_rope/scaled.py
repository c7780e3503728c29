"""Rotary embeddings that reach further than a model was trained to: by a fixed factor, or as far as
a text asks.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from lswt_core.interfaces import Dims, PositionalEncoding, Unsupported
from lswt_rope.rotary import Rope, circle, frequencies, turn

YARN = """@article{peng2023yarn,
  title={YaRN: Efficient Context Window Extension of Large Language Models},
  author={Peng, Bowen and Quesnelle, Jeffrey and Fan, Honglu and Shippole, Enrico},
  journal={arXiv preprint arXiv:2309.00071}, year={2023}}"""


class InterpolatedRope(Rope, PositionalEncoding):
    """Position interpolation of a trained ``rope``: positions divided by ``factor`` (Chen et al.
    2023, arXiv 2306.15595).

    Its other options must be those the model was trained with. Meant for a short training on texts
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
        """Rope's, divided by the factor, [D/2]."""
        return super().frequency(width, device) / self.factor


class NtkRope(Rope, PositionalEncoding):
    """NTK-aware scaling of a trained ``rope``: the base times ``factor``^(D / (D - 2)) (bloc97;
    Peng et al. 2023, arXiv 2309.00071).

    So the slowest pair of dimensions is interpolated by ``factor`` and the fastest not at all. Its
    other options must be those the model was trained with. It serves without further training, up
    to somewhat less than ``factor`` times the trained length.
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

    Pairs of dimensions that turn more than ``beta_fast`` times within the trained length stay,
    those that turn less than ``beta_slow`` times are interpolated by ``factor``, and between the
    two lies a ramp: linear in the pair's number and from whole pair to whole pair, as in the
    authors' code, transformers and the models made with them (the paper writes it linear in the
    turns). Scores are multiplied by (``temperature_slope`` * ln(factor) + 1)^2, those of sinks as
    well, since it is the softmax that is tempered; a slope of 0 leaves them ("NTK-by-parts"). The
    other options must be those the model was trained with.
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
        self.factor, self.trained_length, self.beta_fast, self.beta_slow = (
            factor,
            trained_length,
            beta_fast,
            beta_slow,
        )
        self.temperature = (temperature_slope * math.log(factor) + 1) ** 2

    def encode(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotate both, and temper the scores."""
        q, k = super().encode(q, k, q_positions, k_positions)
        return q, k * self.temperature

    def encode_sink(
        self, q: Tensor, k: Tensor, q_positions: Tensor, oldest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As Rope's; the scores are tempered as those of tokens are."""
        q, k = super().encode_sink(q, k, q_positions, oldest)
        return q, k * self.temperature

    def frequency(self, width: int, device: torch.device) -> Tensor:
        """Rope's, divided by the factor where a pair turns too seldom to have been seen all round,
        [D/2].
        """
        whole = super().frequency(width, device)
        first = max(math.floor(self.pair(self.beta_fast, width)), 0)
        last = min(math.ceil(self.pair(self.beta_slow, width)), width - 1)
        pairs = torch.arange(width // 2, dtype=whole.dtype, device=device)
        ramp = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)  # 0: stays, 1: interpolated
        return whole * (1 + ramp * (1 / self.factor - 1))

    def pair(self, turns: float, width: int) -> float:
        """The number, not whole, of the pair of dimensions that turns so often within the trained
        length.
        """
        return (
            width
            * math.log(self.trained_length / (2 * math.pi * turns))
            / (2 * math.log(self.base))
        )


class DynamicRope(Rope, PositionalEncoding):
    """Rotary embedding that stretches once more tokens are attended to than it was trained on, as
    in the LSWTransformer's later version.

    With s = max(N / ``trained_length``, 1) for N attended tokens, the base is ``base`` *
    (``ntk_scale`` * s^2)^(D / (D - 2)) ("NTK-aware"; the usual exponent of s is 1) and queries and
    keys are multiplied by ``temperature_slope`` * ln(s) + ``temperature`` (the attention
    temperature of YaRN, Peng et al. 2023, arXiv 2309.00071, without its ramp). The original also
    multiplies the registers' values, which is a mistake that is not repeated here.
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
        """Rotate both as the number of keys asks, and temper them."""
        length = q_positions.new_tensor(k.shape[1])
        return self.stretch(q, q_positions, length), self.stretch(k, k_positions, length)

    def encode_sink(
        self, q: Tensor, k: Tensor, q_positions: Tensor, oldest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As Rope's; the scores are tempered as those of tokens are."""
        length = q_positions[-1] + 1 - oldest.amin()
        positions = (
            torch.zeros_like(q_positions)
            if self.sink_frame == "none"
            else self.sink_position(q_positions, oldest)
        )
        return self.stretch(q, positions, length), self.stretch(
            k, q_positions.new_zeros(k.shape[1]), length
        )

    def stretch(self, x: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        """Turn x [B, N, H, D] positions [N] or [B, N] for ``length`` [] attended tokens, and temper
        it.
        """
        width = x.shape[-1]
        scale = (length.to(torch.float64) / self.trained_length).clamp_min(1.0)
        base = self.base * (self.ntk_scale * scale**2) ** (width / (width - 2))
        temperature = self.temperature_slope * scale.log() + self.temperature
        position, wide = (
            -positions if self.reversed else positions,
            torch.promote_types(x.dtype, torch.float32),
        )
        return temperature.to(x.dtype) * turn(
            x, *circle(position, frequencies(width, base, positions.device), wide)
        )
