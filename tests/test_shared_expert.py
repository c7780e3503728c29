"""The feed-forward layer beside another one."""

from __future__ import annotations

from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
from helpers import DIMS, distance, stream, tiny, tokens
from lswt_gelu import Gelu
from lswt_mlp import GatedLinearUnit
from lswt_shared_expert import SharedExpert
from lswt_swiglu import SwiGlu
from lswt_xl_cache import XlCache
from torch import Tensor

from lswt_core.interfaces import (
    Dims,
    FeedForward,
    LayerContext,
    LayerOutput,
    LossSum,
    StatefulFeedForward,
)


def random_layer(seed: int = 0, **options: Any) -> Any:
    layer = SharedExpert(DIMS, **options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def context() -> LayerContext:
    return LayerContext(torch.arange(3), None, None, {})  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_two_layers_of_one_kind_are_the_layer_of_the_whole_width(share: float) -> None:
    def plain(dims: Dims) -> FeedForward:
        return SwiGlu(dims, bias=False)

    both = random_layer(shared=plain, routed=plain, shared_width=share)
    parts = (both.shared, both.routed)
    assert both.shared.fc2.in_features == share * DIMS.d_ffn
    halves = [part.fc1.weight.chunk(2) for part in parts]
    fc1 = torch.cat([half[i] for i in (0, 1) for half in halves])  # values, then gates
    fc2 = torch.cat([part.fc2.weight for part in parts], dim=1)
    x = torch.randn(2, 3, DIMS.d_model, dtype=torch.float64)
    value, gate = (x @ fc1.T).chunk(2, dim=-1)
    whole = (value * gate * torch.sigmoid(gate)) @ fc2.T
    assert distance(both(x, None, context()).x, whole) < 1e-12


def test_it_is_the_sum_of_two_different_layers() -> None:
    both = random_layer(shared=Gelu, routed=GatedLinearUnit)
    x = torch.randn(2, 3, DIMS.d_model, dtype=torch.float64)
    out = both(x, None, context())
    assert distance(out.x, both.shared(x) + both.routed(x)) < 1e-12
    assert out.state is None and not out.losses and both.reach == 0


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_layer_without_hidden_units_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="without hidden units"):
        SharedExpert(DIMS, shared=Gelu, routed=Gelu, shared_width=share)


class Previous(StatefulFeedForward):
    """The token before, and a loss term."""

    name = "previous"
    reach = 1
    loss_weights = MappingProxyType({"size": 0.1})

    def forward(  # type: ignore[override]
        self, x: Tensor, state: Any, context: LayerContext
    ) -> LayerOutput:
        before = torch.zeros_like(x[:, :1]) if state is None else state
        shifted = torch.cat((before, x[:, :-1]), dim=1)
        loss = LossSum(x.square().sum(), torch.tensor(x.shape[0] * x.shape[1]))
        return LayerOutput(shifted, x[:, -1:], losses={"size": loss})


def pair(dims: Dims) -> FeedForward:
    return SharedExpert(dims, shared=Gelu, routed=Previous)


def test_state_and_loss_terms_of_its_parts_pass_through() -> None:
    both = random_layer(shared=Gelu, routed=Previous)
    assert both.reach == 1
    x = torch.randn(2, 3, DIMS.d_model, dtype=torch.float64)
    out = both(x, None, context())
    assert set(out.state) == {"routed"} and set(out.losses) == {"size"}
    assert out.losses["size"].total == x.square().sum()
    following = both(x, out.state, context()).x - both.shared(x)
    assert distance(following[:, 0], x[:, -1]) < 1e-12


def test_a_stream_is_read_as_a_whole_or_in_pieces() -> None:
    decoder, ids = tiny(ffn=pair, memories={"xl": partial(XlCache, length=16)}), tokens(2, 9)
    for size in (1, 4):
        assert distance(stream(decoder, ids, size), stream(decoder, ids, 9)) < 1e-10
