"""The same model in the original code's own way, for comparison: every key is rotated anew at every
step, keys and values are copied together, attention goes through a mask, all logits exist in
float32, SimCTG is its formula over a full matrix of pairs, and the cache lies in host memory
between steps.

Written out of place, over the modules of a model of ours, so that weights are the same and results
can be compared.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from lswt_core.benchmark.work import Trained, Work
from lswt_core.device import Precision
from lswt_core.model.attention import Attention
from lswt_core.model.decoder import Block, Decoder


class OriginalWay(Trained):
    """A recipe's modules, run as the original code runs its own."""

    name = "original"
    remembers = True
    note = "the original code's way through the same modules"

    def __init__(self, work: Work, loss: nn.Module, base: float, margin: float | None) -> None:
        self.given, self.base, self.margin = loss, base, margin
        self.decoder = cast(Decoder, loss.decoder)
        self.cache: list[Tensor] | None = None  # of training
        self.read: list[Tensor] | None = None  # of evaluation
        self.past: list[Tensor] | None = None  # of decoding
        super().__init__(work)

    def build(self) -> nn.Module:
        """The modules."""
        return self.given

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Dense cross-entropy, accuracy and SimCTG, as the original's trainer computes them at
        every step.
        """
        cache = self.cache if torch.is_grad_enabled() else self.read
        states, following = self.states(inputs, cache)
        if torch.is_grad_enabled():
            self.cache = following
        else:
            self.read = following
        logits = self.decoder.vocabulary.logits(states).float()  # [B, T, V]
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.accuracy = (logits.detach().argmax(-1) == labels).float().mean()
        return loss if self.margin is None else loss + self.contrast(states.float())

    def contrast(self, states: Tensor) -> Tensor:
        """max(0, margin - s(i, i) + s(i, j)) over all pairs i != j, by the authors' formula."""
        assert self.margin is not None
        unit = states / states.norm(dim=2, keepdim=True)
        scores = unit @ unit.transpose(1, 2)  # [B, T, T]
        own = torch.diagonal(scores, dim1=1, dim2=2)
        gap = (self.margin - (own[..., None] - scores)).relu()
        size = states.shape[1]
        # made on the CPU, as there
        different = torch.FloatTensor(size, size).fill_(1.0).fill_diagonal_(0.0).to(states.device)
        return (gap * different).sum() / (different.sum() * len(states))

    def states(self, ids: Tensor, cache: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Ids [B, T] and the cache in host memory -> states [B, T, M] and the next cache."""
        decoder = self.decoder
        x, following = decoder.input_norm(decoder.vocabulary.embed(ids)), []
        for i, block in enumerate(decoder.blocks):
            old = (
                None
                if cache is None
                else [t.to(self.work.device) for t in cache[2 * i : 2 * i + 2]]
            )
            x, kept = self.block(cast(Block, block), x, old)
            following += [t.detach().to("cpu") for t in kept]
        return decoder.output_norm(x), following

    def block(
        self, block: Block, x: Tensor, old: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """One layer; the cache is un-rotated keys and values [B, H, N, D]."""
        layer, h = block.attention, block.attention_norm(x)
        q, k, v = (
            projected.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2)
            for projected in (layer.query(h), layer.key(h), layer.value(h))
        )
        if old is not None:
            k, v = torch.cat((old[0], k), dim=2), torch.cat((old[1], v), dim=2)
        kept = [k[:, :, -self.work.remembered :], v[:, :, -self.work.remembered :]]
        x = x + layer.output(self.attend(layer, q, k, v).transpose(1, 2).flatten(2))
        return x + block.ffn(block.ffn_norm(x)), kept

    def attend(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All keys rotated anew, registers put before them, one call under a mask."""
        new, keys = q.shape[2], k.shape[2]
        places = torch.arange(keys - 1, -1, -1, device=q.device)  # the newest token is 0
        q, k = self.rotate(q, places[-new:]), self.rotate(k, places)
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

    def rotate(self, x: Tensor, places: Tensor) -> Tensor:
        """X [B, H, N, D] turned by places [N]; the table is computed anew."""
        width = x.shape[-1]
        frequency = self.base ** (-torch.arange(0, width, 2, device=x.device).float() / width)
        angle = torch.outer(places.float(), frequency)
        angle = torch.cat((angle, angle), dim=-1)
        a, b = x.chunk(2, dim=-1)
        return (x * angle.cos() + torch.cat((-b, a), dim=-1) * angle.sin()).to(x.dtype)

    @torch.no_grad()
    def prompt(self, ids: Tensor) -> Tensor | None:
        """See Subject."""
        self.past = None
        for segment in ids.split(self.work.seq_len, dim=1):
            chosen = self.step(segment)
        return chosen

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """See Subject."""
        return self.step(ids)

    def step(self, ids: Tensor) -> Tensor:
        """Read ids and choose the next."""
        with self.work.precision.autocast(self.work.device):
            states, self.past = self.states(ids, self.past)
            return self.decoder.vocabulary.logits(states[:, -1:])[:, 0].argmax(-1, keepdim=True)

    def held(self) -> list[Tensor]:
        """Moments and the cache."""
        return super().held() + (self.cache or [])


class OriginalFloat32(OriginalWay):
    """The same in float32."""

    name = "original-float32"
    note = "the original code's way, in float32"

    def __init__(self, work: Work, loss: nn.Module, base: float, margin: float | None) -> None:
        super().__init__(
            work._replace(precision=Precision(torch.float32, "asked for")), loss, base, margin
        )


def build(kind: type[OriginalWay], work: Work, ours: Any) -> OriginalWay:
    """The original's way over modules like those of a subject of ours, with the same initial
    numbers.
    """
    import copy

    decoder = ours.loss.decoder
    simctg = next((loss for loss in ours.loss.auxiliary.values() if loss.name == "simctg"), None)
    base = getattr(decoder.positional, "base", 10_000.0)
    return kind(work, copy.deepcopy(ours.loss), base, None if simctg is None else simctg.margin)
