"""How recipes are merged, resolved, written down and explained."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from lswt_core.errors import PluginError, RecipeError
from lswt_core.recipe import Origin, Recipe
from lswt_core.registry import Registry

PARTS = Path(__file__).with_name("recipe_parts.py")
REGISTRY = Registry([], files=[PARTS])
BASE = """[model]
d_model = 64
n_heads = 4
[positional]
base = 10_000
[memory.registers]
count = 4
[memory.xl]
use = "xl-cache"
length = 32
[loss.simctg]
margin = 0.25
weight = 0.5
[train]
steps = 100
batch_size = 8
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """A recipe of the given text that extends BASE."""

    def loaded(text: str = "", *overrides: str, overlay: str | None = None) -> Recipe:
        (tmp_path / "base.toml").write_text(BASE)
        (tmp_path / "mine.toml").write_text(f'extends = "base.toml"\n{text}')
        return Recipe.load(tmp_path / "mine.toml", overrides, overlay=overlay, registry=REGISTRY)

    return loaded


def test_defaults_are_written_out(load: Any) -> None:
    recipe = load()
    assert recipe.name == "mine"
    assert (recipe.model.d_model, recipe.train.batch_size, recipe.sample.tokens) == (64, 8, 100)
    positional = recipe.one("positional")
    assert (positional.name, positional.table, positional.options) == (
        "rope",
        "positional",
        {"base": 10_000.0, "reversed": True},
    )
    assert isinstance(positional.options["base"], float)
    assert list(recipe.many("memory")) == ["registers", "xl"]
    assert recipe.many("memory")["xl"].offer.name == "xl-cache"
    loss = recipe.many("loss")["simctg"]
    assert (loss.options, loss.weight) == ({"margin": 0.25}, 0.5)
    # of the default list, those that are offered
    assert recipe.one("attention").options == {"prefer": ["sdpa", "eager"]}
    assert recipe.many("tracker") == {}


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("[positional]\nuse = 'alibi'", "positional", ("alibi", {"slope": -0.5})),
        ("[positional]\nuse = 'alibi'\nslope = 2", "positional", ("alibi", {"slope": 2.0})),
        (
            "[positional]\nuse = 'rope'",
            "positional",
            ("rope", {"base": 10_000.0, "reversed": True}),
        ),
        (
            "[positional]\nuse = 'file:rope'",
            "positional",
            ("file:rope", {"base": 10_000.0, "reversed": True}),
        ),
        (
            "[positional]\nreversed = false",
            "positional",
            ("rope", {"base": 10_000.0, "reversed": False}),
        ),
        (
            "[ffn]\nuse = 'gelu'\napproximate = true",
            "ffn",
            ("gelu", {"bias": True, "approximate": True}),
        ),
    ],
)
def test_another_component_replaces_the_table_whole(
    text: str, kind: str, expected: Any, load: Any
) -> None:
    chosen = load(text).one(kind)
    assert (chosen.name, chosen.options) == expected


def test_replacement_in_stacks(load: Any) -> None:
    assert load("[memory.xl]\nlength = 5").many("memory")["xl"].options == {
        "length": 5,
        "kept": None,
    }
    replaced = load("[memory.xl]\nuse = 'registers'").many("memory")
    assert list(replaced) == ["registers", "xl"] and replaced["xl"].options == {"count": 16}
    assert load("[memory.registers]\nuse = 'registers'").many("memory")["registers"].options == {
        "count": 4
    }


def test_removal(load: Any) -> None:
    assert list(load("[memory]\nxl = false").many("memory")) == ["registers"]
    assert load("", "memory.xl=false", "loss.simctg=false").many("loss") == {}
    again = load("[memory]\nxl = false", "memory.xl.use=xl-cache")
    # nothing of the removed one comes back
    assert again.many("memory")["xl"].options["length"] == 2048


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("train.steps=7", "steps", 7),
        ("train.grad_clip=3", "grad_clip", 3.0),
        ("train.precision=float32", "precision", "float32"),
        ("train.precision='float32'", "precision", "float32"),
        ("train={steps=5, seed=9}", "seed", 9),
    ],
)
def test_overrides(word: str, key: str, value: Any, load: Any) -> None:
    assert getattr(load("", word).train, key) == value


def test_overrides_in_any_order(load: Any) -> None:
    words = [
        "ffn.approximate=true",
        "ffn.use=gelu",
        "data.use=text",
        'data.paths=["a", "b"]',
        "data.header=2020-01-01",
    ]
    recipe = load("", *words)
    assert recipe == load("", *reversed(words))
    assert recipe.one("data").options == {"paths": ["a", "b"], "header": "2020-01-01"}
    assert load("", "train.steps=1", "train.steps=2").train.steps == 2


def test_overlays(load: Any, tmp_path: Path) -> None:
    text = "[cpu.train]\nsteps = 3\n[cpu.positional]\nuse = 'alibi'\n[cpu.memory]\nxl = false"
    full, small = (
        load(text, "train.seed=1"),
        load(text, "train.seed=1", "train.batch_size=2", overlay="cpu"),
    )
    assert (full.overlays, full.overlay, full.train.steps, full.changes()) == (
        ("cpu",),
        None,
        100,
        [],
    )
    assert (small.overlay, small.train.steps, small.train.batch_size) == ("cpu", 3, 2)
    assert {key: (before, after) for key, before, after in small.changes()} == {
        "train.steps": (100, 3),
        "positional.use": ("rope", "alibi"),
        "positional.base": (10_000.0, None),
        "positional.reversed": (True, None),
        "positional.slope": (None, -0.5),
        "memory.xl.use": ("xl-cache", None),
        "memory.xl.length": (32, None),
    }
    assert load(text, "train.steps=9", overlay="cpu").train.steps == 9
    assert load(text, "cpu.train.steps=9", overlay="cpu").train.steps == 9
    assert load("", overlay="cpu").overlay is None
    (tmp_path / "leaf.toml").write_text(
        "extends = 'mine.toml'\n[train]\nsteps = 50\n[cpu.train]\nbatch_size = 4"
    )
    load(text)
    leaf = Recipe.load(tmp_path / "leaf.toml", overlay="cpu", registry=REGISTRY)
    assert (leaf.train.steps, leaf.train.batch_size, leaf.one("positional").name) == (3, 4, "alibi")


def test_explain_tells_the_history_of_a_value(load: Any, tmp_path: Path) -> None:
    recipe = load(
        "[model]\nd_model = 32\n[positional]\nuse = 'alibi'\n[memory]\nxl ="
        " false\n[cpu.model]\nd_model = 16",
        "model.d_model=8",
        overlay="cpu",
    )
    base, mine = tmp_path / "base.toml", tmp_path / "mine.toml"
    assert recipe.explain("model.d_model") == [
        (768, Origin("default", "")),
        (64, Origin(f"{base}:2", "d_model = 64")),
        (32, Origin(f"{mine}:3", "d_model = 32")),
        (16, Origin(f"{mine}:9", "d_model = 16")),
        (8, Origin("command line", "model.d_model=8")),
    ]
    assert recipe.explain("positional.use") == [
        ("rope", Origin("default", "")),
        ("alibi", Origin(f"{mine}:5", "use = 'alibi'")),
    ]
    assert recipe.explain("positional.slope") == [(-0.5, Origin("default", ""))]
    assert recipe.explain("loss.simctg.weight")[-1] == (0.5, Origin(f"{base}:13", "weight = 0.5"))
    assert recipe.explain("memory.xl")[-1] == (False, Origin(f"{mine}:7", "xl = false"))
    assert recipe.explain("memory.registers.count")[-1][0] == 4
    with pytest.raises(Exception, match='use "lr"'):
        recipe.explain("optimizer.learning_rate")


def test_explain_ends_with_the_value_in_force(load: Any) -> None:
    recipe = load("[cpu.train]\nsteps = 3", overlay="cpu")
    for table, keys in tomli.loads(recipe.dump()).items():
        for key, value in keys.items():
            if not isinstance(value, dict):
                assert recipe.explain(f"{table}.{key}")[-1][0] == value


def test_dump_loads_to_an_equal_recipe(load: Any, tmp_path: Path) -> None:
    recipe = load(
        "[optimizer]\nlr = 1e-5\nbetas = [0.9, 1e-8]\n[data]\nuse = 'text'\npaths ="
        " []\n[cpu.train]\nsteps = 1",
        overlay="cpu",
    )
    (tmp_path / "resolved.toml").write_text(recipe.dump())
    again = Recipe.load(tmp_path / "resolved.toml", registry=REGISTRY)
    assert again == recipe == Recipe.from_dict(recipe.resolved(), registry=REGISTRY)
    assert again.dump() == recipe.dump() and again.overlays == ()
    assert tomli.loads(recipe.dump()) == recipe.resolved()


def test_fingerprint_sees_content_and_the_order_of_stacks() -> None:
    def made(**tables: Any) -> str:
        return Recipe.from_dict({"train": {"steps": 1}, **tables}, registry=REGISTRY).fingerprint()

    assert (
        made()
        == made(positional={"base": 500_000})
        == made(ffn={"use": "swiglu", "bias": True})
        == made(cpu={"train": {"steps": 9}})
    )
    assert made(ffn={"use": "swiglu", "bias": False}) != made()
    cache, registers = {"xl-cache": {}}, {"registers": {}}
    assert made(memory={**cache, **registers}) != made(memory={**registers, **cache})


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    prompt=TEXTS,
    name=TEXTS,
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    tags=st.lists(TEXTS),
)
@settings(max_examples=50, deadline=None, database=None, derandomize=True)
def test_any_value_survives_the_dump(prompt: str, name: str, rate: float, tags: list[str]) -> None:
    tables = {
        "train": {"steps": 1},
        "sample": {"prompt": prompt},
        "optimizer": {"lr": rate},
        "track": {name: {"use": "board", "tags": tags}},
    }
    recipe = Recipe.from_dict(tables, registry=REGISTRY)
    written = tomli.loads(recipe.dump())
    assert (
        written["sample"]["prompt"],
        written["optimizer"]["lr"],
        written["track"][name]["tags"],
    ) == (prompt, rate, tags)


def test_crlf_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "windows.toml"
    path.write_bytes(b"# a\r\n[train]\r\nsteps = 3 # b\r\n")
    assert Recipe.load(path, registry=REGISTRY).explain("train.steps")[-1] == (
        3,
        Origin(f"{path}:3", "steps = 3 # b"),
    )


def test_files_may_extend_a_file_of_another_folder(tmp_path: Path) -> None:
    (tmp_path / "recipes" / "ablations").mkdir(parents=True)
    (tmp_path / "recipes" / "base.toml").write_text(BASE)
    path = tmp_path / "recipes" / "ablations" / "gelu.toml"
    path.write_text("extends = '../base.toml'\n[ffn]\nuse = 'gelu'")
    recipe = Recipe.load(path, registry=REGISTRY)
    assert recipe.one("ffn").name == "gelu"
    assert recipe.explain("model.d_model")[-1][1].where == f"{tmp_path / 'recipes' / 'base.toml'}:2"


def test_a_clash_is_a_plugin_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(PARTS.read_text() + "# another file\n")
    (tmp_path / "recipe.toml").write_text("train.steps = 1\n[ffn]\nuse = 'gelu'\n")
    with pytest.raises(PluginError, match=r"recipe.toml:3") as caught:
        Recipe.load(
            tmp_path / "recipe.toml", registry=Registry([], files=[PARTS, tmp_path / "other.py"])
        )
    assert caught.value.exit_code == 3


def test_neither_a_good_nor_a_bad_recipe_imports_torch(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(BASE)
    (tmp_path / "bad.toml").write_text("[optimizer]\nlearning_rate = 3\n[ffn]\nuse = 'nobody'")
    code = f"""
import sys
from pathlib import Path
from lswt_core.errors import RecipeError
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
Registry().offers()
registry = Registry([], files=[Path({str(PARTS)!r})])
Recipe.load({str(tmp_path / "good.toml")!r}, registry=registry).dump()
try:
    Recipe.load({str(tmp_path / "bad.toml")!r}, registry=registry)
except RecipeError as error:
    assert len(error.problems) == 3, error
    assert not set(["torch", "numpy", "transformers"]) & set(sys.modules), "imported"
    print("clean")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "clean", done.stderr


def test_an_overlay_is_a_view_of_a_recipe_that_is_read_once(load: Any, tmp_path: Path) -> None:
    plain = load("[cpu.train]\nbatch_size = 2")
    (tmp_path / "mine.toml").unlink()
    small = plain.with_overlay("cpu")
    assert (small.overlay, small.train.batch_size) == ("cpu", 2)
    assert (plain.overlay, plain.train.batch_size) == (None, 8)
    assert small.with_overlay(None) == plain
    assert [key for key, *_ in small.changes()] == ["train.batch_size"]
    absent = plain.with_overlay("cuda")
    assert absent.overlay is None and absent == plain


def test_a_view_raises_what_overrides_break_under_its_overlay(load: Any) -> None:
    text = "[attention]\nuse = 'sdpa'\n[cpu.attention]\nuse = 'eager'"
    recipe = load(text, "attention.method=joint")
    with pytest.raises(RecipeError) as caught:
        recipe.with_overlay("cpu")
    assert caught.value.problems[0].where == "command line"
