"""Cross-entropy by Liger's Triton kernels (``pip install lswt-core[liger]``)."""

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
from lswt_core.plugin_api.token_scores import cap_logits


class Liger(CrossEntropy):
    """The fused linear cross-entropy of Liger (Hsu et al. 2024, arXiv 2410.10989), which chunks
    logits as ``chunked`` does.

    Labels are sampled as in ``chunked`` and scored by a second call. Synchronises with the device
    twice a micro-batch. With ``logsumexp``, logits are recomputed in the backward pass, because
    every token has a gradient of its own then.
    """

    name = "liger"
    libraries = ("liger_kernel",)
    citation = """@article{hsu2024liger,
  title={Liger Kernel: Efficient Triton Kernels for LLM Training},
  author={Hsu, Pin-Lun and Dai, Yun and Kothapalli, Vignesh and others},
  journal={arXiv preprint arXiv:2410.10989}, year={2024}}"""

    def __init__(self) -> None:
        super().__init__()
        # Triton's interpreter runs no kernel that calls tanh
        self.takes_soft_cap = find_spec("triton") is None or not triton_interprets()

    def require(self, device: str) -> None:
        """Require the package, and a GPU (or Triton's interpreter, for tests)."""
        if find_spec("liger_kernel") is None or find_spec("triton") is None:
            raise Unsupported(
                "liger-kernel is not installed: pip install 'lswt-core[liger]', or choose"
                ' cross_entropy.use = "chunked"'
            )
        if device == "cpu" and not triton_interprets():
            raise Unsupported(
                'Liger\'s kernels run on GPUs, not on a cpu; choose cross_entropy.use = "chunked"'
            )

    def forward(
        self,
        z: Tensor,
        table: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        logsumexp: bool = False,
        soft_cap: float | None = None,
    ) -> CrossEntropyOutput:
        """Cross-entropy of z [B, T, d_vocab] by a table [V, d_vocab] against labels [B, T]."""
        if z.is_meta:  # memory estimates: the same amount of work
            return chunked_cross_entropy(
                z, table, labels, draws, logsumexp=logsumexp, soft_cap=soft_cap
            )
        weight, predicted = table.to(z.dtype), labels != IGNORE
        per_token = logsumexp or not torch.is_grad_enabled()
        total, correct, nll = fused_cross_entropy(
            z, weight, labels, per_token=per_token, soft_cap=soft_cap
        )
        sampled = drawn = None
        if draws is not None:
            drawn = draw_labels(z, table, labels, draws, soft_cap)
            scored = predicted if draws.rows is None else predicted & draws.rows[:, None]
            drawn_labels = drawn.masked_fill(~scored, IGNORE)
            sampled, _, _ = fused_cross_entropy(
                z, weight, drawn_labels, per_token=False, soft_cap=soft_cap
            )
        log_sum = None
        if logsumexp and nll is not None:
            log_sum = (nll + label_logits(z, weight, labels, nll.dtype, soft_cap)) * predicted
        return CrossEntropyOutput(
            total, correct, sampled, log_sum, None if nll is None else nll.detach(), drawn
        )

    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        """Those of one chunk, which Liger makes about as large as the states."""
        chunks = -(-table.shape[0] // table.shape[1])
        chunk = 1 << (-(-tokens // chunks) - 1).bit_length()  # rounded up to a power of two
        return min(tokens, chunk) * len(table)


@torch.no_grad()
def draw_labels(
    z: Tensor, table: Tensor, labels: Tensor, draws: LabelSampling, soft_cap: float | None
) -> Tensor:
    """Labels [B, T] sampled from the model's distribution, as the chunked cross-entropy does."""
    drawn = chunked_cross_entropy(z, table.detach(), labels, draws, soft_cap=soft_cap).drawn
    assert drawn is not None
    return drawn


def label_logits(
    z: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, soft_cap: float | None
) -> Tensor:
    """The logit of each label [B, T], which is its logsumexp minus its negative log-likelihood."""
    logits = (z * weight[labels.where(labels != IGNORE, 0)]).sum(-1)
    return logits if soft_cap is None else cap_logits(logits.to(dtype), soft_cap)


def fused_cross_entropy(
    z: Tensor, weight: Tensor, labels: Tensor, *, per_token: bool, soft_cap: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum of negative log-likelihoods [], the number of labels with the largest logit [], and,
    if ``per_token``, the negative log-likelihood of each label [B, T].
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    kernel: Any = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE,
        reduction="none" if per_token else "sum",
        softcap=soft_cap,
        accum_dtype=torch.float32,
        return_token_accuracy=True,
    )
    out = kernel(weight, z.flatten(0, 1), labels.flatten())
    accuracy = out.token_accuracy.detach()
    if per_token:
        return out.loss.sum(), accuracy.sum(), out.loss.view_as(labels)
    correct = accuracy * (labels != IGNORE).sum()
    return out.loss, correct.nan_to_num().round(), None  # the accuracy of no label is 0 / 0


def triton_interprets() -> bool:
    """Whether Triton interprets kernels, which works on a CPU."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@hookimpl
def lswt_components() -> list[type]:
    """Offer Liger's kernels."""
    return [Liger]
