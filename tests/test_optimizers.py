"""Optimizers against replays of the authors' programs, closed forms, and what a run asks of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from lswt_adamw import AdamW
from lswt_sophia import SophiaG, SophiaH
from safetensors.torch import load_file
from torch import Tensor

from lswt_core.interfaces import Optimizer

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("w1", "b1", "w2", "b2")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}  # the manifests'
ALL = pytest.mark.parametrize("build", [AdamW, SophiaG, SophiaH])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Scripted:
    """An objective whose sampled gradients or Hessian-vector products are told beforehand."""

    def __init__(
        self,
        params: Sequence[Tensor] = (),
        sampled: Sequence[Tensor] = (),
        *,
        tokens: int = 1,
        product: Callable[[list[Tensor]], list[Tensor]] | None = None,
        seed: int = 0,
    ) -> None:
        self.params, self.sampled, self.tokens, self.product, self.seed = params, sampled, tokens, product, seed

    def backward(self, labels: str) -> None:
        assert labels == "sampled"
        assert torch.is_grad_enabled()
        for p, gradient in zip(self.params, self.sampled, strict=True):
            p.grad = gradient.to(p.dtype) if p.grad is None else p.grad + gradient

    def hessian_vector(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        assert torch.is_grad_enabled()
        assert self.product is not None
        return self.product(list(vectors))

    def generator(self, purpose: str) -> torch.Generator:
        assert purpose == "hutchinson"
        return torch.Generator().manual_seed(self.seed)


def load(path: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / path)


def golden_model(data: dict[str, Tensor], dtype: torch.dtype, *, decay: float, decay_all: bool = False) -> tuple[list[Tensor], list[dict]]:
    params = [data[f"init/{name}"].to(dtype).requires_grad_() for name in NAMES]
    decayed = [p for p in params if p.dim() == 2 or decay_all]
    rest = [p for p in params if p.dim() == 1 and not decay_all]
    groups = [{"params": decayed, "weight_decay": decay, "name": "decayed"}]
    return params, groups + ([{"params": rest, "weight_decay": 0.0, "name": "rest"}] if rest else [])


def feed(optimizer: Optimizer, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.to(p.dtype)
    optimizer.step()
    optimizer.zero_grad()


def at(data: dict[str, Tensor], key: str, index: int) -> list[Tensor]:
    return [data[f"{key}/{name}"][index] for name in NAMES]


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=0, atol=tolerance)


def scalar(value: float) -> Tensor:
    return torch.tensor([value], requires_grad=True)


# Replays of programs by other authors


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, "param"), (torch.float64, "param_f64")])
def test_sophia_g_replays_the_official_code(dtype: torch.dtype, key: str) -> None:
    data = load("sophia/sophiag_mlp.safetensors")
    params, groups = golden_model(data, dtype, decay=0.2)
    optimizer = SophiaG(groups, lr=3e-3)
    for step in range(30):
        if step in (10, 20):  # the official code refreshes after steps 9 and 19, which is before 10 and 20
            optimizer.refresh(Scripted(params, at(data, "hess_grad", step // 10 - 1), tokens=64))
        feed(optimizer, params, at(data, "grad", step))
        assert_all_close(params, at(data, key, step), TOLERANCE[dtype])


def test_unclipped_share_is_the_official_win_rate() -> None:
    data = load("sophia/sophiag_mlp.safetensors")
    params, groups = golden_model(data, torch.float32, decay=0.2)
    optimizer = SophiaG(groups, lr=3e-3)
    for step in range(30):
        feed(optimizer, params, at(data, "grad", step))
        if step % 10 == 9:
            optimizer.refresh(Scripted(params, at(data, "hess_grad", step // 10), tokens=64))
            # The official rate is taken right after the refresh: a gradient equal to the momentum leaves the momentum as it was.
            twins = [p.detach().clone().requires_grad_() for p in params]
            twin = SophiaG(twins, lr=3e-3)
            twin.load_state_dict(one_group(optimizer, params))
            feed(twin, twins, [optimizer.state[p]["momentum"] for p in params])
            share = twin.statistics()["unclipped_share"]
            torch.testing.assert_close(share.double(), data["win_rate"][step // 10], rtol=1e-6, atol=0)


def one_group(optimizer: Optimizer, params: Sequence[Tensor]) -> dict:
    groups = [{"lr": 3e-3, "weight_decay": 0.0, "since_refresh": 0, "params": list(range(len(params)))}]
    return copy.deepcopy({"state": {index: optimizer.state[p] for index, p in enumerate(params)}, "param_groups": groups})


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


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, "adamw"), (torch.float64, "adamw_f64")])
def test_adamw_replays_with_a_changing_rate(dtype: torch.dtype, key: str) -> None:
    data = load("optimizers/replay.safetensors")
    params, groups = golden_model(data, dtype, decay=0.1)
    optimizer = AdamW(groups, eps=1e-5)
    for step, lr in enumerate(data["lr"].tolist()):
        for group in optimizer.param_groups:
            group["lr"] = lr
        feed(optimizer, params, at(data, "grad", step))
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


def test_unclipped_share_belongs_to_the_last_step_after_a_refresh() -> None:
    p = torch.zeros(4, requires_grad=True)
    optimizer = SophiaG([p], beta1=0.0, beta2=0.0, rho=1.0)
    assert optimizer.statistics() == {}
    optimizer.refresh(Scripted([p], [torch.ones(4)]))
    feed(optimizer, [p], [torch.tensor([0.5, -0.5, 0.5, 2.0])])
    assert optimizer.statistics()["unclipped_share"] == 0.75
    feed(optimizer, [p], [torch.full((4,), 2.0)])
    assert optimizer.statistics()["unclipped_share"] == 0.75
    optimizer.refresh(Scripted([p], [torch.ones(4)]))
    feed(optimizer, [p], [torch.full((4,), 2.0)])
    assert optimizer.statistics()["unclipped_share"] == 0


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


# What a run asks of every optimizer


def small_model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    draws = torch.Generator().manual_seed(2)
    return [torch.randn(size, generator=draws).to(device, dtype).requires_grad_() for size in ((3, 4), (5,))]


def gradients_of(step: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=draws) for size in ((3, 4), (5,))]


def drive(optimizer: Optimizer, params: Sequence[Tensor], steps: range, signs: Sequence[Tensor] | None = None) -> None:
    flips = signs or [torch.ones_like(p) for p in params]
    for step in steps:
        if optimizer.refresh_every and step % optimizer.refresh_every == 0:
            sampled = [g * s / 50 for g, s in zip(gradients_of(1000 + step), flips, strict=True)]
            diagonal = [g / 10 for g in gradients_of(2000 + step)]
            optimizer.refresh(
                Scripted(params, sampled, tokens=64, product=lambda us, d=diagonal: [u * c for u, c in zip(us, d, strict=True)], seed=step)
            )
        feed(optimizer, params, [g * s for g, s in zip(gradients_of(step), flips, strict=True)])


@ALL
@pytest.mark.parametrize("cut", [3, 10, 14])
def test_a_saved_state_continues_bit_for_bit(build: type[Optimizer], cut: int) -> None:
    whole = small_model()
    optimizer = build(whole)
    drive(optimizer, whole, range(cut))
    halves, saved = [p.detach().clone().requires_grad_() for p in whole], copy.deepcopy(optimizer.state_dict())
    drive(optimizer, whole, range(cut, 25))
    resumed = build(halves)
    resumed.load_state_dict(saved)
    drive(resumed, halves, range(cut, 25))
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
    assert {k: v.item() for k, v in optimizer.statistics().items()} == {k: v.item() for k, v in resumed.statistics().items()}


@ALL
def test_flipping_signs_commutes_with_the_optimizer(build: type[Optimizer]) -> None:
    plain, flipped = small_model(), small_model()
    signs = [torch.where(g > 0, 1.0, -1.0) for g in gradients_of(3000)]
    with torch.no_grad():
        for p, sign in zip(flipped, signs, strict=True):
            p.mul_(sign)
    drive(build(plain), plain, range(12))
    drive(build(flipped), flipped, range(12), signs)
    assert all(torch.equal(a, b * sign) for a, b, sign in zip(plain, flipped, signs, strict=True))


@ALL
def test_parameters_without_gradient_are_left_alone(build: type[Optimizer]) -> None:
    used, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = build([{"params": [used, unused]}], weight_decay=0.5)
    used.grad = torch.ones(3)
    optimizer.step()
    assert (used < 1).all()
    assert torch.equal(unused, torch.ones(3))
    assert unused not in optimizer.state


@ALL
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
        moments = [value for value in optimizer.state[p].values() if value.shape == p.shape]
        assert [(value.dtype, value.device.type) for value in moments] == [(torch.float32, "meta")] * 2


@pytest.mark.parametrize("build", [SophiaG, SophiaH])
def test_narrow_parameters_keep_a_float32_state_through_a_save(build: type[Optimizer]) -> None:
    params = small_model(torch.bfloat16)
    optimizer = build(params)
    drive(optimizer, params, range(12))
    resumed = build(params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in params:
        for key, value in optimizer.state[p].items():
            assert resumed.state[p][key].dtype == torch.float32
            assert torch.equal(resumed.state[p][key], value)


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
        (SophiaG, {"lr": 6e-4, "weight_decay": 0.2, "beta1": 0.965, "beta2": 0.99, "gamma": 0.05, "eps": 1e-15, "refresh_every": 10}),
        (SophiaH, {"lr": 6e-4, "weight_decay": 0.2, "beta1": 0.965, "beta2": 0.99, "gamma": 0.01, "eps": 1e-12, "refresh_every": 10}),
    ],
)
def test_defaults_are_the_papers(build: type[Optimizer], expected: dict[str, float]) -> None:
    optimizer = build(small_model())
    assert {key: optimizer.param_groups[0].get(key, getattr(optimizer, key, None)) for key in expected} == expected
