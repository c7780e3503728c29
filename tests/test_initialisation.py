"""How parameters start: what a module says in ``reset_parameters`` of itself and of its children
stands.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import DIMS, tiny
from hf_parts import config_of
from lswt_swiglu import SwiGlu
from torch import Tensor, nn

from lswt_core import LswtForCausalLM
from lswt_core.ablation.runs.self_check import hash_parameter
from lswt_core.errors import PluginError
from lswt_core.interfaces import Dims, FeedForward
from lswt_core.model.initialise import initialise


class Identity(nn.Linear):
    """A linear layer that says how it starts."""

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)
        nn.init.ones_(self.bias)


class Narrow(nn.Embedding):
    """A table that says how it starts."""

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.5)


class Tagged(nn.Linear):
    """A linear layer that says nothing of how it starts."""


class Residual(FeedForward):
    """Adds nothing at first; owns no parameter itself."""

    name = "residual"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.fc1, self.fc2 = (
            nn.Linear(dims.d_model, dims.d_ffn),
            nn.Linear(dims.d_ffn, dims.d_model),
        )
        self.turn, self.table, self.tagged = (
            Identity(4, 4),
            Narrow(3, 2),
            Tagged(dims.d_model, dims.d_model),
        )

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.fc2.weight)
        nn.init.uniform_(self.fc1.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x)) + self.tagged(x)


def test_what_a_module_says_about_its_children_stands() -> None:
    ffn = tiny(ffn=Residual).blocks[0].ffn
    assert not ffn.fc2.weight.any() and (ffn.fc1.bias > 0).any() and not ffn.fc2.bias.any()
    assert ffn.turn.weight.equal(torch.eye(4).double())
    assert ffn.turn.bias.equal(torch.ones(4).double())
    assert (ffn.table.weight == 0.5).all()


def test_what_it_leaves_alone_starts_as_ever() -> None:
    plain, other = tiny().state_dict(), tiny(ffn=Residual).state_dict()
    assert all(plain[name].equal(other[name]) for name in plain if ".ffn." not in name)
    # of 0.4
    assert other["blocks.0.ffn.fc1.weight"].std() > 0.2
    assert other["blocks.0.ffn.tagged.weight"].std() > 0.2


def test_draws_of_a_module_are_its_own() -> None:
    torch.manual_seed(1)
    one, two = tiny(ffn=Residual), tiny(ffn=Residual)
    assert one.blocks[0].ffn.fc1.bias.equal(two.blocks[0].ffn.fc1.bias)
    assert not one.blocks[0].ffn.fc1.bias.equal(one.blocks[1].ffn.fc1.bias)


class Nested(nn.Module):
    """Its word comes after its child's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual(DIMS)
        self.same = self.inner  # one module by two names

    def reset_parameters(self) -> None:
        nn.init.constant_(self.inner.fc2.weight, 7)


def test_the_outermost_has_the_last_word() -> None:
    model = nn.Sequential(Nested())
    initialise(model, seed=0, std=0.02)
    assert (model[0].inner.fc2.weight == 7).all() and (model[0].inner.fc1.bias > 0).any()


@torch.no_grad()
def test_a_model_of_transformers_starts_so_too_and_keeps_what_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reset_parameters(self: SwiGlu) -> None:
        self.fc2.weight.zero_()

    monkeypatch.setattr(SwiGlu, "reset_parameters", reset_parameters, raising=False)
    model = LswtForCausalLM(config_of("family"))
    weight = model.model.decoder.blocks[0].ffn.fc2.weight
    assert not weight.any() and model.model.decoder.blocks[0].ffn.fc1.weight.any()
    weight.fill_(3)
    model.save_pretrained(tmp_path)
    assert (
        LswtForCausalLM.from_pretrained(tmp_path).model.decoder.blocks[0].ffn.fc2.weight == 3
    ).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_initial_values_of_any_shape_are_recorded(shape: tuple[int, ...]) -> None:
    ones, twos = (hash_parameter(torch.full(shape, x), "block.mine") for x in (1.0, 2.0))
    assert ones["shape"] == str(list(shape)) and ones["sha256"] != twos["sha256"]


def test_stacked_matrices_start_as_linear_layers_do() -> None:
    class Stacked(nn.Module):
        matrix_parameters = ("weight",)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, 40, 50))

    both = nn.ModuleDict({"a": Stacked(), "b": nn.Linear(50, 40)})
    initialise(both, seed=0, std=0.1)
    assert float(both.a.weight.detach().std()) == pytest.approx(0.1, rel=0.05)
    again = Stacked()
    initialise(nn.ModuleDict({"a": again}), seed=0, std=0.2)
    assert torch.allclose(again.weight, 2 * both.a.weight)
    again.gain = nn.Parameter(torch.empty(2))
    with pytest.raises(PluginError, match="reset_parameters"):
        initialise(again, seed=0, std=0.1)
