"""Parametrisations and parameter groups: factors, initial values, and what the optimizer gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lswt_parametrisations import MaximalUpdate, Spectral
from torch import nn

from lswt_core.__main__ import main
from lswt_core.errors import Incompatible
from lswt_core.interfaces import Scaling
from lswt_core.model.build import build_model, materialise
from lswt_core.model.components import build_optimizer
from lswt_core.model.train_module import TrainModule
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

CPU = torch.device("cpu")
REGISTRY = Registry()


def recipe_of(width: int, **tables: Any) -> Recipe:
    """A model of heads 8 wide."""
    return Recipe.from_dict(
        {
            "model": {"d_model": width, "n_heads": width // 8, "n_layers": 1, "d_ffn": 3 * width},
            "embedding": {"vocab_size": 31, "d_vocab": 12},
            "memory": {"registers": {"count": 2}},
            "optimizer": {"use": "adamw", "lr": 0.01, "weight_decay": 0.1},
            "train": {"steps": 1, "batch_size": 2, "seq_len": 8},
            **tables,
        },
        registry=REGISTRY,
    )


def model_of(recipe: Recipe) -> TrainModule:
    """The model with its initial values."""
    loss = build_model(recipe, REGISTRY, device=CPU, dtype=torch.float32).loss
    materialise(loss, recipe, CPU)
    return loss


def mup(width: int, base: int = 16, **options: Any) -> dict[str, Any]:
    """The table of a muP recipe."""
    return {"parametrisation": {"use": "mup", "base_d_model": base, **options}}


HIDDEN = "decoder.blocks.0.attention.query.weight"
INPUT, OUTPUT = "decoder.vocabulary.input.weight", "decoder.vocabulary.output.weight"
TABLE, BIAS = "decoder.vocabulary.table.weight", "decoder.blocks.0.attention.query.bias"
REGISTERS = "decoder.blocks.0.attention.memory.registers.keys"


def test_mup_is_table_3_of_the_paper() -> None:
    scalings = model_of(recipe_of(64, **mup(64))).scalings
    assert scalings[HIDDEN] == Scaling(init=0.5, lr=0.25, weight_decay=4.0)
    assert scalings["decoder.blocks.0.ffn.fc2.weight"] == Scaling(0.5, 0.25, 4.0)
    assert scalings[OUTPUT] == Scaling(init=0.25, lr=0.25, weight_decay=4.0)
    names = {name for name, _ in model_of(recipe_of(64)).named_parameters()}
    assert {INPUT, TABLE, BIAS, REGISTERS} <= names - scalings.keys()
    assert {name.rpartition(".")[2] for name in scalings} == {"weight"}


def test_the_base_model_is_the_standard_one() -> None:
    standard, base = model_of(recipe_of(16)), model_of(recipe_of(16, **mup(16)))
    assert not base.scalings
    for (name, one), other in zip(standard.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_initial_values_are_the_standard_ones_times_their_factors() -> None:
    standard, scaled = model_of(recipe_of(64)), model_of(recipe_of(64, **mup(64)))
    for (name, one), other in zip(standard.named_parameters(), scaled.parameters(), strict=True):
        factor = scaled.scalings.get(name, Scaling()).init
        assert torch.equal(one * factor, other), name


def test_spectral_is_mup_where_all_widths_grow_alike() -> None:
    one = model_of(recipe_of(64, **mup(64))).scalings
    other = model_of(
        recipe_of(64, parametrisation={"use": "spectral", "base_d_model": 16})
    ).scalings
    assert one.keys() == other.keys()
    for name, scaling in one.items():
        assert scaling == pytest.approx(other[name])


def test_a_base_model_of_broken_sizes_is_refused() -> None:
    with pytest.raises(Incompatible, match="base_d_model"):
        model_of(recipe_of(64, **mup(64, base=20)))


def groups_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The optimizer's group of every parameter."""
    optimizer = build_optimizer(recipe, REGISTRY, model_of(recipe))
    return {name: group for group in optimizer.param_groups for name in group["names"]}


def test_the_optimizer_gets_the_factors() -> None:
    groups = groups_of(recipe_of(64, **mup(64)))
    assert groups[HIDDEN]["lr"] == pytest.approx(0.0025)
    assert groups[HIDDEN]["weight_decay"] == pytest.approx(0.4)
    assert groups[INPUT]["lr"] == groups[BIAS]["lr"] == 0.01
    kept = groups_of(recipe_of(64, **mup(64, independent_weight_decay=False)))
    assert kept[HIDDEN]["weight_decay"] == 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sophia-g"])
def test_roles_have_rates_of_their_own(optimizer: str) -> None:
    groups = {"embedding": {"lr_factor": 0.1, "weight_decay": 0.3}, "vectors": {"lr_factor": 2.0}}
    chosen = {"use": optimizer, "lr": 0.01, "weight_decay": 0.1}
    plain = groups_of(recipe_of(16, optimizer=chosen))
    changed = groups_of(recipe_of(16, optimizer=chosen, groups=groups))
    for name, factor in ((TABLE, 0.1), (BIAS, 2.0), (HIDDEN, 1.0), (INPUT, 1.0)):
        assert changed[name]["lr"] == pytest.approx(factor * plain[name]["lr"])
    assert (plain[TABLE]["weight_decay"], changed[TABLE]["weight_decay"]) == (0.0, 0.3)
    assert changed[BIAS]["weight_decay"] == 0.0


def test_without_tables_the_groups_are_the_two_of_old() -> None:
    recipe = recipe_of(16)
    optimizer = build_optimizer(recipe, REGISTRY, model_of(recipe))
    assert [group["name"] for group in optimizer.param_groups] == ["decayed", "undecayed"]
    assert not any("factor" in key for group in optimizer.param_groups for key in group)


class Odd(nn.Module):
    """Weights that only its author knows to be matrices."""

    matrix_parameters = ("experts",)

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.other = nn.Parameter(torch.ones(2, 4, 8)), nn.Parameter(torch.ones(4, 8))


def test_a_module_declares_its_matrices() -> None:
    from lswt_core.model.parametrise import parameter_roles

    assert dict(parameter_roles(Odd())) == {
        "experts": ("matrix", (2, 4, 8)),
        "other": ("other", (4, 8)),
    }
    assert MaximalUpdate().base_d_model == Spectral().base_d_model


# ---------- the coordinate check


def coord_check(
    capsys: pytest.CaptureFixture[str], path: Path, use: str, *words: str
) -> dict[str, Any]:
    """What the command prints as JSON."""
    overrides = [f"parametrisation.use={use}", *words]
    command = ["coord-check", str(path), *overrides, "--widths", "32,128", "--steps", "3", "--json"]
    assert main(command) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A recipe whose learning rate is high enough for widths to differ after a few updates."""
    path = tmp_path / "nano.toml"
    recipe = recipe_of(64, optimizer={"use": "adamw", "lr": 0.01})
    path.write_text(recipe.dump().replace("base_d_model", "# "))
    return path


def test_activations_grow_with_the_width_unless_the_parametrisation_is_mup(
    nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    standard = coord_check(capsys, nano, "standard")
    mup_ = coord_check(capsys, nano, "mup", "parametrisation.base_d_model=32")
    growth = [
        {one["place"]: one["exponent"] for one in report["growth"] if one["step"] == 3}
        for report in (standard, mup_)
    ]
    assert growth[0]["logits"] > 0.5 > 0.2 > growth[1]["logits"]
    assert (standard["stable"], mup_["stable"]) == (False, True)
    first = {one["place"]: one["size"] for one in standard["sizes"] if one["width"] == 32}
    base = {one["place"]: one["size"] for one in mup_["sizes"] if one["width"] == 32}
    assert first == base  # the base model is the standard one


def test_a_width_without_whole_heads_is_refused(
    nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coord-check", str(nano), "--widths", "16,20"]) == 2
    assert "multiple of the recipe's head width, 8" in capsys.readouterr().err
    assert main(["coord-check", str(nano), "--widths", "16"]) == 2
