"""Rotary embeddings of some of the head's dimensions or frequencies."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor
from torch.nn.functional import pad

from lswt_core.interfaces import Dims, PositionalEncoding, Unsupported
from lswt_rope.rotary import Rope


class PartialRope(Rope, PositionalEncoding):
    """Rotary embedding of the first ``fraction`` of every head's dimensions, as in GPT-NeoX (Black
    et al. 2022, arXiv 2204.06745).

    ``fraction`` is ``rotary_pct`` there and ``partial_rotary_factor`` in transformers. Frequencies
    are those of a head as wide as the rotated part, so the lowest is about rope's; ``p-rope`` drops
    the low ones instead.
    """

    name = "rope-partial"
    citation = """@inproceedings{black2022gpt,
  title={GPT-NeoX-20B: An Open-Source Autoregressive Language Model},
  author={Black, Sid and Biderman, Stella and Hallahan, Eric and Anthony, Quentin and others},
  booktitle={BigScience Workshop on Challenges and Perspectives in Creating Large Language Models},
  year={2022}, note={arXiv 2204.06745}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        fraction: Annotated[float, Gt(0), Le(1)] = 0.25,
        base: Annotated[float, Gt(1)] = 500_000.0,
    ) -> None:
        super().__init__(dims, base=base, reversed=False)
        self.width = int(dims.d_head * fraction)
        if self.width % 2 or not self.width:
            raise Unsupported(
                f"rope-partial rotates pairs of dimensions, but {fraction} of the head width"
                f" {dims.d_head} is {self.width}; choose a fraction that gives an even number, for"
                f" example {max(self.width // 2, 1) * 2} / {dims.d_head}"
            )

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate the first dimensions: x [B, N, H, D], positions [N] -> [B, N, H, D]."""
        rotated = super().rotate(x[..., : self.width], positions)
        return torch.cat((rotated, x[..., self.width :]), dim=-1)


class HighFrequencyRope(Rope, PositionalEncoding):
    """p-RoPE: rotary embedding without its lowest frequencies (Barbero et al. 2024, arXiv
    2410.06205).

    The ``fraction`` (the paper's p) of pairs with the highest frequencies is rotated as by rope;
    the others carry no position.
    """

    name = "p-rope"
    citation = """@article{barbero2024round,
  title={Round and Round We Go! What makes Rotary Positional Encodings useful?},
  author={Barbero, Federico and Vitvitskyi, Alex and Perivolaropoulos, Christos and
    Pascanu, Razvan and Veli{\\v{c}}kovi{\\'c}, Petar},
  journal={arXiv preprint arXiv:2410.06205}, year={2024}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        fraction: Annotated[float, Gt(0), Le(1)] = 0.75,
        base: Annotated[float, Gt(1)] = 500_000.0,
    ) -> None:
        super().__init__(dims, base=base, reversed=False)
        self.pairs = int(fraction * dims.d_head // 2)
        if not self.pairs:
            raise Unsupported(
                f"p-rope with fraction = {fraction} rotates no pair of the head width"
                f" {dims.d_head}; use 'none' for that"
            )

    def frequency(self, width: int, device: torch.device) -> Tensor:
        """Rope's highest frequencies, then zeros, [D/2]."""
        highest = super().frequency(width, device)[: self.pairs]
        return pad(highest, (0, width // 2 - self.pairs))
