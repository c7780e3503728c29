"""The cross-entropy against the vocabulary by Liger's kernels (``pip install lswt-core[liger]``)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    IGNORE,
    CrossEntropy,
    CrossEntropyOutput,
    LabelSampling,
    Unsupported,
)
from lswt_core.plugin_api.cross_entropy import chunked_cross_entropy


class Liger(CrossEntropy):
    """Chunks of logits like "chunked", through the Triton kernel of Liger (Hsu et al. 2024, arXiv
    2410.10989).

    Labels are drawn by ``chunked`` and scored by a second call. The device is waited for twice a
    micro-batch. Where the logsumexp is asked for, logits are computed again in the backward pass,
    because every token has a gradient of its own then.
    """

    name = "liger"
    libraries = ("liger_kernel",)
    citation = """@article{hsu2024liger,
  title={Liger Kernel: Efficient Triton Kernels for LLM Training}, author={Hsu, Pin-Lun and Dai, Yun and Kothapalli, Vignesh and others},
  journal={arXiv preprint arXiv:2410.10989}, year={2024}}"""

    def require(self, device: str) -> None:
        """Wants the package, and a device that Triton compiles for (or its interpreter, which is
        for tests).
        """
        if find_spec("liger_kernel") is None or find_spec("triton") is None:
            raise Unsupported(
                "liger-kernel is not installed: pip install 'lswt-core[liger]', or choose"
                ' cross_entropy.use = "chunked"'
            )
        if device == "cpu" and not interpreted():
            raise Unsupported(
                'Liger\'s kernels are for GPUs, not for a cpu; choose cross_entropy.use = "chunked"'
            )

    def forward(
        self,
        z: Tensor,
        table: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        logsumexp: bool = False,
    ) -> CrossEntropyOutput:
        """The score of z [B, T, d_vocab] by a table [V, d_vocab] against labels [B, T]."""
        if z.is_meta:  # a plan: the same work, and nothing to compute
            return chunked_cross_entropy(z, table, labels, draws, logsumexp=logsumexp)
        weight, kept = table.to(z.dtype), labels != IGNORE
        total, correct, nll = fused(
            z, weight, labels, by_token=logsumexp or not torch.is_grad_enabled()
        )
        sampled = drawn = None
        if draws is not None:
            with torch.no_grad():
                drawn = chunked_cross_entropy(z, table.detach(), labels, draws).drawn
            assert drawn is not None
            among = kept if draws.rows is None else kept & draws.rows[:, None]
            sampled = fused(z, weight, drawn.masked_fill(~among, IGNORE), by_token=False)[0]
        log_sum = None
        # the negative log-likelihood is what the logsumexp exceeds the label's logit by
        if logsumexp and nll is not None:
            log_sum = (nll + (z * weight[labels.where(kept, 0)]).sum(-1)) * kept
        return CrossEntropyOutput(
            total, correct, sampled, log_sum, None if nll is None else nll.detach(), drawn
        )

    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        """As many as make the logits as large as the states, but for rounding to a power of two."""
        parts = -(-table.shape[0] // table.shape[1])
        return min(tokens, 1 << (-(-tokens // parts) - 1).bit_length()) * len(table)


def fused(
    z: Tensor, weight: Tensor, labels: Tensor, *, by_token: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The total [], how many labels had the largest logit [], and, ``by_token``, what each of them
    [B, T] adds to the total.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    kernel: Any = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE,
        reduction="none" if by_token else "sum",
        accum_dtype=torch.float32,
        return_token_accuracy=True,
    )
    found = kernel(weight, z.flatten(0, 1), labels.flatten())
    if by_token:
        return found.loss.sum(), found.token_accuracy.detach().sum(), found.loss.view_as(labels)
    right = found.token_accuracy.detach() * (labels != IGNORE).sum()
    return found.loss, right.nan_to_num().round(), None  # none at all: 0 / 0


def interpreted() -> bool:
    """Whether Triton runs its kernels as Python, which works on a CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@hookimpl
def lswt_components() -> list[type]:
    """Offer Liger's kernels."""
    return [Liger]
