"""Contextual position encoding: positions that count some tokens and not others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Bias, DenseBias, Dims, KeyValue, PositionalEncoding
from lswt_core.plugin_api.attention import grouped_matmul, softmax_scale


class Cope(PositionalEncoding):
    """CoPE: the distance of a key is the sum of the gates from it to the query, and selects an
    embedding that is multiplied with the query.

    With g_it = sigmoid(q_i k_t / sqrt(D)) and p_ij = g_ij + ... + g_ii, clamped to ``positions`` -
    1, the bias is q_i e(p_ij), interpolated between the embeddings of the whole numbers around p_ij
    (Golovneva et al. 2024, arXiv 2405.18719, eq. 3 to 5 and the appendix's code). Embeddings are
    shared by all heads and start at 0. Sinks have no gate. Holds all scores several times. For
    embeddings of every layer's own, as in the paper, use it in [layers."every 1".positional] and
    "none" in [positional].
    """

    name = "cope"
    has_bias = True
    citation = """@article{golovneva2024contextual,
  title={Contextual Position Encoding: Learning to Count What's Important},
  author={Golovneva, Olga and Wang, Tianlu and Weston, Jason and Sukhbaatar, Sainbayar},
  journal={arXiv preprint arXiv:2405.18719}, year={2024}}"""

    def __init__(self, dims: Dims, *, positions: Annotated[int, Ge(2), Le(1_048_576)] = 64) -> None:
        super().__init__(dims)
        self.embeddings = nn.Parameter(torch.empty(positions, dims.d_head))  # [P, D]
        self.no_weight_decay = ("embeddings",)

    def reset_parameters(self) -> None:
        """Start at 0."""
        nn.init.zeros_(self.embeddings)

    def forward(self, q: Tensor) -> Tensor:
        """Queries [B, H, T, D] times every embedding, [B, H, T, P]; in `forward`, so that hooks can
        offload the parameter.
        """
        return q @ self.embeddings.to(q.dtype).T

    def block_biases(
        self, q: Tensor, keys: Sequence[KeyValue], q_positions: Tensor
    ) -> Sequence[Bias | None]:
        """Biases of all keys, in float32 at least."""
        placed = [(kv.k, kv.positions) for kv in keys if kv.positions is not None]
        dtype = torch.promote_types(q.dtype, torch.float32)
        q = q.transpose(1, 2).to(dtype)  # [B, H, T, D]
        k = torch.cat([k for k, _ in placed], 1).transpose(1, 2).to(dtype)  # [B, G, N, D]
        k_positions = torch.cat([positions for _, positions in placed])  # [N]
        with torch.autocast(q.device.type, enabled=False):  # rounded gates would add up
            gates = (grouped_matmul(q, k.mT) * softmax_scale(q)).sigmoid()  # [B, H, T, N]
            gates = gates.masked_fill(k_positions > q_positions[:, None], 0.0)
            positions = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=len(self.embeddings) - 1)
            bias = interpolate_positions(self(q), positions)
        return [DenseBias(part) for part in bias.split([k.shape[1] for k, _ in placed], -1)]


def interpolate_positions(values: Tensor, positions: Tensor) -> Tensor:
    """Values [..., P] of whole numbers at fractional positions [..., N] up to P - 1, [..., N]."""
    below = positions.detach().floor().to(torch.int64)
    above = positions.detach().ceil().to(torch.int64)
    share = positions - below
    return values.gather(-1, above) * share + values.gather(-1, below) * (1 - share)


@hookimpl
def lswt_components() -> list[type]:
    """Offer CoPE."""
    return [Cope]
