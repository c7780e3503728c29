"""What a run asks of every optimizer."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import described, offered
from optimizer_parts import drive, gradients_of, small_model
from torch import Tensor

from lswt_core.interfaces import Optimizer
from lswt_core.resume import optimizer_state, restore_optimizer

ALL = pytest.mark.parametrize("build", offered("optimizer"), ids=described)


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
        moments = [value for value in optimizer.state[p].values() if isinstance(value, Tensor) and value.shape == p.shape]
        assert moments and all((value.dtype, value.device.type) == (torch.float32, "meta") for value in moments)


@ALL
def test_a_checkpoint_holds_the_whole_state(build: type[Optimizer]) -> None:
    whole, names = small_model(), ["first", "second"]
    optimizer = build([{"params": whole, "names": names}])
    drive(optimizer, whole, range(12))
    tensors, document = optimizer_state(optimizer)
    halves = [p.detach().clone().requires_grad_() for p in whole]
    resumed = build([{"params": halves, "names": names}])
    restore_optimizer(resumed, {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(document)))
    for one, params in ((optimizer, whole), (resumed, halves)):
        drive(one, params, range(12, 20))
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


@pytest.mark.parametrize("build", [one for one in offered("optimizer") if one.name != "adamw"], ids=described)  # torch's keeps bfloat16
def test_narrow_parameters_keep_a_float32_state_through_a_save(build: type[Optimizer]) -> None:
    params = small_model(torch.bfloat16)
    optimizer = build(params)
    drive(optimizer, params, range(12))
    resumed = build(params)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in params:
        found = {key: value for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
        assert found and all(value.dtype == torch.float32 for value in found.values())
        assert all(resumed.state[p][key].dtype == torch.float32 and torch.equal(resumed.state[p][key], found[key]) for key in found)
