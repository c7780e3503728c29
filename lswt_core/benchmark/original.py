"""Reimplementation of the original authors' training step, as a baseline: all keys are rotated at
every step, keys and values are concatenated, attention uses an explicit mask, all logits exist in
float32, SimCTG computes the full matrix of pairs, and the KV cache is kept in host memory between
steps.

It runs over the modules of one of our models, so that weights are the same and results can be
compared.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from lswt_core.benchmark.work import TorchContender, Work
from lswt_core.device import Precision
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention


class OriginalCode(TorchContender):
    """A recipe's modules, run as the original code runs its own."""

    name = "original"
    has_memory = True
    note = "the original code's computation with the same modules"

    def __init__(self, work: Work, loss: nn.Module, base: float, margin: float | None) -> None:
        self.modules, self.base, self.margin = loss, base, margin
        self.decoder = cast(Decoder, loss.decoder)
        self.train_cache: list[Tensor] | None = None
        self.eval_cache: list[Tensor] | None = None
        self.decode_cache: list[Tensor] | None = None
        super().__init__(work)

    def build(self) -> nn.Module:
        """See TorchContender."""
        return self.modules

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return dense cross-entropy plus SimCTG; accuracy is computed as well, at every step as in
        the original's trainer.
        """
        if torch.is_grad_enabled():
            states, self.train_cache = self.hidden_states(inputs, self.train_cache)
        else:
            states, self.eval_cache = self.hidden_states(inputs, self.eval_cache)
        logits = self.decoder.vocabulary.logits(states).float()  # [B, T, V]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.accuracy = (logits.detach().argmax(-1) == labels).float().mean()
        if self.margin is None:
            return loss
        return loss + self.simctg(states.float(), self.margin)

    def simctg(self, states: Tensor, margin: float) -> Tensor:
        """Mean of max(0, margin - s(i, i) + s(i, j)) over all pairs i != j, as in the original."""
        unit = states / states.norm(dim=2, keepdim=True)
        scores = unit @ unit.transpose(1, 2)  # [B, T, T]
        own = torch.diagonal(scores, dim1=1, dim2=2)
        hinge = (margin - (own[..., None] - scores)).relu()
        size = states.shape[1]
        # created on the CPU, as in the original
        different = torch.FloatTensor(size, size).fill_(1.0).fill_diagonal_(0.0).to(states.device)
        return (hinge * different).sum() / (different.sum() * len(states))

    def hidden_states(self, ids: Tensor, cache: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Ids [B, T] and the cache in host memory -> states [B, T, M] and the new cache."""
        decoder = self.decoder
        x, new_cache = decoder.input_norm(decoder.vocabulary.embed(ids)), []
        for i, block in enumerate(decoder.blocks):
            cached = None
            if cache is not None:
                cached = [t.to(self.work.device) for t in cache[2 * i : 2 * i + 2]]
            x, kept = self.run_block(block, x, cached)
            new_cache += [t.detach().to("cpu") for t in kept]
        return decoder.output_norm(x), new_cache

    def run_block(
        self, block: Any, x: Tensor, cached: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """One layer; the cache holds keys before rotation, and values, [B, H, N, D]."""
        layer, h = block.attention, block.attention_norm(x)
        q, k, v = (
            projected.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2)
            for projected in (layer.query(h), layer.key(h), layer.value(h))
        )
        if cached is not None:
            k, v = torch.cat((cached[0], k), dim=2), torch.cat((cached[1], v), dim=2)
        kept = [k[:, :, -self.work.memory_length :], v[:, :, -self.work.memory_length :]]
        x = x + layer.output(self.attend(layer, q, k, v).transpose(1, 2).flatten(2))
        return x + block.ffn(block.ffn_norm(x)), kept

    def attend(self, layer: SoftmaxAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate all keys, prepend registers, and attend with an explicit mask."""
        new, keys = q.shape[2], k.shape[2]
        positions = torch.arange(keys - 1, -1, -1, device=q.device)  # the newest token is 0
        q, k = self.rotate(q, positions[-new:]), self.rotate(k, positions)
        mask = torch.ones(new, keys, dtype=torch.bool, device=q.device).tril(keys - new)
        for memory in layer.memory.values():
            if hasattr(memory, "keys") and isinstance(memory.keys, Tensor):
                registers = [
                    cast(Tensor, t).to(k.dtype).transpose(0, 1).expand(len(k), -1, -1, -1)
                    for t in (memory.keys, memory.values)
                ]
                k, v = torch.cat((registers[0], k), dim=2), torch.cat((registers[1], v), dim=2)
                mask = torch.cat((mask.new_ones(new, registers[0].shape[2]), mask), dim=1)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of x [B, H, N, D] at positions [N], without a cached table."""
        width = x.shape[-1]
        frequency = self.base ** (-torch.arange(0, width, 2, device=x.device).float() / width)
        angle = torch.outer(positions.float(), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        a, b = x.chunk(2, dim=-1)
        return (x * angle.cos() + torch.cat((-b, a), dim=-1) * angle.sin()).to(x.dtype)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor | None:
        """See Contender."""
        self.decode_cache = None
        for segment in ids.split(self.work.seq_len, dim=1):
            chosen = self.decode(segment)
        return chosen

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """See Contender."""
        with self.work.precision.autocast(self.work.device):
            states, self.decode_cache = self.hidden_states(ids, self.decode_cache)
            return self.decoder.vocabulary.logits(states[:, -1:])[:, 0].argmax(-1, keepdim=True)

    def state_tensors(self) -> list[Tensor]:
        """See Contender."""
        return super().state_tensors() + (self.train_cache or [])


class OriginalFloat32(OriginalCode):
    """The same in float32."""

    name = "original-float32"
    note = "the original code's computation, in float32"

    def __init__(self, work: Work, loss: nn.Module, base: float, margin: float | None) -> None:
        precision = Precision(torch.float32, "asked for")
        super().__init__(work._replace(precision=precision), loss, base, margin)


def build_original(kind: type[OriginalCode], work: Work, ours: Any) -> OriginalCode:
    """Build the baseline over a copy of one of our contender's modules, with the same weights."""
    decoder = ours.loss.decoder
    simctg = next((loss for loss in ours.loss.auxiliary.values() if loss.name == "simctg"), None)
    base = getattr(decoder.positional, "base", 10_000.0)
    return kind(work, copy.deepcopy(ours.loss), base, None if simctg is None else simctg.margin)
