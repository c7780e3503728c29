"""Components of single layers: how they are selected, merged and written down, and that the model
is built so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
from helpers import distance, stream, tokens

from lswt_core.errors import Incompatible
from lswt_core.model.build import BuiltModel, build_model
from lswt_core.model.decoder import Decoder
from lswt_core.model.initialise import initialise
from lswt_core.recipe import Recipe
from lswt_core.recipe.layer_selectors import select, spell
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.train.announce import announce_recipe

BASE = """
[model]
d_model = 16
n_layers = 8
n_heads = 2
[embedding]
vocab_size = 29
d_vocab = 8
[memory.registers]
count = 2
[memory.xl]
use = "xl-cache"
length = 16
[train]
steps = 1
"""
INTERLEAVED = """
[layers."every 4".positional]
use = "none"
[layers."0-1,7".ffn]
use = "gelu"
[layers."every 2".memory]
xl = false
[layers."every 2 from 0".memory.xl]
length = 8
[layers."5".memory.registers]
count = 3
[layers.0.norm]
use = "rmsnorm"
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of the given text that extends BASE."""

    def loaded(text: str, *overrides: str) -> Recipe:
        (tmp_path / "base.toml").write_text(BASE)
        (tmp_path / "mine.toml").write_text(f'extends = "base.toml"\n{text}')
        return Recipe.load(tmp_path / "mine.toml", overrides)

    return loaded


def assembled(recipe: Recipe) -> BuiltModel:
    return build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float32)


def decoder_of(recipe: Recipe) -> Decoder:
    decoder = assembled(recipe).loss.decoder.to_empty(device="cpu").double()
    initialise(decoder, seed=0, std=0.4)
    return decoder


@pytest.mark.parametrize(
    ("selector", "layers"),
    [
        ("3", [3]),
        ("0-3", [0, 1, 2, 3]),
        ("6, 0 - 1", [0, 1, 6]),
        ("every 4", [3, 7]),
        ("every 3 from 1", [1, 4, 7]),
        ("every 1", list(range(8))),
        ("0,every 4", [0, 3, 7]),
    ],
)
def test_selectors(selector: str, layers: list[int]) -> None:
    assert select(selector, 8) == layers
    assert select(spell(layers), 8) == layers


@pytest.mark.parametrize(
    "selector",
    [
        "",
        "8",
        "0-8",
        "4-2",
        "every",
        "every 0",
        "every 9",
        "every 2 from 8",
        "-1",
        "0;1",
        "all",
        "0,9",
    ],
)
def test_a_selector_that_names_no_layer_is_refused(selector: str) -> None:
    with pytest.raises(ValueError, match=r"layers|before|moves on"):
        select(selector, 8)


def test_every_layer_is_built_as_its_selectors_say(load: Callable[..., Recipe]) -> None:
    decoder = assembled(load(INTERLEAVED)).loss.decoder
    blocks: list[Any] = list(decoder.blocks)
    assert decoder.positional.name == "rope"
    assert [None if b.positional is None else b.positional.name for b in blocks] == [
        None,
        None,
        None,
        "none",
        None,
        None,
        None,
        "none",
    ]
    assert "".join(b.ffn.name[0] for b in blocks) == "ggsssssg"
    assert [dict(b.attention.memory.items()).keys() for b in blocks] == [
        {"registers", "xl"},
        {"registers"},
    ] * 4
    assert [b.attention.memory["xl"].length for b in blocks[::2]] == [8, 8, 8, 8]
    assert [b.attention.memory["registers"].keys.shape[0] for b in blocks] == [
        2,
        2,
        2,
        2,
        2,
        3,
        2,
        2,
    ]
    assert [b.ffn_norm.name for b in blocks] == ["rmsnorm", *["layernorm"] * 7]
    assert {decoder.input_norm.name, decoder.output_norm.name} == {"layernorm"}, (
        "the trunk's own norms belong to no layer"
    )


def test_the_resolved_recipe_is_the_same_recipe(
    load: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = load(INTERLEAVED)
    dumped = recipe.dump()
    assert tomli.loads(dumped)["layers"]["5"]["memory"] == {
        "xl": False,
        "registers": {"use": "registers", "count": 3, "weight_decay": True},
    }
    (tmp_path / "again.toml").write_text(dumped)
    again = Recipe.load(tmp_path / "again.toml")
    assert again == recipe and again.dump() == dumped
    assert Recipe.from_dict(recipe.resolved()) == recipe


def test_a_selector_that_changes_nothing_leaves_no_trace(load: Callable[..., Recipe]) -> None:
    assert load(
        '[layers."every 2".memory.xl]\nlength = 16\n[layers.0.ffn]\nuse = "swiglu"'
    ) == load("")


def test_a_layer_alone_is_that_component_in_all_layers_where_it_names_all(
    load: Callable[..., Recipe],
) -> None:
    special = load(
        '[layers.0-7.ffn]\nuse = "gelu"\n[layers.0-7.positional]\nuse ='
        ' "none"\n[layers.0-7.memory]\nxl = false'
    )
    plain = load('[ffn]\nuse = "gelu"\n[positional]\nuse = "none"\n[memory]\nxl = false')
    ids = tokens(2, 9)
    assert distance(decoder_of(special)(ids)[0], decoder_of(plain)(ids)[0]) == 0


def test_segments_give_what_one_call_gives(load: Callable[..., Recipe]) -> None:
    text = (
        '[layers."every 4".positional]\nuse = "none"\n[layers."0,5".ffn]\nuse ='
        ' "gelu"\n[layers."2".memory]\nregisters = false'
    )
    decoder, ids = decoder_of(load(text)), tokens(2, 12)
    whole = decoder(ids)[0]
    for size in (1, 5, 12):
        assert distance(stream(decoder, ids, size), whole) < 1e-12


def test_a_value_of_a_layer_is_explained(load: Callable[..., Recipe]) -> None:
    recipe = load(INTERLEAVED, "layers.5.memory.registers.count=4")
    history = recipe.explain('layers."5".memory.registers.count')
    assert [value for value, _ in history] == [16, 2, 3, 4]
    assert [origin.where.rpartition("/")[2] for _, origin in history] == [
        "default",
        "base.toml:10",
        "mine.toml:12",
        "command line",
    ]
    assert recipe.explain("layers.4.memory.registers.count")[-1][0] == 2, (
        "any layer can be asked for"
    )
    assert [value for value, _ in recipe.explain("layers.1.memory.xl")] == [False]


def test_files_and_command_line_change_a_selector_of_the_same_name(
    load: Callable[..., Recipe],
) -> None:
    recipe = load(
        '[layers."every 4".memory.xl]\nlength = 4',
        'layers."every 4".memory.xl.length=6',
        'layers."every 4".ffn.use="gelu"',
    )
    assert recipe.resolved()["layers"] == {
        "3,7": {
            "ffn": {"use": "gelu", "bias": True},
            "memory": {"xl": {"use": "xl-cache", "length": 6}},
        }
    }


def test_all_components_are_known(load: Callable[..., Recipe]) -> None:
    recipe = load('[layers.0.ffn]\nuse = "gelu"\n[layers.1.attention]\nuse = "eager"')
    assert [one.name for one in recipe.every("ffn")] == ["swiglu", "gelu"]
    built = assembled(recipe)
    assert built.attention == "blocked, eager"
    assert [block.attention.backend.name for block in built.loss.decoder.blocks][:3] == [
        "blocked",
        "eager",
        "blocked",
    ]  # type: ignore[union-attr]


def test_a_backend_of_one_layer_must_be_able_too(load: Callable[..., Recipe]) -> None:
    with pytest.raises(Incompatible, match=r"\[attention\] flash"):
        assembled(load('[layers.1.attention]\nuse = "flash"'))


def test_a_run_says_what_differs_in_single_layers(capsys: pytest.CaptureFixture[str]) -> None:
    tables = {"train": {"steps": 1}, "layers": {"0-1": {"ffn": {"use": "gelu"}}}}
    announce_recipe(Console(), Recipe.from_dict(tables))
    assert "layers 0-1: ffn.use=gelu" in capsys.readouterr().out
