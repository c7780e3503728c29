"""Memories of the last tokens of every layer: KV cache, sliding window, and Transformer-XL's hidden
states.
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
  author={Dai, Zihang and Yang, Zhilin and Yang, Yiming and Carbonell, Jaime and
    Le, Quoc V and Salakhutdinov, Ruslan},
  booktitle={ACL}, year={2019}}"""


class XlCache(Memory):
    """A KV cache: attend to the last ``length`` tokens before the segment.

    After Transformer-XL (Dai et al. 2019, arXiv 1901.02860), which caches hidden states and
    projects them again (xl-hidden). As in the LSWTransformer, un-rotated keys and values are
    cached, without gradient, as the weights of their step projected them.
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
        """Put the cache before the new segment; cache the last ``length`` keys and values."""
        *others, new = project(x, positions)
        kept = {"k": new.k.detach(), "v": new.v.detach()}
        if new.features is not None:
            kept["features"] = new.features.detach()
        if state is None:
            return [*others, new], {name: t[:, -self.length :] for name, t in kept.items()}
        # another dtype if a run was resumed in another precision
        old = {name: state[name].to(t.dtype) for name, t in kept.items()}
        old_positions = torch.arange(-old["k"].shape[1], 0, device=positions.device)
        cached = KeyValue(old["k"], old["v"], old_positions, features=old.get("features"))
        next_state = {name: last_tokens(old[name], t, self.length) for name, t in kept.items()}
        return [*others, cached, new], next_state


class SlidingWindow(XlCache, Memory):
    """Sliding-window attention: every query sees the last ``length`` tokens, itself included.

    After Beltagy et al. 2020 (arXiv 2004.05150), with the rolling cache of Jiang et al. 2023 (arXiv
    2310.06825). With other memories the last query of a segment sees a segment more than the first;
    here every query sees equally far, and logits do not depend on how a text is split into
    segments. Sinks are always visible. One layer reaches back length - 1 tokens, n layers n times
    as far. For windows in some layers only, use [layers.SELECTOR.memory].
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
    """Transformer-XL's memory: cache the layer's last ``length`` inputs, and project keys and
    values from them at every call.

    After Dai et al. 2019 (arXiv 1901.02860, section 3.2). Keys and values use the current weights,
    which get gradients through the cached tokens; the cache itself gets none. Inputs are cached
    after the layer's norm (the authors' code, with pre-norm, caches before it and norms again).
    Takes half of xl-cache's memory, and projects ``length`` more tokens at every call, even of a
    single token.
    """

    name = "xl-hidden"
    citation = TRANSFORMER_XL

    def __init__(self, dims: Dims, *, length: Annotated[int, Ge(1), Le(1_048_576)] = 2048) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Project the cache and the new segment together; cache the last ``length`` inputs."""
        if state is None:
            *others, new = project(x, positions)
            return [*others, new], x[:, -self.length :].detach().to(new.k.dtype)
        # [B, N, M]; cached in the dtype of the projections, to which autocast rounds it anyway
        cached = state.to(x.dtype)
        size = cached.shape[1]
        old_positions = torch.arange(-size, 0, device=positions.device)
        *others, both = project(
            torch.cat((cached, x), dim=1), torch.cat((old_positions, positions))
        )
        old = select_tokens(both, slice(None, size), old_positions)
        new = select_tokens(both, slice(size, None), positions)
        next_state = last_tokens(cached, x.detach(), self.length).to(both.k.dtype)
        return [*others, old, new], next_state


def select_tokens(block: KeyValue, tokens: slice, positions: Tensor) -> KeyValue:
    """Some tokens of a block, at their positions."""
    features = None if block.features is None else block.features[:, tokens]
    return KeyValue(block.k[:, tokens], block.v[:, tokens], positions, features=features)


def last_tokens(old: Tensor, new: Tensor, length: int) -> Tensor:
    """The last ``length`` of old and new tokens, dimension 1; no copy if the new ones suffice."""
    missing = length - new.shape[1]
    if missing <= 0:
        return new[:, -length:]
    return torch.cat((old[:, -missing:], new), dim=1)


@hookimpl
def lswt_components() -> list[type]:
    """Offer memories of the last tokens."""
    return [XlCache, SlidingWindow, XlHidden]
