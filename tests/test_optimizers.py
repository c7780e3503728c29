"""Optimizers against replays of the authors' programs, closed forms, and what a run asks of every
one of them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

import pytest
import torch
from helpers import described, offered
from optimizer_parts import (
    NAMES,
    TOLERANCE,
    assert_all_close,
    at,
    drive,
    feed,
    golden_model,
    gradients_of,
    load,
    scalar,
    small_model,
)
from torch import Tensor

from lswt_core import Registry
from lswt_core.checkpoint.train_state import optimizer_state, restore_optimizer
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.optimizer import BucketOptimizer
from lswt_core.plugin_api.wrapped_optimizer import WrappedOptimizer

AdamW, LaProp, SignMomentum, Lion, Muon, ScheduleFree = (
    Registry().get("optimizer", name)
    for name in ("adamw", "laprop", "sign-momentum", "lion", "muon", "schedule-free")
)
ALL = pytest.mark.parametrize("build", offered("optimizer"), ids=described)
# SOAP's first update only prepares, and its eigenvectors have no definite signs
PROMPT = pytest.mark.parametrize(
    "build", [cls for cls in offered("optimizer") if cls.name != "soap"], ids=described
)
OURS = pytest.mark.parametrize(
    "build",
    [
        cls
        for cls in offered("optimizer")
        if cls not in (AdamW, Muon, ScheduleFree) and not issubclass(cls, WrappedOptimizer)
    ],
    ids=described,
)


# Replays of programs by other authors


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, "adamw"), (torch.float64, "adamw_f64")])
def test_adamw_replays_with_a_changing_rate(dtype: torch.dtype, key: str) -> None:
    data = load("optimizers/replay.safetensors")
    params, groups = golden_model(data, dtype, decay=0.1)
    optimizer = AdamW(groups, eps=1e-5)
    for step, lr in enumerate(data["lr"].tolist()):
        feed(optimizer, params, at(data, "grad", step), lr)
        assert_all_close(params, at(data, key, step), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_laprop_replays_the_original_with_a_changing_rate(dtype: torch.dtype) -> None:
    """The original computes in float32, whatever the parameters."""
    data = load("optimizers/replay.safetensors")
    params, groups = golden_model(data, dtype, decay=0.1)
    optimizer = LaProp(groups, eps=1e-5)
    for step, lr in enumerate(data["lr"].tolist()):
        feed(optimizer, params, at(data, "grad", step), lr)
        assert_all_close(params, at(data, "laprop", step), 1e-6)
    states = [optimizer.state[p] for p in params]
    assert_all_close(
        [state["momentum"] for state in states],
        [data[f"laprop_exp_avg/{name}"] for name in NAMES],
        1e-8,
    )
    assert_all_close(
        [state["square"] for state in states],
        [data[f"laprop_exp_avg_sq/{name}"] for name in NAMES],
        1e-8,
    )
    assert [state["rate"] for state in states] == pytest.approx(
        data["laprop_exp_avg_lr"].tolist(), rel=1e-12
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sign_momentum_replays_the_original_with_a_changing_rate(dtype: torch.dtype) -> None:
    data = load("optimizers/replay.safetensors")
    params, groups = golden_model(data, dtype, decay=0.2)
    optimizer = SignMomentum(groups)
    for step, lr in enumerate(data["lr"].tolist()):
        feed(optimizer, params, at(data, "grad", step), lr)
        assert_all_close(params, at(data, "minato", step), 1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_torchs_bit_for_bit(fused: bool) -> None:
    data = load("optimizers/replay.safetensors")
    params, groups = golden_model(data, torch.float32, decay=0.1)
    others, other_groups = golden_model(data, torch.float32, decay=0.1)
    ours = AdamW(groups, lr=1e-3, fused=fused)
    torchs = torch.optim.AdamW(other_groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    for step in range(20):
        feed(ours, params, at(data, "grad", step))
        feed(torchs, others, at(data, "grad", step))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


# Closed forms and plain lines


def plain_laprop(
    p: Tensor,
    gradients: Sequence[Tensor],
    rates: Sequence[float],
    decay: float = 0.1,
    eps: float = 1e-8,
) -> Tensor:
    """LaProp as its docstring says it, in float64."""
    p, m, n, rate = p.detach().double(), torch.zeros(p.shape), torch.zeros(p.shape), 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        n = 0.95 * n + 0.05 * g.double() ** 2
        m = 0.9 * m + 0.1 * lr * g.double() / (n.sqrt() + eps) * (1 - 0.95**t) ** 0.5
        rate = 0.9 * rate + 0.1 * lr
        p = p - decay * lr * p
        p = p - m * lr / rate if rate else p
    return p


@pytest.mark.parametrize(
    "rates", [[1e-2] * 6, [0.0, 0.0, 3e-3, 1e-2, 5e-3, 0.0]], ids=["constant", "from 0 to 0"]
)
def test_laprop_is_a_few_plain_lines(rates: list[float]) -> None:
    start, steps = (
        torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        [gradients_of(i)[1] for i in range(6)],
    )
    p = start.clone().requires_grad_()
    optimizer = LaProp([p])
    for g, lr in zip(steps, rates, strict=True):
        feed(optimizer, [p], [g], lr)
    torch.testing.assert_close(p.detach(), plain_laprop(start, steps, rates), rtol=0, atol=1e-12)


def test_laprop_without_a_rate_does_not_move() -> None:
    params = small_model()
    before, optimizer = [p.detach().clone() for p in params], LaProp(params)
    for step, lr in enumerate((0.0, 0.0)):
        feed(optimizer, params, gradients_of(step), lr)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_a_parameter_that_gets_its_first_gradient_late_is_corrected_from_its_own_first_step() -> (
    None
):
    early, late, alone = (torch.ones(3, requires_grad=True) for _ in range(3))
    together, single = LaProp([early, late], lr=1e-2), LaProp([alone], lr=1e-2)
    early.grad = torch.ones(3)
    together.step()
    early.grad = late.grad = alone.grad = torch.tensor([0.5, -2.0, 1.0])
    together.step()
    single.step()
    assert torch.equal(late, alone)


def plain_lion(p: Tensor, gradients: Sequence[Tensor], lr: float, decay: float) -> Tensor:
    """Algorithm 2 of the paper, in float64."""
    p, m = p.detach().double(), torch.zeros(p.shape, dtype=torch.float64)
    for g in gradients:
        update = torch.sign(0.9 * m + 0.1 * g.double())
        p = p - lr * (update + decay * p)
        m = 0.99 * m + 0.01 * g.double()
    return p


def test_lion_is_a_few_plain_lines() -> None:
    (start, _), steps = small_model(torch.float64), [gradients_of(i)[0] for i in range(10)]
    p = start.detach().clone().requires_grad_()
    optimizer = Lion([p], lr=1e-2, weight_decay=0.5)
    for g in steps:
        feed(optimizer, [p], [g])
    torch.testing.assert_close(p.detach(), plain_lion(start, steps, 1e-2, 0.5), rtol=0, atol=1e-12)


def test_lion_by_hand() -> None:
    p, weights = scalar(1.0), []
    optimizer = Lion([p], lr=1e-3, weight_decay=0.0)
    for g in (0.5, -0.2):  # 0.1 * 0.5 > 0; then 0.9 * 0.005 - 0.1 * 0.2 < 0
        feed(optimizer, [p], [torch.tensor([g])])
        weights.append(p.item())
    assert weights == pytest.approx([0.999, 1.000], abs=1e-7)


@pytest.mark.parametrize("build", [SignMomentum, Lion], ids=described)
def test_signs_step_by_the_rate_and_decay_apart(build: type[Optimizer]) -> None:
    decayed, plain = (torch.tensor([2.0, -1.0, 4.0], requires_grad=True) for _ in range(2))
    optimizer = build(
        [{"params": [decayed]}, {"params": [plain], "weight_decay": 0.0}], lr=0.1, weight_decay=0.5
    )
    feed(optimizer, [decayed, plain], [torch.tensor([3.0, -4.0, 0.0])] * 2)
    torch.testing.assert_close(
        decayed.detach(), torch.tensor([2 * 0.95 - 0.1, -0.95 + 0.1, 4 * 0.95])
    )
    torch.testing.assert_close(plain.detach(), torch.tensor([1.9, -0.9, 4.0]))


# What a run asks of every optimizer


@ALL
@pytest.mark.parametrize("cut", [3, 10, 14])
def test_a_saved_state_continues_bit_for_bit(build: type[Optimizer], cut: int) -> None:
    whole = small_model()
    optimizer = build(whole)
    drive(optimizer, whole, range(cut))
    halves, saved = (
        [p.detach().clone().requires_grad_() for p in whole],
        copy.deepcopy(optimizer.state_dict()),
    )
    drive(optimizer, whole, range(cut, 25))
    resumed = build(halves)
    resumed.load_state_dict(saved)
    drive(resumed, halves, range(cut, 25))
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
    assert {k: v.item() for k, v in optimizer.statistics().items()} == {
        k: v.item() for k, v in resumed.statistics().items()
    }


@PROMPT
def test_flipping_signs_commutes_with_the_optimizer(build: type[Optimizer]) -> None:
    plain, flipped = small_model(), small_model()
    signs = [torch.where(g > 0, 1.0, -1.0) for g in gradients_of(3000)]
    with torch.no_grad():
        for p, sign in zip(flipped, signs, strict=True):
            p.mul_(sign)
    drive(build(plain), plain, range(12))
    drive(build(flipped), flipped, range(12), signs)
    assert all(torch.equal(a, b * sign) for a, b, sign in zip(plain, flipped, signs, strict=True))


@PROMPT
def test_parameters_without_gradient_are_left_alone(build: type[Optimizer]) -> None:
    used, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = build([{"params": [used, unused]}], weight_decay=0.5)
    used.grad = torch.ones(3)
    optimizer.step()
    assert (used < 1).all()
    assert torch.equal(unused, torch.ones(3))
    assert unused not in optimizer.state


@PROMPT
def test_a_closure_is_evaluated_with_gradients(build: type[Optimizer]) -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = build([p])

    def closure() -> float:
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (p < 1).all()


@ALL
def test_the_state_can_be_measured_on_the_meta_device(build: type[Optimizer]) -> None:
    params = small_model(device="meta")
    optimizer = build(params)
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    for p in params:
        moments = [
            value
            for value in optimizer.state[p].values()
            if isinstance(value, Tensor) and value.shape == p.shape
        ]
        assert {(value.dtype, value.device.type) for value in moments} == {(torch.float32, "meta")}


@OURS
def test_narrow_parameters_keep_a_float32_state_through_a_save(build: type[Optimizer]) -> None:
    params = small_model(torch.bfloat16)
    optimizer = build(params)
    drive(optimizer, params, range(12))
    resumed = build(params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in params:
        for key, value in optimizer.state[p].items():
            assert not isinstance(value, Tensor) or resumed.state[p][key].dtype == torch.float32
            assert torch.as_tensor(resumed.state[p][key] == value).all()


@ALL
def test_a_checkpoint_holds_the_whole_state(build: type[Optimizer]) -> None:
    """Through the tensors and JSON that a checkpoint consists of."""

    def named(params: list[Tensor]) -> Optimizer:
        return build([{"name": "all", "params": params, "names": ["a", "b"]}])

    params = small_model()
    optimizer = named(params)
    drive(optimizer, params, range(7))
    twins = [p.detach().clone().requires_grad_() for p in params]
    resumed = named(twins)
    tensors, document = optimizer_state(optimizer)
    restore_optimizer(
        resumed,
        {name: tensor.clone() for name, tensor in tensors.items()},
        json.loads(json.dumps(document)),
    )
    drive(optimizer, params, range(7, 14))
    drive(resumed, twins, range(7, 14))
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


BUCKETED = pytest.mark.parametrize(
    "build",
    [cls for cls in offered("optimizer") if issubclass(cls, BucketOptimizer)],
    ids=described,
)


@BUCKETED
@pytest.mark.parametrize("size", [1, 5, 12])
def test_parameters_in_stretches_are_the_whole(
    build: type[Optimizer], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = small_model(), small_model()
    drive(build(whole), whole, range(4))
    monkeypatch.setattr("lswt_core.plugin_api.optimizer.BUCKET_CPU", size)
    drive(build(cut), cut, range(4))
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize("name", ["sophia-g", "sophia-h"])
def test_moments_may_be_kept_in_half_the_memory(name: str) -> None:
    build = Registry().get("optimizer", name)
    wide, narrow = small_model(), small_model()
    optimizers = [build(wide, lr=1e-2), build(narrow, lr=1e-2, moments="bfloat16")]
    for optimizer, params in zip(optimizers, (wide, narrow), strict=True):
        drive(optimizer, params, range(8))
    kept = [optimizers[1].state[p][key] for p in narrow for key in ("momentum", "curvature")]
    assert {moment.dtype for moment in kept} == {torch.bfloat16}
    exact = [optimizers[0].state[p][key] for p in wide for key in ("momentum", "curvature")]
    for a, b in zip(kept, exact, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02 * float(b.abs().max()))
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2)  # eight steps of at most 1e-2 each
    again = small_model()
    other = build(again, lr=1e-2, moments="bfloat16")
    other.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert all(
        torch.equal(other.state[p][key], optimizers[1].state[q][key])
        for p, q in zip(again, narrow, strict=True)
        for key in ("momentum",)
    )
