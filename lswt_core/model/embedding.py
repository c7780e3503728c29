"""The tied embedding: one table for token embeddings and the LM head, and its projections.

The table may be narrower than the model: its width d_vocab is projected to d_model on the way in
and back on the way out, so that one pretrained table (768 wide) serves every model size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lswt_core.interfaces import CrossEntropyOutput, LabelSampling
from lswt_core.plugin_api.cross_entropy import chunked_cross_entropy
from lswt_core.plugin_api.plain_modules import is_plain_table

COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TiedEmbedding(nn.Module):
    """Token ids to hidden states and back, through one table [V, d_vocab]."""

    def __init__(self, vocab_size: int, d_vocab: int, d_model: int) -> None:
        super().__init__()
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

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [B, T] -> [B, T, M]."""
        return self.project_in(self.table(ids))

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
        z = self.output(states)  # [B, T, d_vocab]
        return nn.functional.linear(z, self.full_table(z.device).to(z.dtype))

    def score(
        self,
        states: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        by: Callable[..., CrossEntropyOutput] = chunked_cross_entropy,
        logsumexp: bool = False,
    ) -> CrossEntropyOutput:
        """Cross-entropy of states [B, T, M] against labels [B, T] and, with ``draws``, also against
        labels sampled from the model's own distribution. ``by`` computes it: a CrossEntropy
        component or a function with its arguments.
        """
        z = self.output(states)  # [B, T, d_vocab]
        table = self.full_table(z.device)
        if not torch.is_grad_enabled():
            table = table.detach()  # an autograd.Function cannot see whether gradients are enabled
        return by(z, table, labels, draws, logsumexp=logsumexp)

    def full_table(self, device: torch.device) -> Tensor:
        """All rows of the table [V, d_vocab]. If the table is more than its weight (an adapter,
        quantised, offloaded), they are what its module returns.
        """
        if is_plain_table(self.table):
            return self.table.weight
        return self.table(torch.arange(self.vocab_size, device=device))
