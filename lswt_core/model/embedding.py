"""The vocabulary side of the model: one table for input and output, and its projections.

The table may be narrower than the model: width d_vocab, projected to d_model on the way in and back
on the way out, so one pretrained table (768 wide) serves every size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lswt_core.interfaces import CrossEntropyOutput, LabelSampling
from lswt_core.model.plain_modules import is_plain_table
from lswt_core.plugin_api.cross_entropy import chunked

COMPUTED_IN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TiedEmbedding(nn.Module):
    """Token ids to model states and back, through one table [V, d_vocab]."""

    def __init__(self, vocab_size: int, d_vocab: int, d_model: int) -> None:
        super().__init__()
        # Without numbers, as `initialise` fills everything: to fill it on the meta device, torch
        # would import its compiler for seconds
        self.table = nn.Embedding.from_pretrained(torch.empty(vocab_size, d_vocab), freeze=False)
        self.input = nn.Linear(d_vocab, d_model, bias=False)
        self.output = nn.Linear(d_model, d_vocab, bias=False)
        self.size = vocab_size

    def freeze(self) -> None:
        """Keep the table out of training, in float16: half the memory, and exact for tables that
        are stored so (OPT's). It is widened where it is used, so that the precision of the rest
        decides in which precision the model computes.
        """
        self.table.requires_grad_(False).half()

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [B, T] -> [B, T, M]."""
        return self.widen(self.table(ids))

    def widen(self, embedded: Tensor) -> Tensor:
        """Rows of the table [B, T, d_vocab] -> [B, T, M]. They are widened to the projection's
        precision; a quantised projection, whose weight tells none, takes them as they are.
        """
        dtype = getattr(getattr(self.input, "weight", None), "dtype", None)
        return self.input(embedded.to(dtype) if dtype in COMPUTED_IN else embedded)

    def logits(self, states: Tensor) -> Tensor:
        """States [B, T, M] -> [B, T, V]; large: only for those who need every logit."""
        z = self.output(states)  # [B, T, d_vocab]
        return nn.functional.linear(z, self.rows(z.device).to(z.dtype))

    def score(
        self,
        states: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        by: Callable[..., CrossEntropyOutput] = chunked,
        logsumexp: bool = False,
    ) -> CrossEntropyOutput:
        """Cross-entropy of states [B, T, M] against labels [B, T] and, with ``draws``, against
        labels drawn from the model's own distribution as well, ``by`` a component of that kind or a
        function like one.
        """
        z = self.output(states)  # [B, T, d_vocab]
        table = self.rows(z.device)
        if not torch.is_grad_enabled():
            table = table.detach()  # a Function cannot tell from inside
        return by(z, table, labels, draws, logsumexp=logsumexp)

    def rows(self, device: torch.device) -> Tensor:
        """All rows of the table [V, d_vocab]. Where the table is more than its weight (an adapter,
        quantised, offloaded), they are what its module gives.
        """
        if is_plain_table(self.table):
            return self.table.weight
        return self.table(torch.arange(self.size, device=device))
