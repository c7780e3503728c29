"""Muon: torch's two optimizers bit for bit, orthogonal steps, which tensor goes where, and
resuming.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from helpers import tiny, tokens
from lswt_registers import Registers
from torch import nn

from lswt_core import Registry
from lswt_core.checkpoint.train_state import optimizer_state, restore_optimizer
from lswt_core.model.parameters import build_parameter_groups

Muon: Any = Registry().get("optimizer", "muon")


def model(**parts: Any) -> Any:
    """A decoder with every sort of parameter."""
    return tiny(memories={"registers": partial(Registers, count=2)}, dtype=torch.float32, **parts)


def train(decoder: Any, optimizers: list[Any], steps: range) -> None:
    """Some updates, each on its own text and at its own rate."""
    for step in steps:
        ids = tokens(2, 6, step)
        decoder.vocabulary.score(decoder(ids)[0], ids).total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def is_hidden(name: str) -> bool:
    """A weight of the blocks' linear layers, spelled out."""
    ends = (
        "query.weight",
        "key.weight",
        "value.weight",
        "output.weight",
        "fc1.weight",
        "fc2.weight",
    )
    return name.startswith("blocks.") and name.endswith(ends)


def test_hidden_matrices_are_muons_and_everything_else_is_adamws() -> None:
    optimizer = Muon(build_parameter_groups(model()), lr=0.05, adamw_lr=0.01)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates == {
        name: 0.05 if is_hidden(name) else 0.01 for name, _ in model().named_parameters()
    }


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_both_halves_are_torchs_bit_for_bit(scale: str) -> None:
    ours, theirs = model(), model()
    train(ours, [Muon(build_parameter_groups(ours), scale=scale, weight_decay=0.2)], range(5))
    muons = [p for name, p in theirs.named_parameters() if is_hidden(name)]
    undecayed = {name for name, p in theirs.named_parameters() if p.ndim < 2 or "table" in name}
    undecayed |= set(
        next(g["names"] for g in build_parameter_groups(theirs) if g["name"] == "undecayed")
    )
    rest = [
        {
            "params": [
                p
                for name, p in theirs.named_parameters()
                if not is_hidden(name) and (name in undecayed) is flag
            ],
            "weight_decay": decay,
        }
        for flag, decay in ((True, 0.0), (False, 0.2))
    ]
    muon = torch.optim.Muon(
        muons, lr=0.02, weight_decay=0.2, momentum=0.95, eps=1e-8, adjust_lr_fn=scale
    )
    train(
        theirs,
        [
            muon,
            torch.optim.AdamW(
                [g for g in rest if g["params"]], lr=3e-4, betas=(0.9, 0.95), eps=1e-8
            ),
        ],
        range(5),
    )
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=["tall", "wide"])
def test_each_matrix_of_a_stack_is_updated_as_one_alone(scale: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradients = (torch.randn(2, 2, 2, *shape, generator=generator) for _ in "ab")
    stack = nn.Parameter(start[0].clone())
    alone = [nn.Parameter(matrix.clone()) for matrix in start[0].flatten(0, 1)]
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    ours = Muon(
        [{"name": "all", "params": [stack], "names": ["w"], "matrices": ["w"]}],
        scale=scale,
        **options,
    )
    theirs = torch.optim.Muon(alone, adjust_lr_fn=scale, eps=1e-8, **options)
    for gradient in gradients:
        stack.grad = gradient.clone()
        for matrix, own in zip(alone, gradient.flatten(0, 1), strict=True):
            matrix.grad = own.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(
        stack.flatten(0, 1), torch.stack(list(alone)), rtol=0, atol=2e-3
    )  # bfloat16


def test_experts_are_hidden_matrices() -> None:
    decoder = tiny(ffn=Registry().get("ffn", "moe"))
    groups = Muon(build_parameter_groups(decoder), lr=0.05, adamw_lr=0.01).param_groups
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    experts = [name for name in rates if "experts.fc" in name]
    assert experts and {rates[name] for name in experts} == {0.05}


def test_a_first_step_is_nearly_orthogonal() -> None:
    """Its singular vectors are the gradient's, its singular values lie near 1."""
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = Muon(
        [{"name": "all", "params": [p], "names": ["w"], "matrices": ["w"]}],
        lr=1.0,
        weight_decay=0.0,
        scale="match_rms_adamw",
    )
    p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(p.grad, full_matrices=False)
    optimizer.step()
    core = left.T @ (-p.detach() / (0.2 * 6**0.5)) @ right.T
    assert ((core.diagonal() > 0.5) & (core.diagonal() < 1.5)).all()
    assert (core - core.diagonal().diag()).abs().max() < 0.05  # bfloat16


@pytest.mark.parametrize("ffn", ["swiglu", "moe"])
def test_a_checkpoint_continues_bit_for_bit(ffn: str) -> None:
    parts = {"ffn": Registry().get("ffn", ffn)}
    whole = model(**parts)
    optimizer = Muon(build_parameter_groups(whole))
    train(whole, [optimizer], range(3))
    twin = model(**parts)
    twin.load_state_dict(whole.state_dict())
    resumed = Muon(build_parameter_groups(twin))
    tensors, document = optimizer_state(optimizer)
    restore_optimizer(
        resumed,
        {name: tensor.clone() for name, tensor in tensors.items()},
        json.loads(json.dumps(document)),
    )
    train(whole, [optimizer], range(3, 6))
    train(twin, [resumed], range(3, 6))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), twin.parameters(), strict=True)
    )
