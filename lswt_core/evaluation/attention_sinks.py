"""Where attention goes that is not wanted: shares of the first token and of registers, and the sink
rate (Gu et al. 2024, arXiv 2410.10781).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.interfaces import AttentionBackend, KVBlock
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.attention import attention_scores
from lswt_core.plugin_api.softmax_attention import replace_attention_backends

FIRST_TOKEN, REGISTERS = "first_token", "registers"
THRESHOLD = 0.3  # of a head's mean attention to a sink


class Sinks(NamedTuple):
    """Attention to one kind of sink."""

    mean: float  # share of attention, over layers and heads
    rate: float  # share of (layer, head) above THRESHOLD


def attention_sinks(model: LoadedModel, ids: Tensor) -> dict[str, Sinks]:
    """Return attention to the first token and to registers in texts ids [B, T], read from an empty
    memory; only sinks that the model has. Raises UsageError if no layer has softmax attention.
    """
    autocast = model.precision.autocast(ids.device)
    with probed_attention(model.decoder) as shares, torch.no_grad(), autocast:
        model.decoder(ids)
    if not shares:
        raise UsageError("no layer of this model has softmax attention")
    measured = {}
    for name, layers in shares.items():
        heads = torch.cat(layers)  # of all layers
        rate = float((heads > THRESHOLD).double().mean())
        measured[name] = Sinks(float(heads.double().mean()), rate)
    return measured


@contextmanager
def probed_attention(decoder: Decoder) -> Iterator[dict[str, list[Tensor]]]:
    """Record, layer by layer, each head's mean attention [H] to the first token of the text and to
    keys without positions (registers).
    """
    shares: defaultdict[str, list[Tensor]] = defaultdict(list)
    with replace_attention_backends(decoder, lambda layer: ProbedAttention(layer.backend, shares)):
        yield shares


class ProbedAttention(nn.Module):
    """An attention backend whose attention weights are recorded."""

    def __init__(self, backend: AttentionBackend, shares: defaultdict[str, list[Tensor]]) -> None:
        super().__init__()
        self.backend, self.shares = backend, shares

    def forward(self, blocks: list[KVBlock]) -> Tensor:
        """Return what the backend computes of the key blocks."""
        scores = torch.cat([attention_scores(block) for block in blocks], dim=-1)  # [B, H, T, N]
        # without the first query, which attends to itself only
        weights = scores.softmax(-1)[:, :, 1:].mean((0, 2))  # [H, N]
        parts = weights.split([block.k.shape[1] for block in blocks], dim=-1)
        registers = [part for part, block in zip(parts, blocks, strict=True) if is_sink(block)]
        for part, block in zip(parts, blocks, strict=True):
            if block.causal:
                self.shares[FIRST_TOKEN].append(part[:, 0])
        if registers:
            self.shares[REGISTERS].append(torch.cat(registers, dim=-1).sum(-1))
        attended: Tensor = self.backend(blocks)
        return attended


def is_sink(block: KVBlock) -> bool:
    """Whether keys belong to no token."""
    return block.positions is None
