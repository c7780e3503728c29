"""Options that are components: how annotations are read, how recipes write them, what constructors
get, and that everything that asks for a recipe's components finds them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import distance

from lswt_core.errors import PluginError, RecipeError
from lswt_core.model.build import build_decoder_spec, build_model
from lswt_core.model.code_fingerprint import fingerprint_components
from lswt_core.model.components import build_component, build_schedule, dims_of
from lswt_core.model.initialise import initialise
from lswt_core.recipe import Recipe
from lswt_core.recipe.swap_syntax import overrides_of
from lswt_core.registry import REQUIRED, Registry
from lswt_core.registry.component_option import ComponentOption

FILE = Path(__file__).with_name("option_parts.py")
REGISTRY = Registry(files=[FILE])
CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
BASE = """
[model]
d_model = 16
n_heads = 2
n_layers = 3
d_ffn = 24
[embedding]
vocab_size = 61
d_vocab = 8
[train]
steps = 3
"""
CHAIN = """
[ffn]
use = "chain"
[ffn.layers.b]
use = "wrapped"
times = 3.0
[ffn.layers.b.inner]
use = "gelu"
bias = false
[ffn.layers.swiglu]
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """A recipe of a text over BASE, given once and extended by a second file."""

    def loaded(text: str, more: str = "", *overrides: str) -> Recipe:
        (tmp_path / "base.toml").write_text(BASE + text)
        (tmp_path / "mine.toml").write_text(f'extends = "base.toml"\n{more}')
        return Recipe.load(tmp_path / "mine.toml", overrides, registry=REGISTRY)

    return loaded


def problems_of(load: Any, text: str, more: str = "", *overrides: str) -> list[Any]:
    with pytest.raises(RecipeError) as caught:
        load(text, more, *overrides)
    return list(caught.value.problems)


# ---------- annotations

SHAPES = {
    "FeedForward": ComponentOption("ffn"),
    "interfaces.FeedForward | None": ComponentOption("ffn", optional=True),
    "None | FeedForward": ComponentOption("ffn", optional=True),
    "Optional[Norm]": ComponentOption("norm", optional=True),
    "Tokenizer": ComponentOption("tokenizer"),
    "Callable[[Dims], FeedForward]": ComponentOption("ffn", builder=True),
    "Callable[..., Mixer] | None": ComponentOption("mixer", builder=True, optional=True),
    "Mapping[str, DataSource]": ComponentOption("data", named=True),
    "dict[str, Callable[[Dims], Norm]] | None": ComponentOption(
        "norm", builder=True, named=True, optional=True
    ),
    "Alias": ComponentOption("norm", builder=True),
}
HEAD = """
from __future__ import annotations
from collections.abc import Callable, Mapping
from typing import Optional, TypeAlias
from lswt_core import interfaces
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    DataSource, Dims, FeedForward, Memory, Mixer, Norm, Optimizer, Schedule, Tokenizer
)
Alias: TypeAlias = Callable[[Dims], Norm]
class Zebra({base}):
    name = "zebra"
    def __init__(self, dims, *, {options}) -> None: ...
@hookimpl
def lswt_components():
    return {offered}
"""


def test_annotations_read_alike_from_source_and_from_the_class(tmp_path: Path) -> None:
    options = ", ".join(
        f"o{i}: {text}" + (" = None" if shape.optional else "")
        for i, (text, shape) in enumerate(SHAPES.items())
    )
    read_options = []
    for offered in ("[Zebra]", "list((Zebra,))"):  # the second one cannot be read as text
        path = tmp_path / "zebra.py"
        path.write_text(HEAD.format(base="FeedForward", options=options, offered=offered))
        registry = Registry([], files=[path])
        (offer,) = registry.offers()
        assert [option.annotation for option in offer.options] == [*SHAPES.values()]
        assert (offer.options[0].default, offer.options[1].default) == (REQUIRED, None)
        registry.schema(offer)
        read_options.append(offer.options)
    assert read_options[0] == read_options[1]


@pytest.mark.parametrize(
    ("base", "options", "why"),
    [
        ("DataSource", "a: FeedForward", r"annotate it Callable\[\.\.\., FeedForward\]"),
        ("FeedForward", "a: Mixer", r"annotate it Callable\[\.\.\., Mixer\]"),
        ("FeedForward", "a: Schedule", r"annotate it Callable\[\.\.\., Schedule\]"),
        ("FeedForward", "a: Norm = None", r"Norm \| None"),
        ("FeedForward", "a: Norm | None = 3", r"Norm \| None"),
        ("FeedForward", "a: list[Norm]", "interfaces of components"),
    ],
)
def test_an_annotation_that_cannot_be_met_says_what_to_write(
    base: str, options: str, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "zebra.py"
    path.write_text(HEAD.format(base=base, options=options, offered="[Zebra]"))
    registry = Registry([], files=[path])
    kind = "data" if base == "DataSource" else "ffn"
    with pytest.raises(PluginError, match=why):
        registry.schema(registry.find(kind, "zebra"))


# ---------- recipes


def test_defaults_of_inner_components_are_written_out_and_load_again(
    load: Any, tmp_path: Path
) -> None:
    recipe = load(CHAIN)
    assert recipe.resolved()["ffn"] == {
        "use": "chain",
        "layers": {
            "b": {"use": "wrapped", "inner": {"use": "gelu", "bias": False}, "times": 3.0},
            "swiglu": {"use": "swiglu", "bias": True},
        },
        "last": False,
        "width": 4,
    }
    (tmp_path / "again.toml").write_text(recipe.dump())
    again = Recipe.load(tmp_path / "again.toml", registry=REGISTRY)
    assert again == recipe and again.dump() == recipe.dump()
    assert Recipe.from_dict(recipe.resolved(), registry=REGISTRY) == recipe
    assert load(CHAIN, "", "ffn.layers.b.inner.bias=true") != recipe


@pytest.mark.parametrize(
    ("more", "overrides", "inner"),
    [
        ("[ffn.layers.b.inner]\nbias = true", [], {"use": "gelu", "bias": True}),
        ("", ["ffn.layers.b.inner.use=relu2"], {"use": "relu2", "bias": True}),
        ("", ["ffn.layers.b.inner.bias=false", "ffn.layers.b.inner.use=relu2"],
         {"use": "relu2", "bias": False}),
        ("[ffn.layers.b.inner]\nuse = 'gelu'", [], {"use": "gelu", "bias": False}),
        ("", [*overrides_of("ffn.layers.b.inner.use=glu"), "ffn.layers.b.inner.activation=relu"],
         {"use": "glu", "activation": "relu", "bias": True}),
    ],
)  # fmt: skip
def test_another_inner_component_replaces_its_table_whole(
    more: str, overrides: list[str], inner: dict[str, Any], load: Any
) -> None:
    assert load(CHAIN, more, *overrides).resolved()["ffn"]["layers"]["b"]["inner"] == inner


def test_named_components_are_added_and_removed(load: Any) -> None:
    changed = load(CHAIN, "[ffn.layers]\nb = false\n[ffn.layers.a]\nuse = 'gelu'")
    assert list(changed.resolved()["ffn"]["layers"]) == ["a", "swiglu"]
    assert list(load(CHAIN, "", "ffn.layers.b=false").resolved()["ffn"]["layers"]) == ["swiglu"]
    with_last = load(CHAIN, "[ffn.last]\nuse = 'gelu'")
    assert with_last.resolved()["ffn"]["last"] == {"use": "gelu", "bias": True}
    assert load(CHAIN + "[ffn.last]\nuse = 'gelu'", "[ffn]\nlast = false") == load(CHAIN)


def test_layers_may_differ_in_inner_components(load: Any, tmp_path: Path) -> None:
    text = """
[layers."0".ffn.layers]
swiglu = false
[layers."1".ffn.layers.b.inner]
use = "swiglu"
[layers."2".ffn.last]
use = "gelu"
"""
    recipe = load(CHAIN + text)
    own = [recipe.at_layer(layer)["ffn"]["ffn"].as_table() for layer in range(3)]
    assert list(own[0]["layers"]) == ["b"]
    assert own[1]["layers"]["b"]["inner"] == {"use": "swiglu", "bias": True}
    assert own[2]["last"] == {"use": "gelu", "bias": True}
    (tmp_path / "again.toml").write_text(recipe.dump())
    again = Recipe.load(tmp_path / "again.toml", registry=REGISTRY)
    assert again == recipe
    assert [again.at_layer(layer)["ffn"]["ffn"].as_table() for layer in range(3)] == own


@pytest.mark.parametrize(
    ("text", "line", "what", "fix"),
    [
        ("[ffn]\nuse = 'wrapped' #!", "'wrapped'", 'missing key "ffn.inner"', "[ffn.inner]"),
        ("[ffn]\nuse = 'wrapped'\ninner = 'gelu'", "inner", '"ffn.inner" is a table',
         'ffn.inner.use = "gelu"'),
        ("[ffn]\nuse = 'wrapped'\n[ffn.inner]\nbias = true", "[ffn.inner]",
         'missing key "ffn.inner.use"', "use = "),
        ("[ffn]\nuse = 'wrapped'\n[ffn.inner]\nuse = 'swigul'", "swigul", 'unknown ffn "swigul"',
         'did you mean "swiglu"?'),
        ("[ffn]\nuse = 'wrapped'\n[ffn.inner]\nuse = 'gelu'\nbais = true", "bais",
         'unknown key "ffn.inner.bais"', 'did you mean "bias"?'),
        ("[ffn]\nuse = 'wrapped'\n[ffn.inner]\nuse = 'gelu'\nbias = 'yes'", "'yes'",
         'wrong value for "ffn.inner.bias"', "true or false"),
        ("[ffn]\nuse = 'wrapped'\n[ffn.inner]\nuse = 'gelu'\ntimes = 2.0", "times",
         'unknown key "ffn.inner.times"', "it belongs at ffn.times"),
        ("[ffn]\nuse = 'chain'\nlayers = 3", "3", '"ffn.layers" is a table', "[ffn.layers.NAME]"),
        ("[ffn]\nuse = 'chain'\n[ffn.layers]\na = 'gelu'", "a =", '"ffn.layers.a" is a table',
         'ffn.layers.a.use = "gelu"'),
        ("[ffn]\nuse = 'chain'\n[ffn.layers.nobody]", "nobody", 'unknown ffn "nobody"', "choose"),
        ("[loss.halved]\n[loss.halved.inner]\nuse = 'z-loss'\nweight = 2.0", "weight",
         'unknown key "loss.halved.inner.weight"', "loss.halved.weight"),
    ],
)  # fmt: skip
def test_a_problem_names_line_table_and_remedy(
    text: str, line: str, what: str, fix: str, load: Any, tmp_path: Path
) -> None:
    (problem,) = problems_of(load, text)
    assert what == problem.what and fix in problem.fix
    assert problem.where.startswith(f"{tmp_path / 'base.toml'}:") and line in problem.source


def test_problems_of_all_depths_come_at_once(load: Any) -> None:
    text = CHAIN.replace("times = 3.0", "times = -1").replace("bias = false", "bias = 0")
    problems = problems_of(load, text.replace("[ffn.layers.swiglu]", "[ffn.layers.swigul]"))
    assert [problem.what for problem in problems] == [
        'unknown ffn "swigul"',
        'wrong value for "ffn.layers.b.inner.bias"',
        'wrong value for "ffn.layers.b.times"',
    ]


def test_the_history_of_inner_values(load: Any) -> None:
    recipe = load(CHAIN, "[ffn.layers.b]\ntimes = 4.0", "ffn.layers.b.inner.bias=true")
    assert [value for value, _ in recipe.explain("ffn.layers.b.times")] == [2.0, 3.0, 4.0]
    assert [value for value, _ in recipe.explain("ffn.layers.b.inner.bias")] == [True, False, True]
    assert recipe.explain("ffn.layers.b.inner.use")[-1][0] == "gelu"
    assert [value for value, _ in recipe.explain("ffn.layers.swiglu.use")] == ["swiglu"]
    assert [value for value, _ in recipe.explain("ffn.last")] == [None]
    removed = load(CHAIN, "", "ffn.layers.b=false")
    assert removed.explain("ffn.layers.b")[-1][0] is False
    for key in ("ffn.layers", "ffn.layers.b", "ffn.layers.b.inner"):
        with pytest.raises(RecipeError, match="is a table"):
            recipe.explain(key)
    for key in ("ffn.layers.c.use", "ffn.layers.b.inner.bais", "ffn.last.bias"):
        with pytest.raises(RecipeError, match="unknown key"):
            recipe.explain(key)


def test_checking_a_recipe_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(BASE + CHAIN)
    code = f"""
import sys
from pathlib import Path
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
registry = Registry(files=[Path({str(FILE)!r})])
Recipe.load({str(tmp_path / "good.toml")!r}, registry=registry).dump()
assert "torch" not in sys.modules, "imported"
print("clean")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "clean", done.stderr


# ---------- what is built


def test_constructors_get_what_their_annotations_say(load: Any) -> None:
    recipe = load(CHAIN + "[ffn.last]\nuse = 'gelu'")
    built = build_model(recipe, REGISTRY, **CPU).loss.decoder
    ffn: Any = built.blocks[0].ffn
    assert list(ffn.layers) == ["b", "swiglu"] and type(ffn.layers["b"].inner).name == "gelu"
    assert ffn.layers["b"].inner.fc1.weight.shape == (4, 16), "built by its owner, narrower"
    assert ffn.layers["b"].inner.fc1.bias is None and ffn.layers["b"].times == 3
    assert ffn.last.fc1.weight.shape == (24, 16), "built with what its owner got"
    names = [name for name, _ in built.named_parameters() if ".last." in name]
    assert "blocks.0.ffn.last.fc1.weight" in names


def test_a_wrapped_layer_computes_what_it_says(load: Any) -> None:
    plain = load("[ffn]\nuse = 'gelu'")
    wrapped = load("[ffn]\nuse = 'wrapped'\n[ffn.inner]\nuse = 'gelu'")
    layers = []
    for recipe in (plain, wrapped):
        decoder = build_decoder_spec(recipe, REGISTRY, **CPU).build().double()
        initialise(decoder, seed=0, std=0.4)
        layers.append(decoder.blocks[0].ffn)
    one, two = layers
    two.inner.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert distance(two(x), 2 * one(x)) < 1e-12


def test_losses_and_schedules_hold_their_own_kind(load: Any) -> None:
    recipe = load(
        "[loss.halved]\nweight = 0.3\n[loss.halved.inner]\nuse = 'z-loss'\n"
        "[schedule]\nuse = 'squared'\n[schedule.inner]\nuse = 'cosine'\nwarmup_steps = 2\n"
    )
    loss = build_model(recipe, REGISTRY, **CPU).loss
    assert type(loss.auxiliary["halved"].inner).name == "z-loss" and loss.weights["halved"] == 0.3
    plain = load("[schedule]\nwarmup_steps = 2\n")
    squared = build_schedule(recipe, REGISTRY).factor(2)
    assert squared == build_schedule(plain, REGISTRY).factor(2) ** 2


def test_an_owner_that_builds_its_part_wrongly_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    text = FILE.read_text().replace("layer(narrow)", "layer(narrow, 3)")
    path.write_text(text.replace('name = "wrapped"', 'name = "wrong"'))
    registry = Registry(files=[path])
    recipe = Recipe.from_dict(
        {"train": {"steps": 1}, "ffn": {"use": "chain", "layers": {"gelu": {}}}}, registry=registry
    )
    with pytest.raises(PluginError, match=r"\[ffn\] chain .* builds \[ffn.layers.gelu\] with 2"):
        build_component(registry, recipe.one("ffn"), dims_of(recipe))


def test_inner_components_are_components_of_the_recipe(load: Any) -> None:
    recipe = load(CHAIN)
    components = {(one.kind, one.offer.name, one.table) for one in recipe.components()}
    assert ("ffn", "gelu", "ffn.layers.b.inner") in components
    assert ("ffn", "wrapped", "ffn.layers.b") in components
    assert [one.name for one in recipe.every("ffn")] == ["chain"]
    code = fingerprint_components(recipe.components(), REGISTRY, ())
    assert {"ffn/chain", "ffn/wrapped", "ffn/gelu", "ffn/swiglu"} <= code.keys()
    assert {one.distribution for one in map(REGISTRY.find, ["ffn"], ["wrapped"])} == {"file"}
