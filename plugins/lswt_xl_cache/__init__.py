"""The LSWTransformer's Transformer-XL cache: the last keys and values of every layer, un-rotated and detached."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, Memory, Project, Segment, State


class XlCache(Memory):
    """Attend to the last ``length`` tokens before the segment through their keys and values, kept from earlier segments.

    After Transformer-XL (Dai et al. 2019, arXiv 1901.02860), which keeps hidden states and projects them anew; here, as in the
    LSWTransformer, keys and values themselves are kept, computed with the weights of their own time, without gradient.
    """

    name = "xl-cache"
    citation = """@inproceedings{dai2019transformer,
  title={Transformer-XL: Attentive Language Models beyond a Fixed-Length Context},
  author={Dai, Zihang and Yang, Zhilin and Yang, Yiming and Carbonell, Jaime and Le, Quoc V and Salakhutdinov, Ruslan},
  booktitle={ACL}, year={2019}}"""

    def __init__(self, dims: Dims, *, length: Annotated[int, Ge(1)] = 2048) -> None:
        super().__init__(dims)
        self.length = length

    def forward(self, x: Tensor, at: Tensor, state: State, project: Project) -> tuple[list[Segment], State]:
        """Put what is remembered before the new segment; remember the last ``length`` keys and values of both."""
        *others, new = project(x, at)
        k, v = new.k.detach(), new.v.detach()
        if state is None:
            return [*others, new], {"k": k[:, -self.length :], "v": v[:, -self.length :]}
        old_k, old_v = state["k"].to(k.dtype), state["v"].to(v.dtype)  # the run may have been continued in another precision
        remembered = Segment(old_k, old_v, torch.arange(-old_k.shape[1], 0, device=at.device))
        return [*others, remembered, new], {"k": self.append(old_k, k), "v": self.append(old_v, v)}

    def append(self, old: Tensor, new: Tensor) -> Tensor:
        """The last ``length`` of old and new along dimension 1; no copy when the new ones fill the memory."""
        kept = self.length - new.shape[1]
        return torch.cat((old[:, -kept:], new), dim=1) if kept > 0 else new[:, -self.length :]


@hookimpl
def lswt_components() -> list[type]:
    """Offer the key/value cache."""
    return [XlCache]
