"""Both Sophias against replays of the authors' programs, closed forms, and their estimates of the
curvature.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from optimizer_parts import (
    NAMES,
    TOLERANCE,
    Scripted,
    assert_all_close,
    at,
    drive,
    estimate,
    feed,
    golden_model,
    gradients_of,
    load,
    scalar,
    small_model,
)
from torch import Tensor

from lswt_core import Registry
from lswt_core.interfaces import Optimizer

SophiaG, SophiaH = (Registry().get("optimizer", name) for name in ("sophia-g", "sophia-h"))
both = pytest.mark.parametrize("build", [SophiaG, SophiaH])


# Replays of programs by other authors


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, "param"), (torch.float64, "param_f64")])
def test_sophia_g_replays_the_official_code(dtype: torch.dtype, key: str) -> None:
    data = load("sophia/sophiag_mlp.safetensors")
    params, groups = golden_model(data, dtype, decay=0.2)
    optimizer = SophiaG(groups, lr=3e-3)
    for step in range(30):
        # the official code updates the estimate after steps 9 and 19, which is before 10 and 20
        if step in (10, 20):
            optimizer.update_curvature(
                Scripted(params, at(data, "hess_grad", step // 10 - 1), tokens=64)
            )
        feed(optimizer, params, at(data, "grad", step))
        assert_all_close(params, at(data, key, step), TOLERANCE[dtype])


@pytest.mark.parametrize(("tokens", "file"), [(64, "sophiag_mlp"), (5120, "sophiag_mlp_bs5120")])
def test_sophia_g_replays_the_official_code_at_another_scale_of_the_batch(
    tokens: int, file: str
) -> None:
    """With it the official win rate, which is our un-clipped share."""
    inputs, data = load("sophia/sophiag_mlp.safetensors"), load(f"sophia/{file}.safetensors")
    params, groups = golden_model(inputs, torch.float32, decay=0.2)
    optimizer = SophiaG(groups, lr=3e-3)
    for step in range(30):
        feed(optimizer, params, at(inputs, "grad", step))
        assert_all_close(params, at(data, "param", step), TOLERANCE[torch.float32])
        if step % 10 == 9:
            optimizer.update_curvature(
                Scripted(params, at(inputs, "hess_grad", step // 10), tokens=tokens)
            )
            share = optimizer.statistics()["unclipped_share"]
            torch.testing.assert_close(
                share.double(), data["win_rate"][step // 10], rtol=1e-6, atol=0
            )


def edge_error(**options: float) -> float:
    """The largest error in the golden step whose curvatures are 0, around eps, and far above it."""
    data = load("sophia/sophiag_edge.safetensors")
    p = data["param"][0].clone().requires_grad_()
    optimizer = SophiaG(
        [p],
        **({"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "rho": 0.04, "weight_decay": 0.1} | options),
    )
    optimizer.update_curvature(Scripted([p], [data["hess_grad"]]))
    errors = []
    for step, gradient in enumerate((data["grad"], torch.zeros_like(data["grad"])), 1):
        feed(optimizer, [p], [gradient])
        errors.append(float((p.detach() - data["param"][step]).abs().max()))
    return max(errors)


def test_sophia_g_replays_the_official_code_where_there_is_no_curvature() -> None:
    assert edge_error() <= TOLERANCE[torch.float32]


def clamped(self: Optimizer, bounds: tuple[Tensor, ...]) -> None:
    torch._foreach_clamp_min_(bounds, self.eps)  # type: ignore[attr-defined]


def test_the_replay_notices_another_eps_and_how_it_is_applied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noticed = 1000 * TOLERANCE[torch.float32]
    for eps in (1e-12, 1e-14, 2e-15, 1e-16):
        assert edge_error(eps=eps) > noticed
    monkeypatch.setattr(SophiaG, "damp_", clamped)
    assert edge_error() > noticed


@pytest.mark.parametrize(("gamma", "key"), [(30.0, "pto_p30"), (0.01, "pto")])
def test_sophia_h_replays_pytorch_optimizer(gamma: float, key: str) -> None:
    inputs, data = load("sophia/sophiag_mlp.safetensors"), load("sophia/sophiah_mlp.safetensors")
    params, groups = golden_model(inputs, torch.float32, decay=0.2, decay_all=True)
    # It clips m / max(h, p) at p and multiplies by lr: our gamma is its p, our lr its lr * p.
    optimizer = SophiaH(groups, lr=3e-3, gamma=gamma, probe="rademacher")
    for step in range(30):
        if step in (10, 20):
            optimizer.update_curvature(estimate(at(data, "hess_est", step // 10 - 1)))
        feed(optimizer, params, at(inputs, "grad", step))
        assert_all_close(params, at(data, f"{key}/param", step), TOLERANCE[torch.float32])


@pytest.mark.parametrize(("gamma", "key"), [(0.01, "levanter"), (30.0, "levanter_g30")])
def test_sophia_h_replays_levanter(gamma: float, key: str) -> None:
    inputs, data = load("sophia/sophiag_mlp.safetensors"), load("sophia/sophiah_mlp.safetensors")
    params, groups = golden_model(inputs, torch.float32, decay=0.2, decay_all=True)
    optimizer = SophiaH(groups, lr=3e-3, probe="rademacher")
    for step in range(30):
        # levanter corrects the momentum's bias; dividing by less is the same
        correction = 1 - 0.965 ** (step + 1)
        optimizer.gamma, optimizer.eps = gamma * correction, 1e-8 * correction
        if step in (10, 20):
            optimizer.update_curvature(estimate(at(data, "hess_est", step // 10 - 1)))
        feed(optimizer, params, at(inputs, "grad", step))
        assert_all_close(params, at(data, f"{key}/param", step), TOLERANCE[torch.float32])
    optimizer.update_curvature(estimate(at(data, "hess_est", 2)))
    for name, p in zip(NAMES, params, strict=True):
        torch.testing.assert_close(
            optimizer.state[p]["curvature"], data[f"{key}/h_final/{name}"], rtol=1e-5, atol=0
        )


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
        (1e-16, 0.0, -6e-5),  # eps 1e-15 alone decides
        (-1e-16, 0.0, 6e-5),
    ],
)
def test_sophia_g_steps_by_the_closed_form(
    momentum: float, curvature: float, change: float
) -> None:
    p = scalar(0.0)
    optimizer = SophiaG([p], beta1=0.0, beta2=0.0, weight_decay=0.0)
    optimizer.update_curvature(
        Scripted([p], [torch.tensor([math.sqrt(curvature)])], tokens=491_520)
    )
    assert p.grad is None
    feed(optimizer, [p], [torch.tensor([momentum])])
    assert p.item() == pytest.approx(change, rel=1e-6)


@pytest.mark.parametrize(
    ("momentum", "curvature", "change"),
    [
        (0.1, 20.0, -3e-4),
        (0.1, 1e-3, -6e-4),
        (0.1, 0.0, -6e-4),
        (0.1, -1e-3, -6e-4),
        (-0.1, -1e3, 6e-4),
        (0.0, -1.0, 0.0),
        (1e-13, 0.0, -6e-5),  # eps 1e-12 alone decides
        (1e-13, -1.0, -6e-5),
        (-1e-13, -1.0, 6e-5),
    ],
)
def test_sophia_h_never_climbs_where_curvature_is_negative(
    momentum: float, curvature: float, change: float
) -> None:
    p = scalar(0.0)
    optimizer = SophiaH([p], beta1=0.0, beta2=0.0, weight_decay=0.0, probe="rademacher")
    optimizer.update_curvature(estimate([torch.tensor([curvature])]))
    feed(optimizer, [p], [torch.tensor([momentum])])
    assert p.item() == pytest.approx(change, rel=1e-6)


@both
def test_without_curvature_the_step_is_sign_momentum_with_decoupled_decay(
    build: type[Optimizer],
) -> None:
    decayed, plain = (torch.tensor([2.0, -1.0, 4.0], requires_grad=True) for _ in range(2))
    optimizer = build(
        [{"params": [decayed]}, {"params": [plain], "weight_decay": 0.0}], lr=0.1, weight_decay=0.5
    )
    feed(optimizer, [decayed, plain], [torch.tensor([3.0, -4.0, 0.0])] * 2)
    torch.testing.assert_close(
        decayed.detach(), torch.tensor([2 * 0.95 - 0.1, -0.95 + 0.1, 4 * 0.95])
    )
    torch.testing.assert_close(plain.detach(), torch.tensor([1.9, -0.9, 4.0]))
    assert optimizer.statistics()["unclipped_share"] == 0  # the coordinate at rest does not count


def test_unclipped_share_is_measured_at_a_hessian_update_with_the_momentum_there_is() -> None:
    p = torch.zeros(4, requires_grad=True)
    optimizer = SophiaG([p], beta1=0.0, beta2=0.0, rho=1.0)
    assert optimizer.statistics() == {}
    for momentum, share in (([0.5, -0.5, 0.5, 2.0], 0.75), ([2.0] * 4, 0.0)):
        feed(optimizer, [p], [torch.tensor(momentum)])
        optimizer.update_curvature(Scripted([p], [torch.ones(4)]))
        assert optimizer.statistics()["unclipped_share"] == share
        feed(optimizer, [p], [torch.zeros(4)])
        assert optimizer.statistics()["unclipped_share"] == share


# Estimates of the curvature


class Softmax:
    """Mean cross-entropy of a linear softmax model, cut into micro-batches; labels are drawn afresh
    at every pass.
    """

    def __init__(self, weight: Tensor, x: Tensor, micro_batches: int = 1, seed: int = 0) -> None:
        self.weight, self.x, self.micro_batches, self.tokens = weight, x, micro_batches, len(x)
        self.draws = torch.Generator().manual_seed(seed)

    def subset(self, fraction: float) -> Softmax:
        part = Softmax(self.weight, self.x[: round(fraction * len(self.x))], self.micro_batches)
        part.draws = self.draws
        return part

    def backward(self, labels: str) -> None:
        drawn = torch.multinomial(
            (self.x @ self.weight.detach().T).softmax(-1), 1, generator=self.draws
        )[:, 0]
        for x, y in zip(
            self.x.chunk(self.micro_batches), drawn.chunk(self.micro_batches), strict=True
        ):
            (
                torch.nn.functional.cross_entropy(x @ self.weight.T, y, reduction="sum")
                / self.tokens
            ).backward()


def softmax_problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(7, 5, generator=draws).to(dtype).requires_grad_(), torch.randn(
        64, 5, generator=draws
    ).to(dtype)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_the_gauss_newton_estimate_is_unbiased(fraction: float) -> None:
    """A fraction's estimate is that of its own rows: multiplied by their tokens, not by those of
    the whole batch.
    """
    weight, x = softmax_problem()
    objective, optimizer = Softmax(weight, x), SophiaG([weight], beta2=0.0, fraction=fraction)
    x = x[: round(fraction * len(x))]
    total = torch.zeros_like(weight)
    for _ in range(4000):
        optimizer.update_curvature(objective)
        total += optimizer.state[weight]["curvature"]
    share = (x @ weight.detach().T).softmax(-1)  # [N, V]
    # [V, D] diagonal of the mean loss's Gauss-Newton matrix
    exact = (share * (1 - share)).T @ x.square() / len(x)
    ratio = total / 4000 / exact
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    assert (ratio - 1).abs().max() < 0.1  # 4 standard errors of the mean of 4000 squares


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_do_not_change_the_estimate(micro_batches: int) -> None:
    weight, x = softmax_problem(torch.float64)
    curvatures = []
    for cut in (1, micro_batches):
        optimizer = SophiaG([weight])
        optimizer.update_curvature(Softmax(weight, x, cut))
        curvatures.append(optimizer.state[weight]["curvature"])
    torch.testing.assert_close(curvatures[0], curvatures[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("bound", "factor"), [(0.0, 1.0), (1.0, 1 / 13), (6.5, 0.5), (20.0, 1.0)])
def test_the_norm_of_the_sampled_gradient_is_bounded_if_asked(bound: float, factor: float) -> None:
    """Over all parameters together and before it is squared, as the official training script does
    with 1.0.
    """
    params = [
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
        torch.zeros((), dtype=torch.float64, requires_grad=True),
    ]
    sampled = [torch.tensor([3.0, 4.0]), torch.tensor(12.0)]  # norm 13
    optimizer = SophiaG(params, beta2=0.0, clip_estimate=bound)
    optimizer.update_curvature(Scripted(params, sampled, tokens=7))
    for p, g in zip(params, sampled, strict=True):
        torch.testing.assert_close(
            optimizer.state[p]["curvature"], 7 * (factor * g.double()) ** 2, rtol=1e-6, atol=0
        )


@both
def test_without_a_fraction_no_part_is_asked_for(build: type[Optimizer]) -> None:
    """A fraction of 1 is the objective itself, to the bit; any other is passed on."""
    params = small_model()
    fractions: list[float] = []

    class Parted(Scripted):
        def subset(self, fraction: float) -> Parted:
            fractions.append(fraction)
            return self

    objective = Parted(params, gradients_of(0), product=lambda us: us)
    build(params).update_curvature(objective)
    assert fractions == []
    build(params, fraction=0.5).update_curvature(objective)
    assert fractions == [0.5]


@pytest.mark.parametrize("probe", ["gaussian", "rademacher"])
def test_probes_come_from_one_generator_in_the_order_of_the_parameters(probe: str) -> None:
    params = [torch.zeros(3, 2, requires_grad=True), torch.zeros(4, requires_grad=True)]
    drawn: list[Tensor] = []

    def product(probes: list[Tensor]) -> list[Tensor]:
        drawn.extend(probes)
        return [3 * probes[0] + 1, -2 * probes[1]]

    optimizer = SophiaH([{"params": [p]} for p in params], probe=probe)
    optimizer.update_curvature(Scripted(product=product, seed=5))
    draws = torch.Generator().manual_seed(5)
    for p, u, slope, offset in zip(params, drawn, (3, -2), (1, 0), strict=True):
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
        optimizer.update_curvature(
            Scripted(product=lambda probes: [hessian @ probes[0]], seed=seed)
        )
        total += optimizer.state[p]["curvature"]
    torch.testing.assert_close(total / draws, hessian.diagonal(), rtol=0, atol=0.15)


# What a run asks of a second-order optimizer


@both
@pytest.mark.parametrize("updated", [False, True])
def test_sophia_refuses_to_go_on_as_sign_momentum(build: type[Optimizer], updated: bool) -> None:
    params = small_model()
    optimizer = build([{"params": [p]} for p in params], hessian_update_interval=3)
    assert optimizer.hessian_update_interval == 3
    drive(optimizer, params, range(0 if updated else 1, 3))
    resumed = build([{"params": [p]} for p in params], hessian_update_interval=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if not updated:
        feed(resumed, params, gradients_of(3))
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        RuntimeError,
        match=rf"'{build.name}' .*3 steps .*hessian_update_interval is 3.*update_curvature",
    ):
        feed(resumed, params, gradients_of(4))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    drive(resumed, params, range(3, 6))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            SophiaG,
            {
                "lr": 6e-4,
                "weight_decay": 0.2,
                "beta1": 0.965,
                "beta2": 0.99,
                "gamma": 0.05,
                "eps": 1e-15,
                "hessian_update_interval": 10,
                "fraction": 1.0,
            },
        ),
        (
            SophiaH,
            {
                "lr": 6e-4,
                "weight_decay": 0.2,
                "beta1": 0.965,
                "beta2": 0.99,
                "gamma": 0.01,
                "eps": 1e-12,
                "hessian_update_interval": 10,
                "fraction": 1.0,
            },
        ),
    ],
)
def test_defaults_are_the_papers(build: type[Optimizer], expected: dict[str, float]) -> None:
    optimizer = build(small_model())
    assert {
        key: optimizer.param_groups[0].get(key, getattr(optimizer, key, None)) for key in expected
    } == expected
