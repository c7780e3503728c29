"""Every recipe that is shipped: what it resolves to, and that it builds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
import torch

from lswt_core.assemble import assemble, build_optimizer, build_schedule, describe_groups, dimensions, parameter_groups
from lswt_core.parallel import World
from lswt_core.plan import plan
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
GOLDEN = Path(__file__).parent / "golden"
SIZES = {
    "tiny": 153_489_408,
    "small": 343_078_912,
    "medium": 948_750_336,
    "large": 2_461_294_592,
    "xl": 7_298_322_432,
    "xxl": 12_939_452_416,
}
SHIPPED = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.toml") if path.parent.name != "family")
ABLATIONS = [name for name in SHIPPED if name.startswith("ablations/")]


@pytest.mark.parametrize("name", SHIPPED)
def test_it_resolves_to_what_it_did(name: str, update_golden: bool) -> None:
    golden = GOLDEN / "recipes" / name
    resolved = Recipe.load(RECIPES / name).dump()
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(resolved)
    assert resolved == golden.read_text(), "if this is meant: pytest --update-golden"


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in ("large.toml", "xl.toml", "xxl.toml")])
def test_it_builds(name: str) -> None:
    registry = Registry()
    for overlay in (None, "cpu"):
        recipe = Recipe.load(RECIPES / name, overlay=overlay, registry=registry)
        built = assemble(recipe, registry, device=torch.device("cpu"), dtype=torch.float32)
        assert all(parameter.is_meta for parameter in built.loss.parameters())
        assert build_optimizer(recipe, registry, built.loss).param_groups
        assert 0 < build_schedule(recipe, registry).factor(1) <= 1


COUNTS = json.loads((GOLDEN / "param_counts" / "param_counts.json").read_text())


@pytest.mark.parametrize("trainable, variant", [("true", "reg16_trainable"), ("false", "default_reg16_frozen")])
@pytest.mark.parametrize("size", SIZES)
def test_a_plan_counts_the_parameters_of_the_original(size: str, trainable: str, variant: str) -> None:
    short = ["train.context=8", "memory.xl=false"]  # plan also measures memory and work, which take longer the more tokens there are
    registry = Registry()
    recipe = Recipe.load(RECIPES / f"{size}.toml", [f"embedding.trainable={trainable}", *short], registry=registry)
    found, original = plan(recipe, registry, World())["parameters"], COUNTS[size]["variants"][variant]
    assert found["total"] == sum(found["by_component"].values()) == original["total"] == SIZES[size]
    assert found["trainable"] == original["trainable"]
    assert found["by_component"]["embedding"] == original["embedding_table"]
    assert found["by_component"]["projections"] == original["in_out_projections"]
    assert found["by_component"]["memory.registers"] == original["registers"]
    assert dimensions(recipe).d_ffn == 4 * recipe.model.d_model


@pytest.mark.parametrize("variant", ["reg16_trainable", "default_reg16_frozen"])
@pytest.mark.parametrize("size", SIZES)
def test_as_many_parameters_decay_as_in_the_original(size: str, variant: str) -> None:
    registry, original = Registry(), COUNTS[size]["variants"][variant]
    trainable = str("trainable" in variant).lower()
    recipe = Recipe.load(RECIPES / f"{size}.toml", [f"embedding.trainable={trainable}"], registry=registry)
    groups = parameter_groups(assemble(recipe, registry, device=torch.device("cpu"), dtype=torch.float32).loss)
    decayed, undecayed = (count for _, _, count, _ in describe_groups(groups))
    assert (decayed, undecayed) == (original["decayed"], original["not_decayed"])


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_one_swap(name: str) -> None:
    text = tomli.loads((RECIPES / name).read_text())
    assert len(text) == 2 and "extends" in text, "extends and one table"


def test_every_kind_of_component_has_an_ablation() -> None:
    swapped = {next(key for key in tomli.loads((RECIPES / name).read_text()) if key != "extends") for name in ABLATIONS}
    assert {"positional", "memory", "attention", "ffn", "norm", "loss", "optimizer", "schedule", "data", "tokenizer"} <= swapped


def test_a_plan_is_one_json_object() -> None:
    words = [sys.executable, "-m", "lswt_core", "plan", str(RECIPES / "small.toml"), "--json"]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert found["parameters"]["total"] == found["parameters"]["trainable"] == SIZES["small"]
    assert found["parameters"]["by_component"]["memory.registers"] == 18 * 2 * 16 * 1024
    need = found["memory"]
    assert need["weights"] == need["gradients"] == 4 * SIZES["small"]
    assert need["optimizer"] == pytest.approx(8 * SIZES["small"], rel=1e-3)
    assert need["memories"] == 2 * 480 * 18 * 2 * 2048 * 1024 * (4 if found["precision"] == "float32" else 2)
    assert need["total"] == sum(size for part, size in need.items() if part not in ("total", "available"))


def test_planning_and_listing_import_nothing_slow() -> None:
    program = (
        "import sys; from lswt_core.__main__ import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    for words, allowed in (
        (["plugins", "list"], []),
        (["plugins", "describe", "positional/rope"], []),
        (["resolve", str(RECIPES / "tiny.toml")], []),
        (["plan", str(RECIPES / "quickstart.toml")], ["torch"]),
    ):
        done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == str(allowed), words
