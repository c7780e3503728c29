"""A minimal GPT like nanoGPT (Karpathy 2022)."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from lswt_core.benchmark.work import TorchContender, Work


class Layer(nn.Module):
    """Pre-norm attention and GELU feed-forward."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.n_heads = work.n_heads
        self.norm1 = nn.LayerNorm(work.d_model)
        self.norm2 = nn.LayerNorm(work.d_model)
        self.qkv = nn.Linear(work.d_model, 3 * work.d_model)
        self.out = nn.Linear(work.d_model, work.d_model)
        width = work.d_ffn * 3 // 2  # as many parameters as a gated layer of width d_ffn
        self.up, self.down = nn.Linear(work.d_model, width), nn.Linear(width, work.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        q, k, v = (
            t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x)), approximate="tanh"))


class Network(nn.Module):
    """Learned position embeddings, layers, tied LM head."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.table = nn.Embedding(work.vocab_size, work.d_model)
        self.positions = nn.Embedding(work.seq_len, work.d_model)
        self.layers = nn.ModuleList(Layer(work) for _ in range(work.n_layers))
        self.norm = nn.LayerNorm(work.d_model)
        self.apply(init_weights)
        self.table.weight.requires_grad_(work.trainable_embedding)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of labels [B, T]."""
        x = self.table(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = nn.functional.linear(self.norm(x), self.table.weight)
        return cross_entropy(logits.flatten(0, 1), labels.flatten())


def init_weights(module: nn.Module) -> None:
    """Initialise with N(0, 0.02), as GPT-2."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


class Gpt(TorchContender):
    """GPT in eager mode."""

    name = "gpt"
    note = (
        "a minimal GPT like nanoGPT: learned positions, GELU of as many parameters, dense"
        " cross-entropy; no memory"
    )

    def build(self) -> nn.Module:
        """See TorchContender."""
        return Network(self.work)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See TorchContender."""
        return cast(Tensor, self.model(inputs, labels))


class GptCompiled(Gpt):
    """GPT with torch.compile, fused AdamW and an allocator that keeps freed memory."""

    name = "gpt-compiled"
    keeps_freed_memory = True
    note = "the same under torch.compile, with fused AdamW and freed memory kept"
    optimizer_options: ClassVar[dict[str, Any]] = {"fused": True}

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.compiled = torch.compile(self.model)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See TorchContender."""
        return cast(Tensor, self.compiled(inputs, labels))
