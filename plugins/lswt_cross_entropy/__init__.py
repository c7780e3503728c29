"""Cross-entropy over the vocabulary, in chunks of tokens or with all logits at once."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import CrossEntropy, CrossEntropyOutput, LabelSampling
from lswt_core.plugin_api.compilation import raise_recompile_limit
from lswt_core.plugin_api.cross_entropy import (
    Chunking,
    Epilogue,
    chunked_cross_entropy,
    default_chunk_size,
    dense_cross_entropy,
)
from lswt_core.plugin_api.token_scores import score_tile


class Chunked(CrossEntropy):
    """Logits of ``chunk`` tokens at a time. The forward pass overwrites them with their gradient
    and computes that of the hidden states (Hsu et al. 2024, arXiv 2410.10989): logits are computed
    once and never kept. Two matrix products if the embedding is frozen, three if it is
    trained.

    ``chunk`` 0 depends on the device: 256 tokens on a CPU, 1,024 if the embedding is trained;
    elsewhere 1,024 and 4,096. If the model's blocks are compiled, so is the softmax of a chunk.
    """

    name = "chunked"
    takes_soft_cap = True
    citation = """@article{hsu2024liger,
  title={Liger Kernel: Efficient Triton Kernels for LLM Training},
  author={Hsu, Pin-Lun and Dai, Yun and Kothapalli, Vignesh and others},
  journal={arXiv preprint arXiv:2410.10989}, year={2024}}"""

    def __init__(self, *, chunk: Annotated[int, Ge(0)] = 0) -> None:
        super().__init__()
        self.chunk = chunk
        self.epilogue: Epilogue | None = None

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
        chunking = Chunking(self.chunk_size(z.device.type, table), self.epilogue)
        return chunked_cross_entropy(
            z, table, labels, draws, logsumexp=logsumexp, chunking=chunking, soft_cap=soft_cap
        )

    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        """Those of one chunk."""
        return min(self.chunk_size(device, table), tokens) * len(table)

    def chunk_size(self, device: str, table: Tensor) -> int:
        """The number of tokens in a chunk."""
        return self.chunk or default_chunk_size(device, trained=table.requires_grad)

    def compile_kernels(self) -> None:
        """Compile the softmax of a chunk: one pass over its logits instead of several."""
        self.epilogue = torch.compile(score_tile, **raise_recompile_limit())


class Dense(CrossEntropy):
    """All logits of a micro-batch at once, by torch's cross-entropy. The 50,272 logits of a token
    take 400 KB and more until its backward pass.
    """

    name = "dense"
    takes_soft_cap = True

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
        return dense_cross_entropy(z, table, labels, draws, logsumexp=logsumexp, soft_cap=soft_cap)

    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        """All logits."""
        return tokens * len(table)


@hookimpl
def lswt_components() -> list[type]:
    """Offer chunked and dense cross-entropy."""
    return [Chunked, Dense]
