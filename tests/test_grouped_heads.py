"""Grouped key/value heads: a model whose heads share keys and values is the model whose projections
repeat them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import DIMS, distance, slow_unless, stream, tiny, tokens
from lswt_blocked import Blocked
from lswt_compressed import Compressed
from lswt_eager import Eager
from lswt_qk_norm import RmsHeadNorm
from lswt_registers import Registers
from lswt_sdpa import Sdpa
from lswt_sinks import SinkLogit, SoftmaxOffByOne
from lswt_xl_cache import SlidingWindow, XlCache, XlHidden
from torch import Tensor, nn

from lswt_core.budget import budget
from lswt_core.distributed.world import World
from lswt_core.interfaces import AttentionBackend, Dims
from lswt_core.model.build import build_model
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.pytree import tree_leaves
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

SHARED = 2
GROUPED = DIMS._replace(n_heads=4, queries_per_kv=SHARED)
BACKENDS: dict[str, Callable[[Dims], AttentionBackend]] = {
    "eager": Eager,
    "sdpa": Sdpa,
    "joint": partial(Sdpa, method="joint"),
    "blocked": Blocked,
}
SINKS = {"sink": SinkLogit, "one": SoftmaxOffByOne, "registers": partial(Registers, count=3)}
MEMORIES: dict[str, dict[str, Any]] = {
    "xl-cache": SINKS | {"xl": partial(XlCache, length=9)},
    "xl-hidden": {"xl": partial(XlHidden, length=9)},
    "window": {"xl": partial(SlidingWindow, length=5)},
    "compressed": {"xl": partial(Compressed, length=4, slots=3, rate=2)},
}
PAIRS = [(backend, memory) for backend in BACKENDS for memory in MEMORIES]
KEPT = [(backend, "xl-cache") for backend in BACKENDS] + [("eager", memory) for memory in MEMORIES]


def repeated(parameter: Tensor, shared: Tensor) -> Tensor:
    """A parameter of key/value heads for every query head that reads them, of the shape of
    ``parameter``.
    """
    if shared.shape == parameter.shape:
        return shared
    sizes = zip(parameter.shape, shared.shape, strict=True)
    dim = next(i for i, (size, own) in enumerate(sizes) if size != own)
    heads = shared.unflatten(dim, (GROUPED.n_kv_heads, -1))
    return heads.repeat_interleave(SHARED, dim).flatten(dim, dim + 1)


def twins(**parts: Any) -> tuple[Decoder, Decoder]:
    """A model with grouped heads, and one whose key/value heads are repeated."""
    grouped = tiny(dims=GROUPED, **parts)
    plain = tiny(dims=GROUPED._replace(queries_per_kv=1), **parts)
    with torch.no_grad():
        for (name, parameter), shared in zip(
            plain.named_parameters(), grouped.parameters(), strict=True
        ):
            if name.endswith("sink.logits"):
                nn.init.normal_(shared)
            parameter.copy_(repeated(parameter, shared))
    return grouped, plain


@pytest.mark.parametrize("pair", slow_unless(KEPT, PAIRS), ids="-".join)
@pytest.mark.parametrize("documents", [False, True])
def test_it_is_the_model_with_repeated_heads(pair: tuple[str, str], documents: bool) -> None:
    backend, memory = pair
    grouped, plain = twins(
        memories=MEMORIES[memory], attention=BACKENDS[backend], qk_norm=RmsHeadNorm
    )
    ids = tokens(2, 12)
    first_visible = torch.arange(12).div(4, rounding_mode="floor")[None] * 4 if documents else None
    hidden, expected = (stream(model, ids, 6, first_visible) for model in (grouped, plain))
    assert distance(hidden, expected) < 1e-12
    (hidden.square().sum() + expected.square().sum()).backward()
    leaves = []
    for (_, parameter), shared in zip(plain.named_parameters(), grouped.parameters(), strict=True):
        if parameter.grad is None:  # of what makes logits
            assert shared.grad is None
            continue
        leaf = shared.detach().clone().requires_grad_()
        (summed,) = torch.autograd.grad(repeated(parameter, leaf), leaf, parameter.grad)
        leaves.append(distance(summed, shared.grad))
    assert max(leaves) < 1e-10


def test_states_are_as_much_smaller() -> None:
    grouped, plain = twins(memories=MEMORIES["xl-cache"])
    sizes = [
        sum(leaf.numel() for leaf in tree_leaves(model(tokens(2, 9))[1]))
        for model in (grouped, plain)
    ]
    assert SHARED * sizes[0] == sizes[1]


def test_a_plan_counts_it() -> None:
    """Half of the memory, and half of two projections; every query still sees every key."""
    plans = []
    for kv_heads in (4, 2):
        recipe = Recipe.from_dict(
            {
                "model": {"d_model": 32, "n_heads": 4, "n_kv_heads": kv_heads, "n_layers": 2},
                "embedding": {"vocab_size": 61, "d_vocab": 24},
                "memory": {"xl": {"use": "xl-cache", "length": 16}},
                "positional": {"use": "t5"},
                "train": {"steps": 1, "batch_size": 2, "seq_len": 16},
            }
        )
        model = build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float32)
        plans.append((recipe, model))
    flops, memory = [], []
    for recipe, _ in plans:
        plan = budget(recipe, Registry(), World())
        flops.append(plan.flops.forward)
        memory.append(plan.memory.parts["memories"])
    assert memory[0] == 2 * memory[1]
    scores, projections = "attention scores", "attention projections"
    assert flops[0][scores] == flops[1][scores]
    assert flops[0][projections] - flops[1][projections] == 2 * 2 * (2 * 32 * 16)
