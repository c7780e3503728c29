"""Optimizers of other packages against the packages' own classes, saved and resumed to the bit."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import pytorch_optimizer
import torch
from lswt_torch_optim import AdEMAMix, CautiousLion, Mars, Soap, TorchOptimizer
from torch import Tensor, nn

from lswt_core.checkpoint.train_state import optimizer_state, restore_optimizer
from lswt_core.errors import PluginError

OURS: dict[str, tuple[Any, dict[str, Any], Any]] = {  # component, options, the package's own
    "torch": (
        TorchOptimizer,
        {"cls": "torch.optim:NAdam", "lr": 0.01, "arguments": {"betas": [0.8, 0.9]}},
        lambda params: torch.optim.NAdam(params, lr=0.01, betas=(0.8, 0.9)),
    ),
    "soap": (
        Soap,
        {"lr": 0.01, "precondition_frequency": 2},
        lambda params: pytorch_optimizer.SOAP(params, lr=0.01, precondition_frequency=2),
    ),
    "ademamix": (
        AdEMAMix,
        {"lr": 0.01, "warmup_steps": 5, "weight_decay": 0.0},
        lambda params: pytorch_optimizer.AdEMAMix(params, lr=0.01, t_alpha_beta3=5),
    ),
    "mars": (
        Mars,
        {"lr": 0.01, "weight_decay": 0.0},
        lambda params: pytorch_optimizer.MARS(params, lr=0.01, optimize_1d=True),
    ),
    "cautious-lion": (
        CautiousLion,
        {"lr": 0.01, "weight_decay": 0.0},
        lambda params: pytorch_optimizer.Lion(params, lr=0.01, betas=(0.9, 0.99), cautious=True),
    ),
}
every = pytest.mark.parametrize("name", OURS)


def model() -> nn.Module:
    """Two layers with biases."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """One group, with names as the core gives them."""
    names, params = zip(*module.named_parameters(), strict=True)
    return [{"name": "all", "params": list(params), "names": list(names), "matrices": []}]


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Updates on inputs that derive from the step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (module(x) - x[:, :3]).square().mean().backward()
        optimizer.step()


def weights(module: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in module.parameters()]


@every
def test_updates_are_the_packages_own(name: str) -> None:
    component, options, theirs = OURS[name]
    one, other = model(), model()
    train(one, component(groups_of(one), **options), range(7))
    train(other, theirs(other.parameters()), range(7))
    for ours, own in zip(weights(one), weights(other), strict=True):
        # not to the bit: SOAP's matrices are kept in the layout that a saved state has
        torch.testing.assert_close(ours, own, rtol=0, atol=1e-12)
    assert not any(map(torch.equal, weights(one), weights(model())))


@every
def test_a_saved_state_is_continued_to_the_bit(name: str) -> None:
    component, options, _ = OURS[name]
    whole, parted = model(), model()
    train(whole, component(groups_of(whole), **options), range(9))
    optimizer = component(groups_of(parted), **options)
    train(parted, optimizer, range(4))
    tensors, scalars = optimizer_state(optimizer)
    saved = {key: tensor.clone() for key, tensor in tensors.items()}, copy.deepcopy(scalars)
    resumed = component(groups_of(parted), **options)
    restore_optimizer(resumed, *saved)
    train(parted, resumed, range(4, 9))
    assert all(map(torch.equal, weights(whole), weights(parted)))


@pytest.mark.parametrize("cls", ["os:system", "torch.optim", "nowhere:Adam", "torch.nn:Linear"])
def test_only_optimizer_classes_are_taken(cls: str) -> None:
    with pytest.raises(ValueError, match="cls = "):
        TorchOptimizer(groups_of(model()), cls=cls)


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ValueError, match="momentum"):
        TorchOptimizer(groups_of(model()), arguments={"momentum": 0.9})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(PluginError, match=r"pip install 'lswt-core\[optimizers\]'"):
        Soap(groups_of(model()))
