"""A head whose logits have a table of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims
from lswt_core.plugin_api.lm_head import LMHead
from lswt_core.plugin_api.plain_modules import is_plain_linear


class Untied(LMHead):
    """The default head with a second table [V, d_vocab], ``unembedding``, for logits: they are
    ``unembedding(output(states))`` (GPT-NeoX, Black et al. 2022, arXiv 2204.06745, unties the two).

    What else the tied head has keeps its name and initial values. ``embedding.warm_start`` fills
    both tables with the same rows, so that the model starts as the tied one;
    ``embedding.trainable = false`` freezes the input's table alone. The output's table does not
    decay, as the tied one does not; its learning rate is that of [groups.projections].
    ``soft_cap`` caps the logits as head "soft-cap" does; None: they are not capped.
    """

    name = "untied"
    citation = """@inproceedings{black2022gptneox,
  title={GPT-NeoX-20B: An Open-Source Autoregressive Language Model},
  author={Black, Sid and Biderman, Stella and Hallahan, Eric and Anthony, Quentin and Gao, Leo and
    Golding, Laurence and He, Horace and Leahy, Connor and McDonell, Kyle and Phang, Jason and
    others},
  booktitle={BigScience Workshop at ACL}, year={2022}, note={arXiv 2204.06745}}"""

    unembedding: nn.Linear

    def __init__(self, dims: Dims, *, soft_cap: Annotated[float, Gt(0)] | None = None) -> None:
        super().__init__(dims)
        self.soft_cap = soft_cap
        self.set_output_layer(nn.Linear(dims.d_vocab, dims.vocab_size, bias=False))

    def unembed(self, z: Tensor) -> Tensor:
        """Projected states z [B, T, d_vocab] -> logits [B, T, V] before the cap."""
        logits: Tensor = self.unembedding(z)
        return logits

    def output_table(self, z: Tensor) -> Tensor:
        """The rows [V, d_vocab] that projected states z are multiplied by. If the layer is more
        than its weight (an adapter, quantised, offloaded), they are what it makes of unit vectors.
        """
        if is_plain_linear(self.unembedding):
            return self.unembedding.weight
        unit_vectors = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        columns: Tensor = self.unembedding(unit_vectors)
        return columns.T

    def pretrained_tables(self) -> Sequence[Tensor]:
        """Both tables."""
        return [self.table.weight, self.unembedding.weight]

    def output_layer(self) -> nn.Module:
        """The layer of the output's table."""
        return self.unembedding

    def set_output_layer(self, layer: nn.Module) -> None:
        """Replace the layer of the output's table."""
        layer.no_weight_decay = ("weight",)  # type: ignore[assignment]
        self.unembedding = layer  # type: ignore[assignment]


@hookimpl
def lswt_components() -> list[type]:
    """Offer the untied head."""
    return [Untied]
