"""LitGPT's GPT with the settings of its Llama family."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch import Tensor, nn

from lswt_core.benchmark.work import TorchContender


class LitGpt(TorchContender):
    """litgpt.GPT of the same width and depth, with its chunked cross-entropy and untied LM head."""

    name = "litgpt"
    note = "litgpt.GPT with pretraining settings: untied LM head, chunked cross-entropy, no memory"
    optimizer_options: ClassVar[dict[str, Any]] = {"fused": True}

    def build(self) -> nn.Module:
        """See TorchContender."""
        work = self.work
        config = Config(
            block_size=work.seq_len,
            vocab_size=work.vocab_size,
            padded_vocab_size=work.vocab_size,
            n_layer=work.n_layers,
            n_head=work.n_heads,
            n_embd=work.d_model,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=work.d_ffn,
        )
        return cast(nn.Module, GPT(config))

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See TorchContender."""
        return chunked_cross_entropy(self.model(inputs), labels)
