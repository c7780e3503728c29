"""x-transformers, the one living library with a Transformer-XL memory."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from x_transformers import Decoder, TransformerWrapper

from lswt_core.benchmark.work import Trained, Work


class XTransformers(Trained):
    """TransformerWrapper of the same width and depth with ``max_mem_len``: it keeps hidden states
    and projects them anew.
    """

    name = "x-transformers"
    remembers = True
    note = (
        "x-transformers with its Transformer-XL memory (hidden states), rotary positions, SwiGLU,"
        " flash attention"
    )

    def __init__(self, work: Work) -> None:
        self.memories: dict[bool, Any] = {}  # of training, of evaluation
        self.seen: Tensor | None = None  # what was read while decoding
        super().__init__(work)

    def build(self) -> nn.Module:
        """See Trained."""
        work = self.work
        model = TransformerWrapper(
            num_tokens=work.vocab_size,
            max_seq_len=work.seq_len,
            max_mem_len=work.remembered,
            tie_embedding=True,
            use_abs_pos_emb=False,
            attn_layers=Decoder(
                dim=work.d_model,
                depth=work.n_layers,
                heads=work.n_heads,
                attn_dim_head=work.d_model // work.n_heads,
                rotary_pos_emb=True,
                attn_flash=True,
                ff_glu=True,
                ff_swish=True,
                ff_mult=work.d_ffn / work.d_model,
            ),
        )
        model.token_emb.emb.weight.requires_grad_(work.trained_table)
        return cast(nn.Module, model)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Dense cross-entropy, its memory carried along."""
        training = torch.is_grad_enabled()
        if self.work.remembered:
            logits, kept = self.model(inputs, mems=self.memories.get(training), return_mems=True)
            self.memories[training] = [t.detach() for t in kept]
        else:
            logits = self.model(inputs)
        return cross_entropy(logits.flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def prompt(self, ids: Tensor) -> Tensor | None:
        """See Subject."""
        self.cache: Any = None
        self.seen = None
        return self.decode(ids)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """With its cache of keys and values, which grows."""
        self.seen = ids if self.seen is None else torch.cat((self.seen, ids), dim=1)
        with self.work.precision.autocast(self.work.device):
            logits, self.cache = self.model(self.seen, return_intermediates=True, cache=self.cache)
        return cast(Tensor, logits[:, -1].argmax(-1, keepdim=True))

    def held(self) -> list[Tensor]:
        """Moments and memories."""
        return super().held() + list(self.memories.get(True, []))


class XTransformersTuned(XTransformers):
    """The same with the fused optimizer and an allocator that keeps memory."""

    name = "x-transformers-tuned"
    keeps_freed = True
    note = "the same with fused AdamW and freed memory kept"
    optimizer_options: ClassVar[dict[str, Any]] = {"fused": True}
