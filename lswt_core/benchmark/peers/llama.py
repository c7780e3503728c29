"""transformers' Llama, with default settings and tuned."""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lswt_core.benchmark.work import TorchContender, Work


class Llama(TorchContender):
    """LlamaForCausalLM of the same width, depth and vocabulary, with tied embeddings and without
    memory.
    """

    name = "llama"
    note = "transformers' LlamaForCausalLM with default settings; causal attention, no memory"
    # renamed in transformers 5.24
    cache_key = (
        "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    )

    def build(self) -> nn.Module:
        """See TorchContender."""
        work = self.work
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=work.vocab_size,
                hidden_size=work.d_model,
                intermediate_size=work.d_ffn,
                num_hidden_layers=work.n_layers,
                num_attention_heads=work.n_heads,
                num_key_value_heads=work.n_heads,
                max_position_embeddings=work.seq_len + work.memory_length + 4096,
                tie_word_embeddings=True,
                attn_implementation="sdpa",
            )
        )
        model.get_input_embeddings().weight.requires_grad_(work.trainable_embedding)
        return cast(nn.Module, model)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the library's own loss, which shifts labels itself."""
        return cast(Tensor, self.model(input_ids=inputs, labels=labels, shift_labels=labels).loss)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor | None:
        """See Contender."""
        self.cache: Any = DynamicCache()
        return self.decode(ids)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """See Contender."""
        with self.work.precision.autocast(self.work.device):
            out = self.model(
                input_ids=ids, use_cache=True, logits_to_keep=1, **{self.cache_key: self.cache}
            )
        return cast(Tensor, out.logits[:, -1].argmax(-1, keepdim=True))


class LlamaTuned(Llama):
    """Llama with torch.compile, fused AdamW and an allocator that keeps freed memory."""

    name = "llama-tuned"
    keeps_freed_memory = True
    note = "the same under torch.compile, with fused AdamW and freed memory kept"
    optimizer_options: ClassVar[dict[str, Any]] = {"fused": True}

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.compiled = torch.compile(self.model)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See TorchContender."""
        return cast(
            Tensor, self.compiled(input_ids=inputs, labels=labels, shift_labels=labels).loss
        )
