"""The mixture of experts against a loop over tokens and experts, its losses against the papers'
formulas, and what plan says of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers import DIMS, context_of, distance, tiny
from lswt_moe import MixtureOfExperts
from lswt_moe.grouped import grouped_linear, grouped_outer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lswt_core.budget import budget
from lswt_core.distributed.world import World
from lswt_core.interfaces import IGNORE, Batch, Unsupported
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layer_of(**options: Any) -> Any:
    """A layer in float64, whose router is far from indifferent."""
    return tiny(ffn=partial(MixtureOfExperts, **options)).blocks[0].ffn


def run(layer: Any, x: Tensor) -> Any:
    return layer(x, None, context_of(x.shape[1], torch.nn.Identity()))  # type: ignore[arg-type]


def by_token(layer: Any, x: Tensor) -> list[Tensor]:
    """Outputs and both losses of x [B, T, M], token by token and expert by expert."""
    n_experts, top_k, length = layer.n_experts, layer.top_k, x.shape[1]
    out, balance, z = torch.zeros_like(x), torch.zeros(()), torch.zeros(())
    for row, text in enumerate(x):
        sent, likely = [0] * n_experts, torch.zeros(n_experts)
        for t, token in enumerate(text):
            exps = torch.exp(layer.router.weight @ token)
            p = exps / exps.sum()
            best = sorted(range(n_experts), key=p.detach().tolist().__getitem__)[-top_k:]
            total = sum(p[e] for e in best) if layer.normalise else 1.0
            for e in best:
                value, gate = (layer.experts.fc1[e] @ token).chunk(2)
                hidden = value * gate * gate.sigmoid()
                out[row, t] += p[e] / total * (layer.experts.fc2[e] @ hidden)
                sent[e] += 1
            likely = likely + p / length
            z = z + exps.sum().log() ** 2
        f = [n_experts / (top_k * length) * one for one in sent]
        balance = balance + sum(a * b for a, b in zip(f, likely, strict=True))
    return [out, balance, z]


@pytest.mark.parametrize(
    "n_experts, top_k, normalise", [(5, 2, True), (4, 3, False), (6, 1, False)]
)
def test_it_is_the_sum_over_the_chosen_experts(n_experts: int, top_k: int, normalise: bool) -> None:
    layer = layer_of(n_experts=n_experts, top_k=top_k, normalise=normalise, width=7)
    x = normal(2, 6, DIMS.d_model).requires_grad_()
    result = run(layer, x)
    outputs = [result.x, *(result.losses[name].total for name in ("router_balance", "router_z"))]
    for one, expected in zip(outputs, by_token(layer, x), strict=True):
        assert distance(one, expected) < 1e-11
        weights = [x, layer.router.weight, *(layer.experts.parameters() if one.ndim else ())]
        slopes = [
            torch.autograd.grad(y.square().sum(), weights, retain_graph=True)
            for y in (one, expected)
        ]
        assert all(distance(*pair) < 1e-9 for pair in zip(*slopes, strict=True))
    assert result.state is None


def test_one_expert_is_a_dense_layer_whose_losses_say_nothing() -> None:
    layer, x = layer_of(n_experts=1, top_k=1), normal(2, 6, DIMS.d_model)
    value, gate = (x @ layer.experts.fc1[0].T).chunk(2, -1)
    assert (
        distance(run(layer, x).x, (value * gate * gate.sigmoid()) @ layer.experts.fc2[0].T) < 1e-12
    )
    assert distance(run(layer, x).losses["router_balance"].total, torch.tensor(2.0)) < 1e-12


def test_the_balance_loss_is_least_where_tokens_are_spread_evenly() -> None:
    layer, x = layer_of(n_experts=2, top_k=1), torch.zeros(1, 4, DIMS.d_model).double()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0], layer.router.weight[1, 0] = 5.0, -5.0
    x[0, :, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    even, uneven = (
        float(run(layer, y).losses["router_balance"].total.detach()) for y in (x, x.abs())
    )
    assert even == pytest.approx(1, abs=1e-3) and uneven == pytest.approx(2, abs=1e-3)


def test_counts_are_rows_and_tokens_whatever_is_predicted() -> None:
    layer = layer_of(balance_weight=0.3, z_weight=0.0)
    assert layer.loss_weights == {"router_balance": 0.3}
    layer = layer_of()
    ids = torch.zeros(3, 5, dtype=torch.int64)
    batch = Batch(ids, ids.masked_fill(ids == 0, IGNORE))
    losses = run(layer, normal(3, 5, DIMS.d_model)).losses
    counts = {name: int(layer.loss_count(name, batch)) for name in losses}
    assert counts == {name: int(term.count) for name, term in losses.items()}
    assert counts == {"router_balance": 3, "router_z": 15}


def test_too_few_experts_are_refused() -> None:
    with pytest.raises(Unsupported, match="2 experts, of which no token can use 3"):
        layer_of(n_experts=2, top_k=3)


# ---------- the grouped product


def test_the_grouped_product_has_first_and_second_derivatives_also_of_idle_experts() -> None:
    expert = torch.tensor([0, 0, 2, 2, 2, 3])
    x, weight = normal(6, 3).requires_grad_(), normal(4, 2, 3, seed=1).requires_grad_()
    y = normal(6, 2, seed=2).requires_grad_()
    expected = torch.stack([weight[e] @ row for e, row in zip(expert, x, strict=True)])
    assert distance(grouped_linear(x, weight, expert), expected) < 1e-12
    few = torch.tensor([1, 3])  # no more rows than experts: another way
    assert (
        distance(
            grouped_linear(x[:2], weight, few), torch.stack([weight[1] @ x[0], weight[3] @ x[1]])
        )
        < 1e-12
    )
    product, outer = (
        partial(grouped_linear, expert=expert),
        partial(grouped_outer, expert=expert, n_experts=4),
    )
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(product, (x, weight)) and check(outer, (y, x))
    assert not outer(y, x)[1].any()


def test_flops_are_those_of_the_rows_whoever_takes_them() -> None:
    x = torch.empty(6, 3, device="meta", requires_grad=True)
    weight = torch.empty(4, 2, 3, device="meta", requires_grad=True)
    expert = torch.empty(6, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        grouped_linear(x, weight, expert).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 6 * 3 * 2


# ---------- plan


def test_plan_counts_active_parameters_and_their_work() -> None:
    tables: dict[str, Any] = {
        "model": {"d_model": 16, "n_heads": 2, "n_layers": 7, "d_ffn": 24},
        "embedding": {"vocab_size": 64, "d_vocab": 8},
        "optimizer": {"use": "adamw"},
        "train": {"steps": 1, "batch_size": 2, "seq_len": 16},
    }
    moe = {"use": "moe", "n_experts": 6, "top_k": 2}
    dense, sparse = (
        budget(Recipe.from_dict(tables | {"ffn": ffn}), Registry(), World())
        for ffn in ({"use": "swiglu", "bias": False}, moe)
    )
    router, expert = 16 * 6, 3 * 16 * 12
    assert sparse.total == dense.total + 7 * (router + 6 * expert - 3 * 16 * 24)
    assert sparse.active == sparse.total - 7 * 4 * expert == dense.active + 7 * router
    assert dense.active == dense.total and not sparse.unknown
    assert sparse.flops is not None and dense.flops is not None
    gained = {k: n - dense.flops.forward[k] for k, n in sparse.flops.forward.items()}
    assert gained == {k: 7 * 2 * router * (k == "feed-forward") for k in gained}
    assert sparse.flops.train == dense.flops.train + 3 * 7 * 2 * router
    assert sparse.flops.six_n == dense.flops.six_n + 6 * 7 * router


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_fused_kernel_gives_what_the_loop_gives() -> None:
    expert = torch.arange(64).div(10, rounding_mode="floor").clamp(max=4)  # experts 5 to 7 idle
    x, weight = normal(64, 16), normal(8, 32, 16, seed=1)
    pairs = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        given = [t.to(device, dtype).requires_grad_() for t in (x, weight)]
        out = grouped_linear(*given, expert.to(device))
        out.square().sum().backward()
        pairs.append([out, *(t.grad for t in given)])
    for expected, fused in zip(*pairs, strict=True):
        assert distance(fused.cpu().double(), expected) < 0.02 * float(expected.abs().max())
