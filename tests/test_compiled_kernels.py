"""What ``compile_kernels`` compiles computes what it computed before. The tracing alone is tested
where it suffices: no compiler of C++ is needed.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial

import lswt_simctg
import pytest
import torch
from helpers import described, distance, offered
from lswt_simctg import SimCtg, dense, valid_pairs
from optimizer_parts import drive, small_model
from torch._dynamo.utils import counters

from lswt_core.interfaces import Batch, Component, Dims, Optimizer, Output
from lswt_core.model.build import build_model, materialise
from lswt_core.model.components import build_optimizer
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

CPU = torch.device("cpu")
REGISTRY = Registry()
OPTIMIZERS = [
    cls for cls in offered("optimizer") if cls.compile_kernels is not Component.compile_kernels
]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its code generator."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("build", OPTIMIZERS, ids=described)
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_compiled_update_is_the_update_whatever_the_rate(
    build: type[Optimizer], moments: str
) -> None:
    has_moments = "moments" in build.__init__.__kwdefaults__
    options = {"moments": moments} if has_moments else {}
    plain, fused = small_model(), small_model()
    optimizers = [build(params, **options) for params in (plain, fused)]
    optimizers[1].compile_kernels()
    for step in range(4):
        for optimizer, params in zip(optimizers, (plain, fused), strict=True):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            drive(optimizer, params, range(step, step + 1))
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)  # lr * update is rounded on its own
    for p, q in zip(plain, fused, strict=True):
        for key, kept in optimizers[0].state[p].items():
            torch.testing.assert_close(optimizers[1].state[q][key], kept)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_hinges_are_the_formula(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lswt_simctg, "BLOCK", 5)
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(2, 33, 4, dtype=torch.float64, generator=generator).requires_grad_()
    ids = torch.zeros(2, 33, dtype=torch.int64)
    valid = torch.rand(2, 33, generator=generator) < (0.7 if padded else 2)
    loss = SimCtg(Dims(4, 1, 4, 1), margin=0.9)
    loss.compile_kernels()
    actual = loss(Output(states), Batch(ids, ids, valid if padded else None)).total
    expected = dense(states, 0.9, valid, valid_pairs(valid))
    assert distance(actual, expected) < 1e-12
    slopes = [torch.autograd.grad(0.7 * total, states)[0] for total in (actual, expected)]
    assert distance(*slopes) < 1e-12
    assert counters["stats"]["unique_graphs"] <= 3, "not one for each of the seven blocks"
    with torch.no_grad():
        alone = loss(Output(states), Batch(ids, ids, valid if padded else None)).total
    assert alone.equal(actual)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("build", OPTIMIZERS, ids=described)
def test_a_copy_of_a_compiled_optimizer_is_not_compiled(build: type[Optimizer]) -> None:
    optimizer = build(small_model())
    optimizer.compile_kernels()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.compiled_update is None


@pytest.mark.parametrize("mode, compiled", [("blocks", True), ("auto", False)])
def test_kernels_are_compiled_where_blocks_are(
    mode: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for kind, name in (("optimizer", "sophia-g"), ("loss", "simctg"), ("cross_entropy", "chunked")):
        component = REGISTRY.get(kind, name)
        note = partial(seen.append, name)
        monkeypatch.setattr(component, "compile_kernels", lambda self, note=note: note())
    shape = ["model.d_model=8", "model.n_layers=1", "model.n_heads=2", "embedding.vocab_size=20"]
    shape += ["embedding.d_vocab=8", f"train.compile={mode}"]
    recipe = Recipe.load("quickstart", shape, registry=REGISTRY)
    loss = build_model(recipe, REGISTRY, device=CPU, dtype=torch.float32).loss
    build_optimizer(recipe, REGISTRY, loss)
    assert not seen  # on the meta device, as plans are made
    materialise(loss, recipe, CPU)
    build_optimizer(recipe, REGISTRY, loss)
    assert set(seen) == ({"sophia-g", "simctg", "chunked"} if compiled else set())
