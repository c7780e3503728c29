"""Both Sophias against replays of other authors' programs, closed forms and exact curvatures."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from lswt_sophia import SophiaG, SophiaH
from optimizer_parts import (
    NAMES,
    TOLERANCE,
    Scripted,
    assert_all_close,
    at,
    drive,
    feed,
    golden_model,
    gradients_of,
    load,
    scalar,
    small_model,
    sophia_g_gaps,
)
from torch import Tensor

from lswt_core.interfaces import Optimizer

# Replays of programs by other authors


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, "param"), (torch.float64, "param_f64")])
def test_sophia_g_replays_the_official_code(dtype: torch.dtype, key: str) -> None:
    assert max(sophia_g_gaps(dtype, key)) <= TOLERANCE[dtype]


def test_unclipped_share_is_the_official_win_rate() -> None:
    data = load("sophia/sophiag_mlp.safetensors")
    params, groups = golden_model(data, torch.float32, decay=0.2)
    optimizer = SophiaG(groups, lr=3e-3)
    for step in range(30):
        feed(optimizer, params, at(data, "grad", step))
        if step % 10 == 9:
            optimizer.refresh(Scripted(params, at(data, "hess_grad", step // 10), tokens=64))
            share = optimizer.statistics()["unclipped_share"]
            torch.testing.assert_close(share.double(), data["win_rate"][step // 10], rtol=1e-6, atol=0)


def estimate(values: Sequence[Tensor]) -> Scripted:
    """An objective under which Hutchinson's estimate comes out as ``values``: Rademacher probes are their own inverses."""
    return Scripted(product=lambda probes: [u * value for u, value in zip(probes, values, strict=True)])


@pytest.mark.parametrize(("gamma", "key"), [(30.0, "pto_p30"), (0.01, "pto")])
def test_sophia_h_replays_pytorch_optimizer(gamma: float, key: str) -> None:
    given, data = load("sophia/sophiag_mlp.safetensors"), load("sophia/sophiah_mlp.safetensors")
    params, groups = golden_model(given, torch.float32, decay=0.2, decay_all=True)
    # It clips m / max(h, p) at p and multiplies by lr: our gamma is its p, our lr its lr * p.
    optimizer = SophiaH(groups, lr=3e-3, gamma=gamma, probe="rademacher")
    for step in range(30):
        if step in (10, 20):
            optimizer.refresh(estimate(at(data, "hess_est", step // 10 - 1)))
        feed(optimizer, params, at(given, "grad", step))
        assert_all_close(params, at(data, f"{key}/param", step), TOLERANCE[torch.float32])


@pytest.mark.parametrize(("gamma", "key"), [(0.01, "levanter"), (30.0, "levanter_g30")])
def test_sophia_h_replays_levanter(gamma: float, key: str) -> None:
    given, data = load("sophia/sophiag_mlp.safetensors"), load("sophia/sophiah_mlp.safetensors")
    params, groups = golden_model(given, torch.float32, decay=0.2, decay_all=True)
    optimizer = SophiaH(groups, lr=3e-3, probe="rademacher")
    for step in range(30):
        correction = 1 - 0.965 ** (step + 1)  # levanter corrects the momentum's bias; dividing by less is the same
        optimizer.gamma, optimizer.eps = gamma * correction, 1e-8 * correction
        if step in (10, 20):
            optimizer.refresh(estimate(at(data, "hess_est", step // 10 - 1)))
        feed(optimizer, params, at(given, "grad", step))
        assert_all_close(params, at(data, f"{key}/param", step), TOLERANCE[torch.float32])
    optimizer.refresh(estimate(at(data, "hess_est", 2)))
    for name, p in zip(NAMES, params, strict=True):
        torch.testing.assert_close(optimizer.state[p]["curvature"], data[f"{key}/h_final/{name}"], rtol=1e-5, atol=0)


# Closed forms


@pytest.mark.parametrize(
    ("momentum", "curvature", "change"),
    [
        (0.02, 1e-6, -4.8828125e-4),
        (0.02, 1e-9, -6e-4),
        (0.02, 0.0, -6e-4),
        (-0.3, 1e-6, 6e-4),
        (-0.02, 1e-6, 4.8828125e-4),
        (0.0, 0.0, 0.0),
    ],
)
def test_sophia_g_steps_by_the_closed_form(momentum: float, curvature: float, change: float) -> None:
    p = scalar(0.0)
    optimizer = SophiaG([p], beta1=0.0, beta2=0.0, weight_decay=0.0)
    optimizer.refresh(Scripted([p], [torch.tensor([math.sqrt(curvature)])], tokens=491_520))
    assert p.grad is None
    feed(optimizer, [p], [torch.tensor([momentum])])
    assert p.item() == pytest.approx(change, rel=1e-6)


@pytest.mark.parametrize(
    ("momentum", "curvature", "change"),
    [(0.1, 20.0, -3e-4), (0.1, 1e-3, -6e-4), (0.1, 0.0, -6e-4), (0.1, -1e-3, -6e-4), (-0.1, -1e3, 6e-4), (0.0, -1.0, 0.0)],
)
def test_sophia_h_never_climbs_where_curvature_is_negative(momentum: float, curvature: float, change: float) -> None:
    p = scalar(0.0)
    optimizer = SophiaH([p], beta1=0.0, beta2=0.0, weight_decay=0.0, probe="rademacher")
    optimizer.refresh(estimate([torch.tensor([curvature])]))
    feed(optimizer, [p], [torch.tensor([momentum])])
    assert p.item() == pytest.approx(change, rel=1e-6)


@pytest.mark.parametrize("build", [SophiaG, SophiaH])
def test_without_curvature_the_step_is_sign_momentum_with_decoupled_decay(build: type[Optimizer]) -> None:
    decayed, plain = (torch.tensor([2.0, -1.0, 4.0], requires_grad=True) for _ in range(2))
    optimizer = build([{"params": [decayed]}, {"params": [plain], "weight_decay": 0.0}], lr=0.1, weight_decay=0.5)
    feed(optimizer, [decayed, plain], [torch.tensor([3.0, -4.0, 0.0])] * 2)
    torch.testing.assert_close(decayed.detach(), torch.tensor([2 * 0.95 - 0.1, -0.95 + 0.1, 4 * 0.95]))
    torch.testing.assert_close(plain.detach(), torch.tensor([1.9, -0.9, 4.0]))
    assert optimizer.statistics()["unclipped_share"] == 0  # the coordinate at rest does not count


def test_unclipped_share_is_measured_right_after_a_refresh() -> None:
    p = torch.zeros(4, requires_grad=True)
    optimizer = SophiaG([p], beta1=0.0, beta2=0.0, rho=1.0)
    assert optimizer.statistics() == {}
    feed(optimizer, [p], [torch.tensor([0.5, -0.5, 0.5, 2.0])])
    assert optimizer.statistics()["unclipped_share"] == 0  # no curvature yet: sign momentum
    optimizer.refresh(Scripted([p], [torch.tensor([1.0, 1.0, 0.0, 1.0])]))
    assert optimizer.statistics()["unclipped_share"] == 0.5
    feed(optimizer, [p], [torch.full((4,), 0.1)])
    assert optimizer.statistics()["unclipped_share"] == 0.5
    optimizer.refresh(Scripted([p], [torch.ones(4)]))
    assert optimizer.statistics()["unclipped_share"] == 1


@pytest.mark.parametrize("tokens", [1, 64, 5120, 491_520])
@pytest.mark.parametrize("clip", [0.0, 1.0, 0.25])
def test_the_estimate_is_tokens_times_the_squared_gradient_clipped_only_where_asked(tokens: int, clip: float) -> None:
    params = small_model(torch.float64)
    sampled = [g.double() for g in gradients_of(7)]
    norm = math.sqrt(sum(float(g.square().sum()) for g in sampled))
    optimizer = SophiaG(params, clip_estimate=clip)
    optimizer.refresh(Scripted(params, [g.clone() for g in sampled], tokens=tokens))
    bound = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
    assert norm > 1
    for p, g in zip(params, sampled, strict=True):
        torch.testing.assert_close(optimizer.state[p]["curvature"], 0.01 * tokens * (bound * g) ** 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eps", [1e-15, 1e-3])
@pytest.mark.parametrize("curvature", [-1.0, 0.0, 1e-12, 1e-2, 1.0])
def test_eps_is_added_by_sophia_g_and_a_lower_bound_of_sophia_h(eps: float, curvature: float) -> None:
    moment = 4e-4
    for build, share, bound in ((SophiaG, 0.05, 0.05 * abs(curvature) + eps), (SophiaH, 0.01, max(0.01 * curvature, eps))):
        p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = build([p], beta1=0.0, beta2=0.0, weight_decay=0.0, eps=eps)
        assert optimizer.gamma == share
        if build is SophiaG:  # its estimates are squares
            optimizer.refresh(Scripted([p], [torch.tensor([math.sqrt(abs(curvature))], dtype=torch.float64)]))
        else:
            optimizer.probe = "rademacher"
            optimizer.refresh(estimate([torch.tensor([curvature], dtype=torch.float64)]))
        feed(optimizer, [p], [torch.tensor([moment], dtype=torch.float64)])
        assert p.item() == pytest.approx(-6e-4 * min(moment / bound, 1.0), rel=1e-9)


# Estimates of the curvature


class Softmax:
    """Mean cross-entropy of a linear softmax model, cut into micro-batches; labels are drawn afresh at every pass."""

    def __init__(self, weight: Tensor, x: Tensor, micro_batches: int = 1, seed: int = 0) -> None:
        self.weight, self.x, self.micro_batches, self.tokens = weight, x, micro_batches, len(x)
        self.draws = torch.Generator().manual_seed(seed)

    def backward(self, labels: str) -> None:
        drawn = torch.multinomial((self.x @ self.weight.detach().T).softmax(-1), 1, generator=self.draws)[:, 0]
        for x, y in zip(self.x.chunk(self.micro_batches), drawn.chunk(self.micro_batches), strict=True):
            (torch.nn.functional.cross_entropy(x @ self.weight.T, y, reduction="sum") / self.tokens).backward()


def softmax_problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(7, 5, generator=draws).to(dtype).requires_grad_(), torch.randn(64, 5, generator=draws).to(dtype)


def test_the_gauss_newton_estimate_is_unbiased() -> None:
    weight, x = softmax_problem()
    objective, optimizer = Softmax(weight, x), SophiaG([weight], beta2=0.0)
    total = torch.zeros_like(weight)
    for _ in range(4000):
        optimizer.refresh(objective)
        total += optimizer.state[weight]["curvature"]
    share = (x @ weight.detach().T).softmax(-1)  # [N, V]
    exact = (share * (1 - share)).T @ x.square() / len(x)  # [V, D] diagonal of the mean loss's Gauss-Newton matrix
    ratio = total / 4000 / exact
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    assert (ratio - 1).abs().max() < 0.1  # 4 standard errors of the mean of 4000 squares


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_do_not_change_the_estimate(micro_batches: int) -> None:
    weight, x = softmax_problem(torch.float64)
    curvatures = []
    for cut in (1, micro_batches):
        optimizer = SophiaG([weight])
        optimizer.refresh(Softmax(weight, x, cut))
        curvatures.append(optimizer.state[weight]["curvature"])
    torch.testing.assert_close(curvatures[0], curvatures[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("probe", ["gaussian", "rademacher"])
def test_probes_come_from_one_generator_in_the_order_of_the_parameters(probe: str) -> None:
    params = [torch.zeros(3, 2, requires_grad=True), torch.zeros(4, requires_grad=True)]
    seen: list[Tensor] = []

    def product(probes: list[Tensor]) -> list[Tensor]:
        seen.extend(probes)
        return [3 * probes[0] + 1, -2 * probes[1]]

    optimizer = SophiaH([{"params": [p]} for p in params], probe=probe)
    optimizer.refresh(Scripted(product=product, seed=5))
    draws = torch.Generator().manual_seed(5)
    for p, u, slope, offset in zip(params, seen, (3, -2), (1, 0), strict=True):
        if probe == "gaussian":
            assert torch.equal(u, torch.randn(p.shape, generator=draws))
        else:
            assert set(u.flatten().tolist()) == {-1.0, 1.0}
        torch.testing.assert_close(optimizer.state[p]["curvature"], 0.01 * u * (slope * u + offset))


@pytest.mark.parametrize(("probe", "draws"), [("gaussian", 4000), ("rademacher", 1000)])
def test_hutchinsons_estimate_is_unbiased_on_a_dense_hessian(probe: str, draws: int) -> None:
    hessian = torch.tensor([[2.0, 0.5, 0.0], [0.5, -1.0, 0.3], [0.0, 0.3, 0.5]])
    p = torch.zeros(3, requires_grad=True)
    optimizer, total = SophiaH([p], beta2=0.0, probe=probe), torch.zeros(3)
    for seed in range(draws):
        optimizer.refresh(Scripted(product=lambda probes: [hessian @ probes[0]], seed=seed))
        total += optimizer.state[p]["curvature"]
    torch.testing.assert_close(total / draws, hessian.diagonal(), rtol=0, atol=0.15)


@pytest.mark.parametrize("build", [SophiaG, SophiaH])
@pytest.mark.parametrize("refreshed", [False, True])
def test_sophia_refuses_to_go_on_as_sign_momentum(build: type[Optimizer], refreshed: bool) -> None:
    params = small_model()
    optimizer = build([{"params": [p]} for p in params], refresh_every=3)
    assert optimizer.refresh_every == 3
    drive(optimizer, params, range(0 if refreshed else 1, 3))
    resumed = build([{"params": [p]} for p in params], refresh_every=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if not refreshed:
        feed(resumed, params, gradients_of(3))
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=rf"'{build.name}' has taken 3 steps .* refresh_every is 3.*sign momentum.*Call refresh"):
        feed(resumed, params, gradients_of(4))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    drive(resumed, params, range(3, 6))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (SophiaG, {"gamma": 0.05, "eps": 1e-15, "clip_estimate": 0.0}),
        (SophiaH, {"gamma": 0.01, "eps": 1e-12}),
    ],
)
def test_defaults_are_the_papers(build: type[Optimizer], expected: dict[str, float]) -> None:
    expected = expected | {"lr": 6e-4, "weight_decay": 0.2, "beta1": 0.965, "beta2": 0.99, "refresh_every": 10, "fraction": 1.0}
    optimizer = build(small_model())
    assert {key: optimizer.param_groups[0].get(key, getattr(optimizer, key, None)) for key in expected} == expected
