"""Our optimizers have the habits of torch's own: copied, pickled, given groups later or names,
refusing what makes no sense.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import described, offered
from optimizer_parts import drive, small_model
from torch import Tensor

from lswt_core.interfaces import Optimizer

EVERY = pytest.mark.parametrize("build", offered("optimizer"), ids=described)
OTHER = {
    "lr": 0.03,
    "beta": 0.6,
    "beta1": 0.6,
    "momentum": 0.6,
    "hessian_update_interval": 3,
    "clip_estimate": 0.5,
    "probe": "rademacher",
}


def made(build: Any, params: Any) -> Optimizer:
    """The optimizer with options that are not its defaults."""
    names = build.__init__.__kwdefaults__
    optimizer: Optimizer = build(
        params, **{name: value for name, value in OTHER.items() if name in names}
    )
    return optimizer


def parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def grouped(params: list[Tensor]) -> list[dict[str, Any]]:
    """A matrix and a vector, as the core groups them."""
    return [{"name": "all", "params": params, "names": ["a", "b"], "matrices": ["a"]}]


def pickled(optimizer: Optimizer) -> Optimizer:
    copy: Optimizer = pickle.loads(pickle.dumps(optimizer))
    return copy


@EVERY
@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
@pytest.mark.parametrize("steps", [0, 4])
def test_a_copy_goes_on_as_the_original(
    build: Any, again: Callable[[Optimizer], Optimizer], steps: int
) -> None:
    params = small_model()
    optimizer = made(build, grouped(params))
    drive(optimizer, params, range(steps))
    twin = again(optimizer)
    drive(optimizer, params, range(steps, steps + 5))
    drive(twin, parameters(twin), range(steps, steps + 5))
    assert all(a.equal(b) and a is not b for a, b in zip(params, parameters(twin), strict=True))


@EVERY
def test_a_group_that_comes_later_is_one_like_the_others(build: Any) -> None:
    whole, parted = small_model(), small_model()
    one, two = made(build, whole), made(build, parted[:1])
    two.add_param_group({"params": parted[1:]})
    assert two.param_groups[1].keys() == two.param_groups[0].keys()
    drive(one, whole, range(5))
    drive(two, parted, range(5))
    assert all(a.equal(b) for a, b in zip(whole, parted, strict=True))


@pytest.mark.parametrize(  # SOAP only prepares in the first update of a group
    "build", [cls for cls in offered("optimizer") if cls.name != "soap"], ids=described
)
def test_a_group_may_come_in_the_middle(build: Any) -> None:
    params, late = small_model(), torch.ones(3, requires_grad=True)
    optimizer = made(build, params)
    drive(optimizer, params, range(2))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    late.grad = torch.tensor([1.0, -1.0, 0.5])
    drive(optimizer, params, range(2, 3))
    assert late.isfinite().all() and not late.equal(torch.ones(3))


@EVERY
def test_named_parameters_are_taken(build: Any) -> None:
    plain, named = small_model(), small_model()
    one, two = made(build, plain), made(build, zip(("a", "b"), named, strict=True))
    assert [name for group in two.param_groups for name in group["param_names"]] == ["a", "b"]
    drive(one, plain, range(5))
    drive(two, named, range(5))
    assert all(a.equal(b) for a, b in zip(plain, named, strict=True))


BAD = {
    "lr": -0.1,
    "weight_decay": -0.1,
    "eps": -1.0,
    "beta": 1.0,
    "beta1": 1.0,
    "beta2": -0.1,
    "momentum": 1.5,
    "adamw_lr": -1.0,
    "adamw_beta1": 1.0,
    "rho": 0.0,
    "gamma": -1.0,
    "hessian_update_interval": 0,
    "fraction": 1.5,
    "clip_estimate": -1.0,
}


@EVERY
def test_values_that_make_no_sense_are_refused(build: Any) -> None:
    names = build.__init__.__kwdefaults__.keys() & BAD.keys()
    assert {"lr", "weight_decay"} <= names
    for name in names:
        for value in (BAD[name], float("nan")):
            with pytest.raises(ValueError, match=name):
                build(small_model(), **{name: value})


@pytest.mark.parametrize(
    "build",
    [cls for cls in offered("optimizer") if cls.name in ("lion", "sophia-g")],
    ids=described,
)
def test_an_option_of_all_parameters_is_refused_by_group(build: Any) -> None:
    optimizer = build(small_model()[:1])
    with pytest.raises(ValueError, match="beta1"):
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)], "beta1": 0.5})
