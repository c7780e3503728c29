"""transformers' Llama: as it comes, and tuned."""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lswt_core.benchmark.work import Trained, Work


class Llama(Trained):
    """LlamaForCausalLM of the same width, depth and vocabulary: word embeddings tied and as wide as
    the model, no memory.
    """

    name = "llama"
    note = "transformers' LlamaForCausalLM as it comes; plain causal attention, no memory"
    # its name has changed
    cache_key = (
        "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    )

    def build(self) -> nn.Module:
        """See Trained."""
        work = self.work
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=work.vocab_size,
                hidden_size=work.d_model,
                intermediate_size=work.d_ffn,
                num_hidden_layers=work.n_layers,
                num_attention_heads=work.n_heads,
                num_key_value_heads=work.n_heads,
                max_position_embeddings=work.seq_len + work.remembered + 4096,
                tie_word_embeddings=True,
                attn_implementation="sdpa",
            )
        )
        model.get_input_embeddings().weight.requires_grad_(work.trained_table)
        return cast(nn.Module, model)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """By the library's own loss, which shifts labels itself."""
        return cast(Tensor, self.model(input_ids=inputs, labels=labels, shift_labels=labels).loss)

    @torch.no_grad()
    def prompt(self, ids: Tensor) -> Tensor | None:
        """See Subject."""
        self.cache: Any = DynamicCache()
        return self.decode(ids)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """See Subject."""
        with self.work.precision.autocast(self.work.device):
            out = self.model(
                input_ids=ids, use_cache=True, logits_to_keep=1, **{self.cache_key: self.cache}
            )
        return cast(Tensor, out.logits[:, -1].argmax(-1, keepdim=True))


class LlamaTuned(Llama):
    """The same compiled, with the fused optimizer and an allocator that keeps memory."""

    name = "llama-tuned"
    keeps_freed = True
    note = "the same under torch.compile, with fused AdamW and freed memory kept"
    optimizer_options: ClassVar[dict[str, Any]] = {"fused": True}

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.compiled = torch.compile(self.model)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See Llama."""
        return cast(
            Tensor, self.compiled(input_ids=inputs, labels=labels, shift_labels=labels).loss
        )
