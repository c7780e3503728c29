"""What a user reads when a recipe is wrong: the place, the key, why, and how to mend it; never a
traceback.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lswt_core.errors import PluginError, Problem, RecipeError
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

REGISTRY = Registry([], files=[Path(__file__).with_name("recipe_parts.py")])
HERE = "#!"  # marks the line an error must name


def problems(path: Path, *overrides: str, overlay: str | None = None) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides, overlay=overlay, registry=REGISTRY)
    assert caught.value.exit_code == 2
    return caught.value.problems


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# text (the line with HERE is the one to be named), the key or thing named, fragments of why and fix
BROKEN = {
    "alias": (
        "[optimizer]\nlearning_rate = 6e-4 #!",
        'unknown key "optimizer.learning_rate"',
        'the optimizer "adamw" (file',
        'use "lr"',
    ),
    "alias, core": (
        "train.rows = 8 #!",
        "train.rows",
        "[train] has no such key",
        'use "batch_size"',
    ),
    "typo": (
        "[memory.xl-cache]\nlenght = 3 #!",
        "memory.xl-cache.lenght",
        'the memory "xl-cache"',
        'did you mean "length"?',
    ),
    "other table": (
        "[model]\nlr = 1e-3 #!",
        "model.lr",
        "[model] has no such key",
        "it belongs at optimizer.lr",
    ),
    "alias in another table": (
        "[ffn]\nhidden_size = 8 #!",
        "ffn.hidden_size",
        'the ffn "swiglu"',
        "it belongs at model.d_model",
    ),
    "no such thing": ("[model]\ndropout = 0.1 #!", "model.dropout", "no dropout", "remove it"),
    "far from any": (
        "[attention]\nuse = 'eager'\nzzzzzzzz = 1 #!",
        "attention.zzzzzzzz",
        'the attention "eager"',
        "use one of: use",
    ),
    "unknown table": (
        "[optimiser] #!\nlr = 1",
        'unknown table "optimiser"',
        "no such table",
        'did you mean "optimizer"?',
    ),
    "key outside of tables": (
        "d_model = 64 #!",
        'unknown key "d_model"',
        "no such table",
        "it belongs at model.d_model",
    ),
    "scalar for a table": ("ffn = 3 #!", '"ffn" is a table', "3 is not a table", "[ffn]"),
    "name for a table": (
        "ffn = 'gelu' #!",
        '"ffn" is a table',
        '"gelu" is not a table',
        'write ffn.use = "gelu"',
    ),
    "scalar for a component": (
        "memory.xl-cache = true #!",
        '"memory.xl-cache" is a table',
        "true",
        "memory.xl-cache = false to remove",
    ),
    "text for a number": (
        '[model]\nd_model = "64" #!',
        "model.d_model",
        '"64" is not a whole number, at least 1',
        "write 64 without quotes",
    ),
    "bool for a number": (
        "[model]\nd_model = true #!",
        "model.d_model",
        "true is not a whole number",
        "(default: 768)",
    ),
    "bool for a float": (
        "[optimizer]\nlr = true #!",
        "optimizer.lr",
        "true is not a number, greater than 0",
        "give a number",
    ),
    "fraction for an integer": (
        "[tokenizer]\nvocab_size = 1.5 #!",
        "tokenizer.vocab_size",
        "1.5 is not a whole number",
        "at least 1",
    ),
    "number for a bool": (
        "[ffn]\nbias = 1 #!",
        "ffn.bias",
        "1 is not true or false",
        "give true or false",
    ),
    "out of bounds": (
        "[positional]\nbase = 0.5 #!",
        "positional.base",
        "0.5 is not a number, greater than 1",
        "default: 500000.0",
    ),
    "too wide": (
        "[model]\nd_model = 1_000_000_000_001 #!",
        "model.d_model",
        "at most 1048576",
        "default: 768",
    ),
    "too many steps": (
        "[train]\nsteps = 10_000_000_000 #!",
        "train.steps",
        "at most 1000000000",
        "give a whole number",
    ),
    "too many tokens": (
        "[train]\nbatch_size = 1\nseq_len = 1\ntokens = 10_000_000_000 #!",
        "[train]",
        "10,000,000,000 updates",
        "train.tokens",
    ),
    "infinite": (
        "[positional]\nbase = 1e400 #!",
        "positional.base",
        "inf is not finite",
        "give a number",
    ),
    "not a number": (
        "[optimizer]\nlr = nan #!",
        "optimizer.lr",
        "nan is not finite",
        "give a number",
    ),
    "a date": (
        "[optimizer]\nlr = 2024-01-01 #!",
        "optimizer.lr",
        "2024-01-01 is not a number",
        "give a number",
    ),
    "choice": (
        "[attention]\nuse = 'sdpa'\nmethod = 'splt' #!",
        "attention.method",
        '"splt" is not one of "auto"',
        'did you mean "split"?',
    ),
    "list item": (
        "[track.board]\ntags = [\n 'a', #\n 3]",
        "track.board.tags",
        "is not a list, each item a text",
        "give a list",
    ),
    "optional": (
        "[memory.xl-cache]\nkept = 0 #!",
        "memory.xl-cache.kept",
        "0 is not a whole number, at least 1",
        "give a whole number",
    ),
    "weight": (
        "[loss.simctg]\nweight = -1 #!",
        "loss.simctg.weight",
        "-1 is not a number, at least 0",
        "(default: 1.0)",
    ),
    "missing option": (
        "[data]\nuse = 'text' #!",
        'missing key "data.paths"',
        'the data "text"',
        "add paths = ..., a list",
    ),
    "not divisible": (
        "[model]\nd_model = 60 #!\nn_heads = 7",
        "[model] does not fit",
        "60 is not divisible by n_heads = 7",
        "model.n_heads",
    ),
    "unknown component": (
        "[ffn]\nuse = 'gellu' #!",
        'unknown ffn "gellu"',
        "offered: gelu, swiglu",
        'did you mean "gelu"? Else install',
    ),
    "wrong kind": (
        "[ffn]\nuse = 'rope' #!",
        'unknown ffn "rope"',
        '"rope" is a component of kind positional',
        "plugins list",
    ),
    "unknown memory": (
        "[memory.xl] #!\nlength = 3",
        'unknown memory "xl"',
        "offered: registers, xl-cache",
        "plugins list",
    ),
    "unknown distribution": (
        "[ffn]\nuse = 'acme:gelu' #!",
        'unknown ffn "acme:gelu"',
        "offered: gelu",
        "plugins list",
    ),
    "unknown backend": (
        "[attention]\nprefer = ['sdpa', 'flsh'] #!",
        'unknown attention "flsh"',
        "offered: eager, sdpa",
        "plugins list",
    ),
    "no backend": (
        "[attention]\nprefer = [] #!",
        "attention.prefer",
        "[] is not a list",
        "at least 1 long",
    ),
    "name is no text": ("[ffn]\nuse = 3 #!", '"ffn.use"', "not a text", 'use = "swiglu"'),
    "nothing to remove": (
        "[memory]\nxl-cache = false #!",
        'cannot remove "memory.xl-cache"',
        "present: none",
        "remove this line",
    ),
    "list of tables": (
        "[[memory]] #!\nlength = 3",
        '"memory"',
        "no lists of tables",
        "[memory.NAME]",
    ),
    "huge integer": (
        f"[train]\nsteps = 1\nseed = {2**63} #!",
        '"train.seed"',
        "64 bits",
        "smaller",
    ),
    "layers, none such": (
        "[model]\nn_layers = 4\n[layers.2-4.ffn] #!\nuse = 'gelu'",
        'the layers "2-4"',
        "4 layers (0 to 3)",
        "from 0",
    ),
    "layers, too far apart": (
        "[model]\nn_layers = 4\n[layers.'every 5'.ffn] #!\nuse = 'gelu'",
        '"every 5"',
        "4 layers (0 to 3)",
        "from 0",
    ),
    "layers, no choice": (
        "[layers.last.ffn] #!\nuse = 'gelu'",
        'the layers "last"',
        '"last" is no choice of layers',
        '"every 4"',
    ),
    "layers, backwards": (
        "[layers.3-1.ffn] #!\nuse = 'gelu'",
        'the layers "3-1"',
        "ends before it begins",
        '"0-3"',
    ),
    "layers, twice": (
        "[layers.0-3.ffn]\nuse = 'gelu'\n[layers.'every 4'.ffn] #!\nuse = 'swiglu'",
        '"every 4" and "0-3" contradict',
        '"0-3" already says what [ffn] is in layer 3',
        "one selector only",
    ),
    "layers, shared table": (
        "[layers.0.optimizer] #!\nlr = 1.0",
        'unknown table "layers.0.optimizer"',
        "same for all layers",
        "ffn",
    ),
    "layers, key": (
        "[layers.0.ffn]\nbais = true #!",
        "layers.0.ffn.bais",
        'the ffn "swiglu"',
        'did you mean "bias"?',
    ),
    "layers, nothing to remove": (
        "[layers.0.memory]\nxl = false #!",
        'cannot remove "layers.0.memory.xl"',
        "present: none",
        "remove",
    ),
    "layers, scalar": (
        "layers = 3 #!",
        '"layers" is a table',
        "3 is not a table",
        '[layers."0-3".ffn]',
    ),
    "layers, scalar for tables": (
        "[layers]\n0 = 3 #!",
        '"layers.0" is a table',
        "3 is not a table",
        '[layers."0".ffn]',
    ),
    "overlay": (
        "[cpu.train]\nstep = 3 #!",
        'unknown key "cpu.train.step"',
        "[train] has no such key",
        'did you mean "steps"?',
    ),
    "overlay, scalar": ("cpu = 3 #!", '"cpu" is a table', "3 is not a table", "[cpu.train]"),
    "overlay in overlay": (
        "[cpu.cuda.train] #!\nsteps = 3",
        "cpu.cuda",
        "no such table",
        "use one of",
    ),
    "dotted key": (
        "[model]\nn_heads = 4\n[memory]\nxl-cache.lengt = 3 #!",
        "memory.xl-cache.lengt",
        "",
        '"length"',
    ),
    "quoted key": ('[memory."xl-cache"]\n"lengt" = 3 #!', "memory.xl-cache.lengt", "", '"length"'),
    "inline table": (
        "memory = { xl-cache = { lengt = 3 } } #!",
        "memory.xl-cache.lengt",
        "",
        '"length"',
    ),
    "after long values": (
        (
            "[data]\nuse = 'text'\npaths = [\n '''a\nb]''', # ]\n]\nheader = \"\"\"\nx ="
            ' 1\n"""\nheadr = 1 #!'
        ),
        "data.headr",
        "",
        "header",
    ),
    "syntax": ("[model]\nd_model = = 3 #!", "this is not TOML", "Invalid value", "mend the line"),
    "twice": (
        "[model]\nd_model = 3\nd_model = 4 #!",
        "this is not TOML",
        "overwrite",
        "mend the line",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_problem_names_line_key_reason_and_remedy(case: str, tmp_path: Path) -> None:
    text, what, why, fix = BROKEN[case]
    text = text if "[train]" in text else f"train.steps = 1\n{text}"
    path = write(tmp_path, text)
    (problem,) = problems(path)
    marked = next((number for number, line in enumerate(text.split("\n"), 1) if HERE in line), None)
    assert marked is None or f"{path}:{marked}" in (problem.where, problem.where.rpartition(":")[0])
    assert marked is None or HERE in problem.source
    assert what in problem.what and why in problem.why and fix in problem.fix


def test_all_problems_at_once_up_to_twenty(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "[train]\nsteps = 0\n[ffn]\nuse = 'gellu'\n[model]\n"
        + "".join(f"key_{i} = 1\n" for i in range(30)),
    )
    reported = problems(path, "optimizer.lr=-1", "bad word")
    assert len(reported) == 21
    assert reported[-1].what == "... and 14 more"
    assert "bad word" in reported[0].what and reported[0].where == "command line"


def test_a_recipe_without_length_points_at_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    (problem,) = problems(path)
    assert problem.where == f"{path}:1" and "set train.steps or train.tokens" in problem.why


@pytest.mark.parametrize(
    ("word", "what", "fix"),
    [
        ("optimizer.lr", "optimizer.lr", "train.steps=100"),
        ("optimizer..lr=3", "optimizer..lr", "train.steps=100"),
        ("a]\nb=3", "a]", "train.steps=100"),
        ("extends='x.toml'", "extends", "train.steps=100"),
        ("optimizer.learning_rate=3", "optimizer.learning_rate", 'use "lr"'),
        ("optimizer.lr=fast", "optimizer.lr", "give a number"),
        ("optmizer.lr=3", "optmizer", "optimizer"),
        ("memory.nope=false", "memory.nope", "remove this line"),
        ("data.use='text\udcff'", "data.use", "UTF-8"),
    ],
)
def test_overrides_are_named(word: str, what: str, fix: str, tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, "train.steps = 1"), word)
    assert problem.where == "command line" and what in problem.what and fix in problem.fix


def test_problems_of_overrides_concern_the_chosen_overlay_only(tmp_path: Path) -> None:
    path = write(tmp_path, "train.steps = 1\n[cpu.attention]\nuse = 'sdpa'")
    assert Recipe.load(path, ["attention.method=joint"], overlay="cpu", registry=REGISTRY).one(
        "attention"
    ).options == {"method": "joint"}
    (problem,) = problems(path, "attention.method=joint")
    assert problem.where == "command line"


def test_unknown_overlay(tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, "train.steps = 1"), overlay="gpu")
    assert "'gpu'" in problem.what and problem.fix == "use one of: cpu, cuda"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xef\xbb\xbf[train]\nsteps = 1", "plain UTF-8"),
        (b"[train]\nsteps = 1\n# \xff", "byte 20 is 0xff"),
        (b"#" * (2**20 + 1), "1,048,576"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "nested"),
        (b"a = " + b"9" * 5000, "digits"),
        (b".".join([b"a"] * 5000) + b" = 1", "parts"),
        (b"x = { a = " * 200 + b"1" + b" }" * 200, ""),
    ],
    ids=["bom", "not utf-8", "too large", "nested", "digits", "dots", "inline"],
)
def test_hostile_content(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    reported = problems(path)
    assert str(path) in reported[0].where and why in reported[0].why


def test_bad_byte_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"[train]\nsteps = 1\n# \xff")
    assert problems(path)[0].where == f"{path}:3"


@pytest.mark.parametrize(
    ("extends", "why"),
    [
        ("'../../etc/passwd'", "there is no file"),
        ("'../secret.key'", "not a .toml file"),
        ("'/etc/passwd'", "not a .toml file"),
        ("'link.toml'", "symbolic link"),
        ("'recipe.toml'", "extends this file"),
        ("'missing.toml'", "there is no file"),
        ("'family'", "there is no file"),
        ("''", "in quotes"),
        ("3", "in quotes"),
        ("['a.toml']", "in quotes"),
        ('"a\\u0000b"', "null"),
        (f"'{'x' * 5000}'", "too long"),
        ("'loop.toml'", "symbolic link"),
        ("'pipe'", "there is no file"),
    ],
)
def test_hostile_includes(extends: str, why: str, tmp_path: Path) -> None:
    root = tmp_path / "recipes"
    write(tmp_path, "train.steps = 1", "secret.toml")
    write(tmp_path, "train.steps = 1", "secret.key")
    (root / "family").mkdir(parents=True)
    (root / "link.toml").symlink_to(tmp_path / "secret.toml")
    (root / "loop.toml").symlink_to(root / "loop.toml")
    os.mkfifo(root / "pipe")
    path = write(root, f"extends = {extends}")
    (problem,) = problems(path)
    assert problem.where == f"{path}:1" and "cannot extend" in problem.what and why in problem.why


def test_cycles_and_depth(tmp_path: Path) -> None:
    for i in range(9):
        write(tmp_path, f"extends = '{i + 1}.toml'", f"{i}.toml")
    (problem,) = problems(write(tmp_path, "train.steps = 1", "9.toml").with_name("0.toml"))
    assert problem.where == f"{tmp_path / '7.toml'}:1" and "8 deep" in problem.why
    write(tmp_path, "extends = '2.toml'", "3.toml")
    assert "extends this file" in problems(tmp_path / "2.toml")[0].why


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "", "small.toml")
    assert problems(write(tmp_path, "extends = 'smal.toml'"))[0].fix == "did you mean small.toml?"
    (problem,) = problems(tmp_path / "smal.toml")
    assert problem.fix == f"did you mean {tmp_path / 'small.toml'}?"
    assert str(tmp_path / "small.toml") in problems(tmp_path / "qqqqqqqqqqqq")[0].fix


def test_files_of_other_programs_are_not_suggested(tmp_path: Path) -> None:
    write(tmp_path, "[project]\nname = 'x'\n[tool.ruff]\n", "pyproject.toml")
    write(tmp_path, "[train", "torn.toml")
    assert "pyproject" not in problems(tmp_path / "pyprojec")[0].fix
    fix = problems(tmp_path / "qqqqqqqqqqqq")[0].fix
    assert "pyproject" not in fix and "torn.toml" in fix


@pytest.mark.parametrize(
    "value",
    [None, {"a": None}, 2**70, [{"a": 1}], "\ud800", object(), {3: 4}, (1, 2), float("nan")],
)
def test_from_dict_refuses_what_toml_could_not_hold(value: object) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({"train": {"steps": 1}, "optimizer": {"lr": value}}, registry=REGISTRY)
    assert all(problem.where == "python" for problem in caught.value.problems)


GOOD = """extends = "base.toml"
[model]
d_model = 64
n_heads = 4
[memory.xl]
use = "xl-cache"
length = 32
[loss.simctg]
margin = 0.5
[optimizer]
lr = 1e-3
[attention]
prefer = ["sdpa", "eager"]
[train]
steps = 10
[cpu.train]
steps = 3
"""
PIECES = st.one_of(
    st.sampled_from(
        [
            "true",
            "-1",
            "nan",
            "1e999",
            "''",
            "[]",
            "{}",
            "[[x]]",
            "=",
            "\n",
            '"',
            "'''",
            "0x" + "f" * 5000,
            "use",
            "extends",
            "cpu.",
        ]
    ),
    st.characters(codec="utf-8"),
)


@given(
    start=st.integers(0, len(GOOD)),
    length=st.integers(0, 12),
    piece=st.lists(PIECES, max_size=3).map("".join),
)
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_no_mutation_of_a_recipe_crashes(start: int, length: int, piece: str) -> None:
    with TemporaryDirectory() as folder:
        write(Path(folder), "[model]\nd_model = 32\n[memory.registers]\ncount = 2", "base.toml")
        path = Path(folder) / "recipe.toml"
        path.write_text(GOOD[:start] + piece + GOOD[start + length :], encoding="utf-8", newline="")
        try:
            recipe = Recipe.load(path, registry=REGISTRY)
        except (RecipeError, PluginError) as error:
            assert str(error)
        else:
            assert Recipe.from_dict(recipe.resolved(), registry=REGISTRY) == recipe


@pytest.mark.parametrize(
    ("table", "old", "new"),
    [
        ("train", "rows", "batch_size"),
        ("train", "context", "seq_len"),
        ("train", "micro_rows", "micro_batch_size"),
        ("train", "clip", "grad_clip"),
        ("train", "documents", "document_masking"),
        ("train", "dealing", "document_assignment"),
        ("evaluate", "rows", "batch_size"),
        ("optimizer", "refresh_every", "hessian_update_interval"),
    ],
)
def test_a_key_of_an_older_version_names_the_new_one(
    table: str, old: str, new: str, tmp_path: Path
) -> None:
    path = write(tmp_path, f"train.steps = 1\noptimizer.use = 'sophia-g'\n{table}.{old} = 3")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, registry=Registry())
    (problem,) = caught.value.problems
    assert (problem.where, problem.what) == (f"{path}:3", f'unknown key "{table}.{old}"')
    assert problem.fix == f'use "{new}"'
