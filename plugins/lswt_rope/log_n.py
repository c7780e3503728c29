"""RoPE with scores that grow with the logarithm of the number of tokens that a query sees."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from lswt_core.interfaces import Dims, PositionalEncoding
from lswt_rope.rotary import Rope


class LogN(Rope, PositionalEncoding):
    """RoPE, with queries times log n / log ``trained_length`` for a query that sees n tokens, which
    keeps the entropy of attention from growing with n.

    Su 2021 ("On the scale operation of attention from the invariance of entropy", kexue.fm/archives
    /8823) derives the factor, Chiang and Cholak 2022 (arXiv 2202.12172, section 5) find the same;
    ``least`` 1 is Qwen's use without training (Bai et al. 2023, arXiv 2309.16609, section 2.4):
    nothing changes up to ``trained_length``. n counts the tokens of the query's document within
    the memory and the window, the query included, and no sinks; in the originals no token is ever
    out of sight, and n is the position.
    """

    name = "log-n"
    citation = """@misc{su2021entropy,
  title={From the invariance of entropy to the scale operation of attention},
  author={Su, Jianlin}, year={2021}, howpublished={\\url{https://kexue.fm/archives/8823}}}
@inproceedings{chiang2022overcoming,
  title={Overcoming a Theoretical Limitation of Self-Attention},
  author={Chiang, David and Cholak, Peter}, booktitle={ACL}, year={2022}}
@article{bai2023qwen,
  title={Qwen Technical Report}, author={Bai, Jinze and others},
  journal={arXiv preprint arXiv:2309.16609}, year={2023}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        trained_length: Annotated[int, Ge(2)] = 512,
        least: Annotated[float, Ge(0)] = 0.0,
        base: Annotated[float, Gt(1)] = 500_000.0,
        reversed: bool = True,
        sink_frame: Literal["none", "reference"] = "none",
    ) -> None:
        super().__init__(dims, base=base, reversed=reversed, sink_frame=sink_frame)
        self.trained_length, self.least = trained_length, least

    def scale_queries(self, q: Tensor, q_positions: Tensor, oldest: Tensor) -> Tensor:
        """Queries [B, T, H, D] times max(``least``, log n / log ``trained_length``)."""
        scale = log_of_seen(q, q_positions, oldest) / math.log(self.trained_length)
        return q * scale.clamp_min(self.least).to(q.dtype)


class ScalableSoftmax(Rope, PositionalEncoding):
    """RoPE, with queries times s log n for a query that sees n tokens, s learned for every head
    (SSMax, Nakanishi 2025, arXiv 2501.19399, eq. 3).

    n is counted as in log-n. s starts at ``initial``; the default is 1 over the mean of log n for n
    up to 1,024. For an s of every layer's own, as in the paper, use it in
    [layers."every 1".positional] and "none" in [positional]. Without weight decay.
    """

    name = "scalable-softmax"
    citation = """@article{nakanishi2025scalable,
  title={Scalable-Softmax Is Superior for Attention}, author={Nakanishi, Ken M.},
  journal={arXiv preprint arXiv:2501.19399}, year={2025}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        initial: Annotated[float, Gt(0)] = 0.168,
        base: Annotated[float, Gt(1)] = 500_000.0,
        reversed: bool = True,
        sink_frame: Literal["none", "reference"] = "none",
    ) -> None:
        super().__init__(dims, base=base, reversed=reversed, sink_frame=sink_frame)
        self.initial = initial
        self.scale = nn.Parameter(torch.empty(dims.n_heads))  # [H]
        self.no_weight_decay = ("scale",)

    def reset_parameters(self) -> None:
        """Start at ``initial``."""
        nn.init.constant_(self.scale, self.initial)

    def forward(self, log_n: Tensor) -> Tensor:
        """Return s log n of every head, [..., H, 1], from log n [..., 1, 1]; in `forward`, so that
        hooks can offload the parameter.
        """
        return self.scale[:, None] * log_n

    def scale_queries(self, q: Tensor, q_positions: Tensor, oldest: Tensor) -> Tensor:
        """Queries [B, T, H, D] times s log n."""
        return q * self(log_of_seen(q, q_positions, oldest)).to(q.dtype)


def log_of_seen(q: Tensor, q_positions: Tensor, oldest: Tensor) -> Tensor:
    """The logarithm of how many tokens each of the queries [B, T, H, D] sees, [T, 1, 1] or
    [B or 1, T, 1, 1], in float32 at least.
    """
    n_visible = (q_positions - oldest + 1).clamp_min(1)
    return n_visible.to(torch.promote_types(q.dtype, torch.float32)).log()[..., None, None]
