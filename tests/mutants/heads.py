"""Heads with one mistake each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lswt_core.interfaces import CrossEntropyOutput, Dims
from lswt_core.plugin_api.lm_head import LMHead
from mutants.expected import CITATION, caught_by


@caught_by("scores")
class UncappedScore(LMHead):
    """Caps logits when it generates and not when it is trained."""

    name, citation = "uncapped-score", CITATION

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.soft_cap = 2.0

    def score(self, *args: Any, **options: Any) -> CrossEntropyOutput:
        cap, self.soft_cap = self.soft_cap, None
        try:
            return super().score(*args, **options)
        finally:
            self.soft_cap = cap


@caught_by("logits")
class CentredOverTokens(LMHead):
    """The mean of all tokens' states is taken off."""

    name, citation = "centred-over-tokens", CITATION

    def logits(self, states: Tensor) -> Tensor:
        return super().logits(states - states.mean(1, keepdim=True))


@caught_by("frozen embedding")
class NeverFrozen(LMHead):
    """The table goes on learning."""

    name, citation = "never-frozen", CITATION

    def freeze(self) -> None:
        self.table.half()
