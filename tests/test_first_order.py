"""AdamW, LaProp, sign momentum and Lion against replays of other authors' programs and plain formulas."""

from __future__ import annotations

import pytest
import torch
from lswt_adamw import AdamW
from lswt_laprop import LaProp
from lswt_sign import Lion, SignMomentum
from lswt_sophia import SophiaG
from optimizer_parts import TOLERANCE, assert_all_close, at, feed, golden_model, gradients_of, load, small_model
from torch import Tensor

from lswt_core.interfaces import Optimizer


def rated(optimizer: Optimizer, lr: float) -> Optimizer:
    """The optimizer at another learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


# Replays of programs by other authors


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, "adamw"), (torch.float64, "adamw_f64")])
def test_adamw_replays_with_a_changing_rate(dtype: torch.dtype, key: str) -> None:
    data = load("optimizers/replay.safetensors")
    params, groups = golden_model(data, dtype, decay=0.1)
    optimizer = AdamW(groups, eps=1e-5)
    for step, lr in enumerate(data["lr"].tolist()):
        feed(rated(optimizer, lr), params, at(data, "grad", step))
        assert_all_close(params, at(data, key, step), TOLERANCE[dtype])


@pytest.mark.parametrize("foreach", [True, False])
def test_adamw_is_torchs_bit_for_bit(foreach: bool) -> None:
    data = load("optimizers/replay.safetensors")
    params, groups = golden_model(data, torch.float32, decay=0.1)
    others, other_groups = golden_model(data, torch.float32, decay=0.1)
    ours = AdamW(groups, lr=1e-3, foreach=foreach)
    torchs = torch.optim.AdamW(other_groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=foreach)
    for step in range(20):
        feed(ours, params, at(data, "grad", step))
        feed(torchs, others, at(data, "grad", step))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_laprop_replays_its_authors_code_with_a_changing_rate() -> None:
    data = load("optimizers/replay.safetensors")
    params, groups = golden_model(data, torch.float32, decay=0.1)
    optimizer = LaProp(groups, eps=1e-5)
    for step, lr in enumerate(data["lr"].tolist()):
        feed(rated(optimizer, lr), params, at(data, "grad", step))
        assert_all_close(params, at(data, "laprop", step), TOLERANCE[torch.float32])
    for i, (p, name) in enumerate(zip(params, ("w1", "b1", "w2", "b2"), strict=True)):
        assert_all_close([optimizer.state[p]["momentum"]], [data[f"laprop_exp_avg/{name}"]], 1e-7)
        assert_all_close([optimizer.state[p]["square"]], [data[f"laprop_exp_avg_sq/{name}"]], 1e-6)
        assert optimizer.state[p]["rate"] == pytest.approx(float(data["laprop_exp_avg_lr"][i]), rel=1e-14)


def test_sign_momentum_replays_the_originals_bit_for_bit() -> None:
    data = load("optimizers/replay.safetensors")
    params, groups = golden_model(data, torch.float32, decay=0.2)
    optimizer = SignMomentum(groups)
    for step, lr in enumerate(data["lr"].tolist()):
        feed(rated(optimizer, lr), params, at(data, "grad", step))
        assert all(torch.equal(a, b) for a, b in zip(params, at(data, "minato", step), strict=True))


def test_sophia_that_never_sees_curvature_is_sign_momentum_bit_for_bit() -> None:
    """What the original's trainer did with Sophia; ours must be told to look away for so long."""
    data = load("optimizers/replay.safetensors")
    params, groups = golden_model(data, torch.float32, decay=0.2)
    optimizer = SophiaG(groups, beta1=0.9, refresh_every=21)
    for step, lr in enumerate(data["lr"].tolist()):
        feed(rated(optimizer, lr), params, at(data, "grad", step))
    assert all(torch.equal(a, b) for a, b in zip(params, at(data, "minato", 19), strict=True))


# Plain formulas in float64

RATES = [3e-3, 1e-2, 0.0, 5e-4, 2e-2, 1e-3]


def trained(optimizer: Optimizer, params: list[Tensor]) -> None:
    for step, lr in enumerate(RATES):
        feed(rated(optimizer, lr), params, [g.double() for g in gradients_of(step)])


def test_laprop_is_its_sums_written_out() -> None:
    params = small_model(torch.float64)
    expected = [p.detach().clone() for p in params]
    trained(LaProp(params, eps=1e-3, weight_decay=0.5), params)
    for i, p in enumerate(expected):
        history = [gradients_of(step)[i].double() for step in range(len(RATES))]
        for t, lr in enumerate(RATES):
            squares = [sum(0.05 * 0.95 ** (s - r) * history[r] ** 2 for r in range(s + 1)) for s in range(t + 1)]
            normed = [history[s] * (1 - 0.95 ** (s + 1)) ** 0.5 / (squares[s] ** 0.5 + 1e-3) for s in range(t + 1)]
            weights = [0.9 ** (t - s) * RATES[s] for s in range(t + 1)]
            p *= 1 - 0.5 * lr
            p -= lr * sum(w * n for w, n in zip(weights, normed, strict=True)) / sum(weights)
    assert_all_close(params, expected, 1e-12)


@pytest.mark.parametrize("build", [SignMomentum, Lion])
def test_sign_steps_are_their_sums_written_out(build: type[Optimizer]) -> None:
    params = small_model(torch.float64)
    expected = [p.detach().clone() for p in params]
    trained(build(params, weight_decay=0.5), params)
    for i, p in enumerate(expected):
        history = [gradients_of(step)[i].double() for step in range(len(RATES))]
        for t, lr in enumerate(RATES):
            if build is Lion:
                past = sum(0.01 * 0.99 ** (t - 1 - s) * history[s] for s in range(t))
                direction = 0.9 * past + 0.1 * history[t]
            else:
                direction = sum(0.1 * 0.9 ** (t - s) * history[s] for s in range(t + 1))
            p *= 1 - 0.5 * lr
            p -= lr * torch.sign(direction)
    assert_all_close(params, expected, 1e-12)


def test_laprop_at_a_constant_rate_takes_a_first_step_of_the_rate() -> None:
    """n = 0.05 g^2 and 1 - b2 = 0.05: the normalised gradient is 1 up to eps, whatever its size."""
    p = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    feed(LaProp([p], lr=1e-2, weight_decay=0.0), [p], [torch.tensor([0.5, 1e-3], dtype=torch.float64)])
    assert p.tolist() == pytest.approx([0.99, 0.99], abs=1e-6)
