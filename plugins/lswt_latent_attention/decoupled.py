"""A positional encoding of the last dimensions of every head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lswt_core.interfaces import Bias, PositionalEncoding


class DecoupledEncoding(PositionalEncoding):
    """Another encoding on the last ``width`` dimensions of queries and keys; the others carry no
    position.
    """

    name = "decoupled"

    def __init__(self, inner: PositionalEncoding, width: int) -> None:
        nn.Module.__init__(self)
        self.inner, self.width = inner, width

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The dimensions without and with position, of x [..., D]."""
        return x[..., : -self.width], x[..., -self.width :]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [B, N, H, D], positions [N] -> [B, N, H, D]."""
        plain, placed = self.split(x)
        return torch.cat((plain, self.inner.rotate(placed, positions)), dim=-1)

    def encode(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, D] at positions [T], keys [B, N, G, D] at [N]."""
        (plain_q, placed_q), (plain_k, placed_k) = self.split(q), self.split(k)
        encoded_q, encoded_k = self.inner.encode(placed_q, placed_k, q_positions, k_positions)
        return torch.cat((plain_q, encoded_q), -1), torch.cat((plain_k, encoded_k), -1)

    def encode_sink(
        self, q: Tensor, k: Tensor, q_positions: Tensor, oldest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, D] and sink keys [B, N, G, D]."""
        (plain_q, placed_q), (plain_k, placed_k) = self.split(q), self.split(k)
        encoded_q, encoded_k = self.inner.encode_sink(placed_q, placed_k, q_positions, oldest)
        return torch.cat((plain_q, encoded_q), -1), torch.cat((plain_k, encoded_k), -1)

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias | None:
        """The inner encoding's bias on the scores."""
        return self.inner.bias(self.split(q)[1], q_positions, k_positions)
