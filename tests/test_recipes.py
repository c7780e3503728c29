"""Every recipe that is shipped: what it resolves to, and that it builds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
import torch
from helpers import shipped_recipes
from processes import run

from lswt_core.errors import RecipeError
from lswt_core.model.build import build_model
from lswt_core.model.components import build_optimizer, build_schedule, dims_of
from lswt_core.model.parameters import build_parameter_groups, count_parameters
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
SHIPPED = sorted(
    path.relative_to(RECIPES).as_posix()
    for path in shipped_recipes()
    if path.parent.name != "family"
)
ABLATIONS = [name for name in SHIPPED if name.startswith("ablations/")]


@pytest.mark.parametrize("name", SHIPPED)
def test_it_resolves_to_what_it_did(name: str, update_golden: bool) -> None:
    golden = GOLDEN / "recipes" / name
    resolved = Recipe.load(RECIPES / name).dump()
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(resolved)
    assert resolved == golden.read_text(), "if this is meant: pytest --update-golden"


@pytest.mark.parametrize(
    "name", [name for name in SHIPPED if name not in ("large.toml", "xl.toml", "xxl.toml")]
)
def test_it_builds(name: str) -> None:
    registry = Registry()
    for overlay in (None, "cpu"):
        recipe = Recipe.load(RECIPES / name, overlay=overlay, registry=registry)
        built = build_model(recipe, registry, device=torch.device("cpu"), dtype=torch.float32)
        assert all(parameter.is_meta for parameter in built.loss.parameters())
        assert build_optimizer(recipe, registry, built.loss).param_groups
        assert 0 < build_schedule(recipe, registry).factor(1) <= 1


VARIANTS = {  # of the original's models: overrides of a recipe
    "reg16_trainable": [],
    "default_reg16_frozen": ["embedding.trainable=false"],
    "reg0_trainable": ["memory.registers=false"],
    "reg16_nobias_trainable": ["model.bias=false"],
    "reg16_gelu_trainable": ["ffn.use=gelu"],
}
COUNTS = json.loads((GOLDEN / "param_counts" / "param_counts.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_the_sizes_have_the_parameters_of_the_original(size: str, variant: str) -> None:
    registry, original = Registry(), COUNTS[size]["variants"][variant]
    recipe = Recipe.load(RECIPES / f"{size}.toml", VARIANTS[variant], registry=registry)
    loss = build_model(recipe, registry, device=torch.device("cpu"), dtype=torch.float32).loss
    counts = count_parameters(loss)
    assert (counts["total"], counts["trainable"]) == (original["total"], original["trainable"])
    assert counts["by_component"]["embedding"] == original["embedding_table"]
    assert counts["by_component"]["projections"] == original["in_out_projections"]
    assert counts["by_component"].get("memory.registers", 0) == original["registers"]
    groups = {
        group["name"]: sum(p.numel() for p in group["params"])
        for group in build_parameter_groups(loss)
    }
    assert groups == {"decayed": original["decayed"], "undecayed": original["not_decayed"]}
    if variant == "reg16_trainable":
        assert dims_of(recipe).d_ffn == 4 * recipe.model.d_model and counts["total"] == SIZES[size]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_data_set_of_the_hub_has_the_subset_it_is_asked_for(name: str) -> None:
    """A recipe that takes another data set inherits the subset of its parent's, unless it says
    otherwise.
    """
    options = Recipe.load(RECIPES / name).one("data").options
    subsets = {"HuggingFaceFW/fineweb-edu": "sample-100BT", "monology/pile-uncopyrighted": ""}
    assert options.get("subset", "") == subsets.get(options.get("path", ""), "")


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_one_swap(name: str) -> None:
    text = tomli.loads((RECIPES / name).read_text())
    assert len(text) == 2 and "extends" in text, "extends and one table"


def test_every_kind_of_component_has_an_ablation() -> None:
    swapped = {
        next(key for key in tomli.loads((RECIPES / name).read_text()) if key != "extends")
        for name in ABLATIONS
    }
    assert {
        "positional",
        "memory",
        "attention",
        "qk_norm",
        "ffn",
        "norm",
        "loss",
        "optimizer",
        "schedule",
        "data",
        "tokenizer",
    } <= swapped


@pytest.mark.slow
def test_a_plan_is_one_json_object() -> None:
    report = json.loads(run("lswt_core", "plan", "small.toml", "--json", cwd=RECIPES).stdout)
    assert report["parameters"]["total"] == report["parameters"]["trainable"] == SIZES["small"]
    assert report["parameters"]["by_component"]["memory.registers"] == 18 * 2 * 16 * 1024
    need = report["memory"]
    assert need["weights"] == need["gradients"] == 4 * SIZES["small"]
    assert need["optimizer"] == pytest.approx(8 * SIZES["small"], rel=1e-3)
    assert need["memories"] == 2 * 480 * 18 * 2 * 2048 * 1024 * (
        4 if report["precision"] == "float32" else 2
    )
    assert need["total"] == sum(
        size for part, size in need.items() if part not in ("total", "available", "largest_micro")
    )


def test_a_frozen_table_takes_half_the_bytes_and_nothing_to_train() -> None:
    words = ["embedding.trainable=false", "train.precision=float32", "--json"]
    report = json.loads(run("lswt_core", "plan", "small.toml", *words, cwd=RECIPES).stdout)
    original = json.loads((GOLDEN / "param_counts" / "param_counts.json").read_text())["small"][
        "variants"
    ]["default_reg16_frozen"]
    table = 50_272 * 768
    trained = SIZES["small"] - table
    assert (
        report["parameters"]["trainable"]
        == trained
        == original["decayed"] + original["not_decayed"]
    )
    assert report["memory"]["weights"] == 4 * trained + 2 * table
    assert report["memory"]["gradients"] == 4 * trained
    assert report["memory"]["cast_weights"] == 4 * table
    assert report["memory"]["optimizer"] == pytest.approx(8 * trained, rel=1e-3)


@pytest.mark.slow
def test_planning_and_listing_import_nothing_slow() -> None:
    program = (
        "import sys; from lswt_core.__main__ import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    for words, allowed in (
        (["plugins", "list"], ["torch"]),  # each is imported, to say whether it can be
        (["plugins", "describe", "positional/rope"], ["torch"]),
        (["plugins", "new", "swiglu", "--kind", "ffn"], []),  # refused: it exists
        (["resolve", str(RECIPES / "tiny.toml")], []),
        (["plan", str(RECIPES / "quickstart.toml")], ["torch"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == str(allowed), words


@pytest.mark.parametrize(
    ("table", "use"),
    [
        ("loss.half", "z-loss"),
        ('loss."z.loss"', "z-loss"),
        ("memory.train", "registers"),
        ("layers.0.memory.pop", "registers"),
    ],
)
def test_a_name_that_no_submodule_can_have_is_refused(table: str, use: str) -> None:
    recipe = Recipe.load(
        RECIPES / "quickstart.toml", ["memory.registers=false", f"{table}.use={use}"]
    )
    with pytest.raises(RecipeError, match="cannot be called") as caught:
        build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float32)
    (problem,) = caught.value.problems
    assert problem.where.endswith("quickstart.toml" if "layers" in table else "command line")
