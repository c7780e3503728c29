"""The cross-entropy against the vocabulary, chunk by chunk or with every logit at once."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import CrossEntropy, CrossEntropyOutput, LabelSampling
from lswt_core.plugin_api.cross_entropy import (
    Chunking,
    Epilogue,
    chunked_cross_entropy,
    default_chunk_size,
    dense_cross_entropy,
)
from lswt_core.plugin_api.token_scores import score_tile


class Chunked(CrossEntropy):
    """Logits of ``chunk`` tokens at a time, which the forward pass turns where they are into their
    gradient, and that at once into the states' (Hsu et al. 2024, arXiv 2410.10989): they are
    computed once and never kept. A frozen table takes two products, one that learns takes three.

    0 is what suits the device: 256 tokens on a CPU, 1,024 elsewhere and where the table learns.
    Where blocks are compiled, so is what is done with a chunk.
    """

    name = "chunked"
    citation = """@article{hsu2024liger,
  title={Liger Kernel: Efficient Triton Kernels for LLM Training}, author={Hsu, Pin-Lun and Dai, Yun and Kothapalli, Vignesh and others},
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
    ) -> CrossEntropyOutput:
        """The score of z [B, T, d_vocab] by a table [V, d_vocab] against labels [B, T]."""
        chunking = Chunking(self.size(z.device.type, table), self.epilogue)
        return chunked_cross_entropy(
            z, table, labels, draws, logsumexp=logsumexp, chunking=chunking
        )

    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        """A chunk's."""
        return min(self.size(device, table), tokens) * len(table)

    def size(self, device: str, table: Tensor) -> int:
        """Tokens of a chunk."""
        return self.chunk or default_chunk_size(device, trained=table.requires_grad)

    def compile_kernels(self) -> None:
        """One pass over a chunk's logits instead of several; sizes that change make it one for any
        size.
        """
        self.epilogue = torch.compile(score_tile)


class Dense(CrossEntropy):
    """Every logit of a micro-batch at once, by torch's own cross-entropy: the formula itself.
    50,272 logits of a token take 400 KB and more until its gradient is known.
    """

    name = "dense"

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
        return dense_cross_entropy(z, table, labels, draws, logsumexp=logsumexp)

    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        """All."""
        return tokens * len(table)


@hookimpl
def lswt_components() -> list[type]:
    """Offer both."""
    return [Chunked, Dense]
