"""An auxiliary loss: a price on confidence."""

import math
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import IGNORE, AuxiliaryLoss, Batch, Dims, LossSum, Output


class Example(AuxiliaryLoss):
    """log V minus the entropy of softmax(logits / ``temperature``), averaged over predicted labels:
    0 where all tokens are as likely.
    """

    name = "example"
    needs = frozenset({"logits"})  # or "states": what nobody needs is never computed
    citation = "@misc{lswt_example, title={lswt-example}, author={its authors}}"

    def __init__(self, dims: Dims, *, temperature: Annotated[float, Gt(0)] = 1.0) -> None:
        super().__init__(dims)
        self.temperature = temperature

    def forward(self, out: Output, batch: Batch) -> LossSum:
        """Change this: a total and what it counts; the core divides, over all micro-batches and
        processes at once.
        """
        assert out.logits is not None
        wide = (
            out.logits.to(torch.promote_types(out.logits.dtype, torch.float32)) / self.temperature
        )
        logs: Tensor = wide.log_softmax(-1)  # [B, T, V]
        confidence = math.log(logs.shape[-1]) + (logs.exp() * logs).sum(-1)  # [B, T]
        return LossSum(confidence.masked_fill(batch.labels == IGNORE, 0.0).sum(), self.count(batch))


@hookimpl
def lswt_components() -> list[type]:
    """What this plugin offers."""
    return [Example]
