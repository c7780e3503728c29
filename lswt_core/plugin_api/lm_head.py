"""For heads: one table for token embeddings and the LM head, and its projections; logits may be
soft-capped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.interfaces import CrossEntropyOutput, Dims, Head, LabelSampling
from lswt_core.plugin_api.cross_entropy import chunked_cross_entropy
from lswt_core.plugin_api.plain_modules import is_plain_table
from lswt_core.plugin_api.token_scores import cap_logits

COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LMHead(Head):
    """Token ids to hidden states and back, through one table [V, d_vocab], which may be narrower
    than the model: it is projected to d_model on the way in and back on the way out, so that one
    pretrained table (768 wide) serves every model size.

    A head with another output table overrides ``unembed`` and ``output_table``; one that caps its
    logits sets ``soft_cap``.
    """

    table: nn.Embedding

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        vocab_size, d_vocab, d_model = dims.vocab_size, dims.d_vocab, dims.d_model
        # from_pretrained skips nn.Embedding's own initialisation, which on the meta device would
        # import torch's compiler, for seconds; `initialise` fills every parameter later
        self.table = nn.Embedding.from_pretrained(torch.empty(vocab_size, d_vocab), freeze=False)
        self.input = nn.Linear(d_vocab, d_model, bias=False)
        self.output = nn.Linear(d_model, d_vocab, bias=False)
        self.vocab_size = vocab_size

    def freeze(self) -> None:
        """Exclude the table from training and store it in float16: half the memory, and exact for
        tables that are published so (OPT's). It is cast where it is used, so that the dtype of the
        other parameters decides what the model computes in.
        """
        self.table.requires_grad_(False).half()

    def project_in(self, embedded: Tensor) -> Tensor:
        """Rows of the table [B, T, d_vocab] -> [B, T, M]. They are cast to the projection's dtype;
        a quantised projection, whose weight tells no compute dtype, takes them as they are.
        """
        dtype = getattr(getattr(self.input, "weight", None), "dtype", None)
        if dtype in COMPUTE_DTYPES:
            embedded = embedded.to(dtype)
        return self.input(embedded)

    def logits(self, states: Tensor) -> Tensor:
        """States [B, T, M] -> logits [B, T, V], all in memory at once."""
        logits = self.unembed(self.output(states))
        return logits if self.soft_cap is None else cap_logits(logits, self.soft_cap)

    def unembed(self, z: Tensor) -> Tensor:
        """Projected states z [B, T, d_vocab] -> logits [B, T, V] before the cap."""
        return nn.functional.linear(z, self.output_table(z).to(z.dtype))

    def score(
        self,
        states: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        by: Callable[..., CrossEntropyOutput] | None = None,
        logsumexp: bool = False,
    ) -> CrossEntropyOutput:
        """Cross-entropy (see Head.score)."""
        z = self.output(states)  # [B, T, d_vocab]
        table = self.output_table(z)
        if not torch.is_grad_enabled():
            table = table.detach()  # an autograd.Function cannot see whether gradients are enabled
        options: dict[str, Any] = {}
        if self.soft_cap is not None:  # not every implementation knows of caps
            options["soft_cap"] = self.soft_cap
        by = by or chunked_cross_entropy
        return by(z, table, labels, draws, logsumexp=logsumexp, **options)

    def output_table(self, z: Tensor) -> Tensor:
        """The rows [V, d_vocab] that projected states z are multiplied by. If the table is more
        than its weight (an adapter, quantised, offloaded), they are what its module returns.
        """
        if is_plain_table(self.table):
            return self.table.weight
        rows: Tensor = self.table(torch.arange(self.vocab_size, device=z.device))
        return rows
