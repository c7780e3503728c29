"""An auxiliary loss: a penalty on confident predictions."""

import math
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import IGNORE, AuxiliaryLoss, Batch, Dims, LossSum, Output


class Example(AuxiliaryLoss):
    """log V minus the entropy of softmax(logits / ``temperature``), averaged over predicted tokens:
    0 for a uniform prediction.
    """

    name = "example"
    needs = frozenset({"logits"})  # or "states", "logsumexp"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, dims: Dims, *, temperature: Annotated[float, Gt(0)] = 1.0) -> None:
        super().__init__(dims)
        self.temperature = temperature

    def forward(self, out: Output, batch: Batch) -> LossSum:
        """Change this: a sum and the number of terms; the core divides, over all micro-batches and
        data-parallel ranks.
        """
        assert out.logits is not None
        logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
        log_p: Tensor = (logits / self.temperature).log_softmax(-1)  # [B, T, V]
        penalty = math.log(log_p.shape[-1]) + (log_p.exp() * log_p).sum(-1)  # [B, T]
        return LossSum(penalty.masked_fill(batch.labels == IGNORE, 0.0).sum(), self.count(batch))


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
