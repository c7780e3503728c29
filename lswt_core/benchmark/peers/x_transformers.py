"""x-transformers, the maintained library with a Transformer-XL memory."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from x_transformers import Decoder, TransformerWrapper

from lswt_core.benchmark.work import TorchContender, Work


class XTransformers(TorchContender):
    """TransformerWrapper of the same width and depth with ``max_mem_len``: it stores hidden states
    and projects them to keys and values at every step.
    """

    name = "x-transformers"
    has_memory = True
    note = (
        "x-transformers with its Transformer-XL memory (hidden states), rotary positions, SwiGLU,"
        " flash attention"
    )

    def __init__(self, work: Work) -> None:
        self.memories: dict[bool, Any] = {}  # True: training, False: evaluation
        self.text: Tensor | None = None  # so far, while decoding
        super().__init__(work)

    def build(self) -> nn.Module:
        """See TorchContender."""
        work = self.work
        model = TransformerWrapper(
            num_tokens=work.vocab_size,
            max_seq_len=work.seq_len,
            max_mem_len=work.memory_length,
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
        model.token_emb.emb.weight.requires_grad_(work.trainable_embedding)
        return cast(nn.Module, model)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return dense cross-entropy, with memory."""
        training = torch.is_grad_enabled()
        if self.work.memory_length:
            logits, kept = self.model(inputs, mems=self.memories.get(training), return_mems=True)
            self.memories[training] = [t.detach() for t in kept]
        else:
            logits = self.model(inputs)
        return cross_entropy(logits.flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor | None:
        """See Contender."""
        self.cache: Any = None
        self.text = None
        return self.decode(ids)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """With a KV cache that grows with the text."""
        self.text = ids if self.text is None else torch.cat((self.text, ids), dim=1)
        with self.work.precision.autocast(self.work.device):
            logits, self.cache = self.model(self.text, return_intermediates=True, cache=self.cache)
        return cast(Tensor, logits[:, -1].argmax(-1, keepdim=True))

    def state_tensors(self) -> list[Tensor]:
        """See Contender."""
        return super().state_tensors() + list(self.memories.get(True, []))


class XTransformersTuned(XTransformers):
    """x-transformers with fused AdamW and an allocator that keeps freed memory."""

    name = "x-transformers-tuned"
    keeps_freed_memory = True
    note = "the same with fused AdamW and freed memory kept"
    optimizer_options: ClassVar[dict[str, Any]] = {"fused": True}
