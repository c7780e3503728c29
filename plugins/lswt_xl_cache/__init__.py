"""Memories after Transformer-XL: the last tokens of every layer, as keys and values or as what
those are projected from.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, KVProjection, Memory, State

TRANSFORMER_XL = """@inproceedings{dai2019transformer,
  title={Transformer-XL: Attentive Language Models beyond a Fixed-Length Context},
  author={Dai, Zihang and Yang, Zhilin and Yang, Yiming and Carbonell, Jaime and Le, Quoc V and Salakhutdinov, Ruslan},
  booktitle={ACL}, year={2019}}"""


class XlCache(Memory):
    """Attend to the last ``length`` tokens before the segment through their keys and values, kept
    from earlier segments.

    After Transformer-XL (Dai et al. 2019, arXiv 1901.02860), which keeps hidden states and projects
    them anew (xl-hidden); here, as in the LSWTransformer, un-rotated keys and values themselves are
    kept, computed with the weights of their own time, without gradient.
    """

    name = "xl-cache"
    is_kv_cache = True
    citation = TRANSFORMER_XL

    def __init__(self, dims: Dims, *, length: Annotated[int, Ge(1), Le(1_048_576)] = 2048) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Put what is remembered before the new segment; remember the last ``length`` keys and
        values of both.
        """
        *others, new = project(x, positions)
        k, v = new.k.detach(), new.v.detach()
        if state is None:
            return [*others, new], {"k": k[:, -self.length :], "v": v[:, -self.length :]}
        # the run may have been continued in another precision
        old_k, old_v = state["k"].to(k.dtype), state["v"].to(v.dtype)
        remembered = KeyValue(
            old_k, old_v, torch.arange(-old_k.shape[1], 0, device=positions.device)
        )
        return [*others, remembered, new], {
            "k": newest(old_k, k, self.length),
            "v": newest(old_v, v, self.length),
        }


class SlidingWindow(XlCache, Memory):
    """Sliding-window attention: every query sees the last ``length`` tokens, itself included, and
    no more.

    After Beltagy et al. 2020 (arXiv 2004.05150), with the rolling cache of Jiang et al. 2023 (arXiv
    2310.06825). With other memories the first query of a segment sees as far back as the memory,
    and the last one a segment further; here every query sees equally far, and logits do not depend
    on how a text is cut into segments, however long it is. Sinks are always seen. One layer looks
    back length - 1 tokens, n layers n times as far. Windows of some layers only are written in
    [layers.SELECTOR.memory].
    """

    name = "window"
    citation = """@article{beltagy2020longformer,
  title={Longformer: The Long-Document Transformer},
  author={Beltagy, Iz and Peters, Matthew E and Cohan, Arman},
  journal={arXiv preprint arXiv:2004.05150}, year={2020}}
@article{jiang2023mistral,
  title={Mistral 7B}, author={Jiang, Albert Q and others},
  journal={arXiv preprint arXiv:2310.06825}, year={2023}}"""

    def __init__(self, dims: Dims, *, length: Annotated[int, Ge(2), Le(1_048_576)] = 2048) -> None:
        super().__init__(dims, length=length - 1)
        self.window = length


class XlHidden(Memory):
    """Transformer-XL's own memory: the layer's last ``length`` inputs, from which keys and values
    are projected anew at every call.

    After Dai et al. 2019 (arXiv 1901.02860, section 3.2). Keys and values are those of the current
    weights, whose gradients also come through the remembered tokens; none flows into what is
    remembered. Inputs are kept as the projections see them, after the layer's norm, which alone is
    of its own time (the authors' code, where it has norms before attention, norms what it keeps
    anew). Half of xl-cache's bytes are kept, and ``length`` more tokens projected at every call,
    also where a call is a single token.
    """

    name = "xl-hidden"
    citation = TRANSFORMER_XL

    def __init__(self, dims: Dims, *, length: Annotated[int, Ge(1), Le(1_048_576)] = 2048) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Project what is remembered and the new segment together; remember the last ``length``
        inputs of both.
        """
        if state is None:
            *others, new = project(x, positions)
            return [*others, new], x[:, -self.length :].detach().to(new.k.dtype)
        # [B, N, M]; kept in the precision of the projections, to which autocast rounds it anyway
        old = state.to(x.dtype)
        size = old.shape[1]
        *others, both = project(
            torch.cat((old, x), dim=1),
            torch.cat((torch.arange(-size, 0, device=positions.device), positions)),
        )
        remembered = KeyValue(
            both.k[:, :size], both.v[:, :size], torch.arange(-size, 0, device=positions.device)
        )
        new = KeyValue(both.k[:, size:], both.v[:, size:], positions)
        return [*others, remembered, new], newest(old, x.detach(), self.length).to(both.k.dtype)


def newest(old: Tensor, new: Tensor, length: int) -> Tensor:
    """The last ``length`` of old and new along dimension 1; no copy when the new ones are enough."""
    kept = length - new.shape[1]
    return torch.cat((old[:, -kept:], new), dim=1) if kept > 0 else new[:, -length:]


@hookimpl
def lswt_components() -> list[type]:
    """Offer memories after Transformer-XL."""
    return [XlCache, SlidingWindow, XlHidden]
