"""Recipes by name: those of this package, of plugin packages, and the user's own, which win."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli
from helpers import ROOT

from lswt_core.__main__ import build_parser, main
from lswt_core.cli.ablate import read_arms
from lswt_core.cli.recipes import description
from lswt_core.errors import RecipeError
from lswt_core.recipe import Recipe
from lswt_core.recipe.packaged import own_recipes
from lswt_core.registry import Registry

REGISTRY = Registry()
SHIPPED = ROOT / "recipes"


def load(recipe: str | Path, *overrides: str) -> Recipe:
    return Recipe.load(recipe, overrides, registry=REGISTRY)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a plugin and a recipe "theirs:fast"; the path of its recipe."""
    package = tmp_path / "site" / "theirs_package"
    recipe = package / "recipes" / "fast.toml"
    recipe.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('recipes need no import')\n")
    recipe.write_text('# Short.\nextends = "base.toml"\n[train]\nsteps = 7\n')
    (recipe.parent / "base.toml").write_text('extends = "lswt:quickstart"\n')
    facts = tmp_path / "site" / "theirs-2.0.dist-info"
    facts.mkdir()
    facts.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 2.0\n")
    facts.joinpath("entry_points.txt").write_text("[lswt]\nfast = theirs_package\n")
    monkeypatch.syspath_prepend(package.parent)
    return recipe


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "tiny.toml",
        "recipes/tiny.toml",
        "./recipes/tiny.toml",
        "lswt:tiny",
        "lswt:tiny.toml",
    ],
)
def test_a_shipped_recipe_is_found_from_any_folder(name: str) -> None:
    recipe = load(name)
    assert (recipe.name, recipe.source) == ("tiny", str(SHIPPED / "tiny.toml"))
    assert recipe == load(SHIPPED / "tiny.toml")


def test_a_local_file_wins(empty_folder: Path) -> None:
    (empty_folder / "recipes").mkdir()
    (empty_folder / "recipes" / "tiny.toml").write_text("train.steps = 2")
    assert load("tiny").source == load("recipes/tiny.toml").source == "recipes/tiny.toml"
    (empty_folder / "tiny.toml").write_text("train.steps = 3")
    (empty_folder / "tiny").mkdir()  # a folder is no recipe
    assert (load("tiny").train.steps, load("tiny.toml").train.steps) == (3, 3)
    assert load("lswt:tiny").source == str(SHIPPED / "tiny.toml")


def test_a_broken_local_file_is_not_passed_over(empty_folder: Path) -> None:
    (empty_folder / "tiny.toml").symlink_to("nowhere.toml")
    with pytest.raises(RecipeError):
        load("tiny.toml")


def test_a_recipe_extends_a_packaged_one_from_any_folder(empty_folder: Path) -> None:
    path = empty_folder / "mine.toml"
    path.write_text('extends = "lswt:ablations/gelu"\n[train]\nsteps = 5\n')
    recipe = load(path)
    assert (recipe.one("ffn").name, recipe.train.steps) == ("gelu", 5)
    width = recipe.explain("model.d_model")[-1][1]
    assert width.where.startswith(f"{SHIPPED / 'quickstart.toml'}:")


def test_relative_and_absolute_paths_lead_anywhere(tmp_path: Path, empty_folder: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    base = tmp_path / "elsewhere" / "base.toml"
    base.write_text("train.steps = 4")
    (empty_folder / "up.toml").write_text("extends = '../elsewhere/base.toml'")
    (empty_folder / "absolute.toml").write_text(f"extends = '{base}'")
    assert load("up.toml").train.steps == load("absolute.toml").train.steps == 4
    assert load("up.toml").explain("train.steps")[-1][1].where == "../elsewhere/base.toml:1"


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("lswt:tinny", 'did you mean "lswt:tiny"?'),
        ("lswt:../recipes/tiny", "lswt_core recipes"),
        ("nobody:tiny", "lswt"),
        ("tinny", "did you mean tiny?"),
    ],
)
def test_an_unknown_name_is_answered_with_known_ones(
    name: str, fix: str, empty_folder: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(name)
    assert fix in caught.value.problems[0].fix
    (empty_folder / "mine.toml").write_text(f'\nextends = "{name}"')
    with pytest.raises(RecipeError) as caught:
        load("mine.toml")
    assert caught.value.problems[0].where == "mine.toml:2"


def test_a_plugin_package_ships_recipes(
    stranger: Path, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load("theirs:fast")
    assert (recipe.name, recipe.source, recipe.train.steps) == ("fast", str(stranger), 7)
    (empty_folder / "mine.toml").write_text('extends = "theirs:fast"')
    assert load("mine.toml").train.steps == 7

    assert main(["recipes", "list", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert {"quickstart", "tiny", "ablations/gelu", "theirs:fast", "theirs:base"} <= set(listed)
    assert listed["theirs:fast"] == {
        "name": "theirs:fast",
        "qualified": "theirs:fast",
        "version": "2.0",
        "path": str(stranger),
        "what": "Short.",
    }
    assert main(["plugins", "list", "--json"]) == 0
    in_plugins = json.loads(capsys.readouterr().out)["recipes"]
    assert [one["name"] for one in in_plugins] == ["theirs:base", "theirs:fast"]
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["theirs:fast", "Short."] for line in lines)


def test_every_shipped_recipe_says_what_it_is_in_its_first_line() -> None:
    for recipe in own_recipes().values():
        sentence = description(recipe.path)
        assert (
            0 < len(sentence) < 140
            and sentence[-1] not in ":;,"
            and sentence.count("(") == sentence.count(")")
        )


def test_an_ablation_takes_recipes_by_name(stranger: Path, empty_folder: Path) -> None:
    words = ["ablate", "quickstart", "--arm", "theirs:fast", "--arm", "recipes/ablations/gelu.toml"]
    name, arms, _ = read_arms(build_parser().parse_args(words))
    assert name == "quickstart"
    assert [load(arm.path).source for arm in arms] == [
        str(SHIPPED / "quickstart.toml"),
        str(stranger),
        str(SHIPPED / "ablations" / "gelu.toml"),
    ]
    study = empty_folder / "study.toml"
    study.write_text('recipe = "recipes/quickstart.toml"\n[arm.one]\nrecipe = "theirs:fast"\n')
    name, (baseline, arm), _ = read_arms(build_parser().parse_args(["ablate", str(study)]))
    assert name == "study"
    assert (baseline.path, arm.path) == (SHIPPED / "quickstart.toml", stranger)


@pytest.mark.parametrize("name", ["quickstart", "small", "ablations/gelu", "theirs:fast"])
def test_a_copy_resolves_to_what_it_was_copied_from(
    name: str, stranger: Path, empty_folder: Path
) -> None:
    assert main(["recipes", "copy", name, "mine.toml"]) == 0
    assert load("mine.toml") == load(name)
    assert main(["recipes", "copy", name, "mine.toml"]) == 2  # it exists


def test_a_copy_is_named_like_its_source_and_keeps_its_text(empty_folder: Path) -> None:
    assert main(["recipes", "copy", "quickstart"]) == 0
    assert (empty_folder / "quickstart.toml").read_text() == (
        SHIPPED / "quickstart.toml"
    ).read_text()
    assert main(["recipes", "copy", "small"]) == 0
    copied = (empty_folder / "small.toml").read_text()
    assert tomli.loads(copied)["extends"] == "lswt:family/lswt"
    assert copied.splitlines()[0] == (SHIPPED / "small.toml").read_text().splitlines()[0]


def test_a_command_says_which_file_a_name_stands_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resolve", "tiny"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"recipe tiny: {SHIPPED / 'tiny.toml'}\n"
    assert tomli.loads(shown.out)["model"]["n_layers"] == 12
    assert main(["resolve", str(SHIPPED / "tiny.toml")]) == 0
    assert capsys.readouterr().err == ""
