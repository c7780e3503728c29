"""Hyper-connections: several residual streams, mixed by learned weights."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from lswt_core.interfaces import Block, BlockParts, Dims, LayerContext, LayerOutput, Norm, State
from lswt_core.plugin_api.blocks import SublayerRunner

DYNAMIC_SCALE = 0.01  # initial value of the factor of the dynamic weights


class Connection(nn.Module):
    """The weights around one sublayer: alpha [n, 1 + n] mixes n streams into the sublayer's input
    and n streams, beta [n] adds its output to each of them (eq. 1 to 5 and 10 to 13).
    """

    no_weight_decay = ("static_alpha",)

    def __init__(self, streams: int, index: int, width: int, norm: Norm | None) -> None:
        """``index`` counts the sublayers of the model; ``norm`` is that of the dynamic weights,
        None: there are none.
        """
        super().__init__()
        self.streams, self.index = streams, index
        self.static_alpha = nn.Parameter(torch.empty(streams, 1 + streams))
        self.static_beta = nn.Parameter(torch.empty(streams))
        self.norm = norm
        if norm is not None:
            self.dynamic_alpha = nn.Parameter(torch.empty(width, 1 + streams))
            self.dynamic_beta = nn.Parameter(torch.empty(width))
            self.dynamic_alpha_scale = nn.Parameter(torch.empty(1))
            self.dynamic_beta_scale = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Pre-norm: the sublayer reads stream ``index`` mod n, all streams get its output (eq. 14);
        dynamic weights are zero.
        """
        self.static_alpha.zero_()
        self.static_alpha[self.index % self.streams, 0] = 1
        self.static_alpha[:, 1:].fill_diagonal_(1)
        self.static_beta.fill_(1)
        if self.norm is not None:
            self.dynamic_alpha.zero_()
            self.dynamic_beta.zero_()
            self.dynamic_alpha_scale.fill_(DYNAMIC_SCALE)
            self.dynamic_beta_scale.fill_(DYNAMIC_SCALE)

    def weights(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha [..., n, 1 + n] and beta [..., n] for streams [B, T, n, M]."""
        alpha, beta = self.static_alpha, self.static_beta
        if self.norm is not None:
            normed = self.norm(stream)
            dynamic = (normed @ self.dynamic_alpha).tanh()  # [B, T, n, 1 + n]
            alpha = alpha + self.dynamic_alpha_scale * dynamic
            beta = beta + self.dynamic_beta_scale * (normed @ self.dynamic_beta).tanh()
        return alpha, beta

    def mix(self, stream: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The sublayer's input [B, T, M] and the streams [B, T, n, M] to add its output to. Sums of
        products rather than a matrix product, which autocast would round.
        """
        mixed = [(alpha[..., i, None] * stream).sum(-2) for i in range(1 + self.streams)]
        return mixed[0], torch.stack(mixed[1:], dim=-2)


class HyperConnections(Block):
    """``n`` residual streams instead of one (Zhu et al. 2024, arXiv 2409.19606): every sublayer
    reads a learned mixture of them, and its output is added to each with a learned weight, while
    they are mixed with each other.

    ``dynamic`` adds to the weights what a projection of every stream gives, bounded by tanh and a
    learned factor (eq. 10 to 13). At the start the model computes what pre-norm computes. All
    streams begin as the embedding; the output norm gets their mean, where the paper has their sum,
    which the norm would scale back.
    """

    name = "hyper-connections"
    citation = """@inproceedings{zhu2025hyper,
  title={Hyper-Connections}, author={Zhu, Defa and Huang, Hongzhi and Huang, Zihao and
    Zeng, Yutao and Mao, Yunyao and Wu, Banggu and Min, Qiyang and Zhou, Xun},
  booktitle={ICLR}, year={2025}}"""

    def __init__(
        self,
        dims: Dims,
        parts: BlockParts,
        *,
        streams: Annotated[int, Ge(1), Le(64)] = 4,
        dynamic: bool = True,
    ) -> None:
        super().__init__(dims, parts)
        self.attention_norm, self.attention = parts.norm(dims), parts.mixer(dims)
        self.ffn_norm, self.ffn = parts.norm(dims), parts.ffn(dims)
        self.streams = streams
        self.attention_connection, self.ffn_connection = (
            Connection(streams, index, dims.d_model, parts.norm(dims) if dynamic else None)
            for index in (2 * dims.layer, 2 * dims.layer + 1)
        )

    def open_stream(self, x: Tensor) -> Tensor:
        """[B, T, M] -> ``streams`` copies [B, T, n, M]."""
        return x[:, :, None].expand(-1, -1, self.streams, -1)

    def close_stream(self, x: Tensor) -> Tensor:
        """The mean of the streams, [B, T, n, M] -> [B, T, M]."""
        return x.mean(2)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, n, M] -> [B, T, n, M]."""
        parts = SublayerRunner(state, context)
        alpha, beta = self.attention_connection.weights(x)
        read, x = self.attention_connection.mix(x, alpha)
        added = parts.mix(self.attention, self.attention_norm(read))
        x = x + beta[..., None] * added[:, :, None]
        alpha, beta = self.ffn_connection.weights(x)
        read, x = self.ffn_connection.mix(x, alpha)
        added = parts.feed_forward(self.ffn, self.ffn_norm(read))
        x = x + beta[..., None] * added[:, :, None]
        return parts.output(x)
