"""README and guide say only what is so."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lswt_core.__main__ import main
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KINDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / ".github" / "guide.md").read_text()


@pytest.mark.slow
def test_the_plugin_example_is_what_is_written_and_trains(tmp_path: Path) -> None:
    chapter = README.partition("## Write a plugin in five minutes")[2].partition("\n## ")[0]
    (block,), (example,) = (
        re.findall(rf"```{language}\n(.*?)```", chapter, re.DOTALL)
        for language in ("bash", "python")
    )
    commands = [line.partition("  #")[0].strip() for line in block.splitlines()]
    made = called(tmp_path, *shlex.split(commands[0])[1:])
    assert [line.strip() for line in made.splitlines() if line.startswith("  ")][
        : len(commands) - 1
    ] == commands[1:]
    (single,) = re.findall(r"`--plugin (\S+)`", chapter)
    written = iter(tmp_path.joinpath(single).read_text().splitlines())
    assert all(line in written for line in example.splitlines() if line)  # in this order
    assert f"--plugin {single}" in made
    assert "any kind of the table above" in chapter

    tmp_path.joinpath("text.txt").write_text("It is a truth universally acknowledged. " * 200)
    nano = [
        "model.d_model=32",
        "model.n_heads=2",
        "model.n_layers=1",
        "train.batch_size=2",
        "train.steps=2",
        "train.seq_len=16",
    ]
    nano += [
        "schedule.warmup_steps=1",
        "sample.tokens=2",
        "evaluate.tokens=64",
        "evaluate.batch_size=2",
    ]
    text = ["data.use=text", "data.paths=['text.txt']", "tokenizer.use=bytes"]
    (option,) = re.findall(r"`(positional\.\w+=\S+)`", chapter)
    words = [word.replace("recipes/", f"{ROOT}/recipes/") for word in shlex.split(commands[3])[1:]]
    printed = called(tmp_path, *words, "--plugin", single, option, *nano, *text)
    assert "positional=fading" in printed


def called(where: Path, *words: str) -> str:
    """What Python prints when it is started with these words in a directory."""
    environment = os.environ | {"LSWT_CACHE_DIR": str(where / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=where, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_file_it_names_exists() -> None:
    named = set(
        re.findall(
            r"(?<![\w/])((?:recipes|plugins|tests|lswt_core)/[\w./-]+\.\w+|\.github/[\w.-]+)",
            README,
        )
    )
    assert len(named) >= 10
    assert [name for name in named if not ROOT.joinpath(name).exists()] == []


def test_every_method_is_cited() -> None:
    keys = {
        key for offer in Registry().offers() for key in re.findall(r"@\w+\{(\w+),", offer.citation)
    }
    assert len(keys) > 12
    citations = (ROOT / ".github" / "citations.bib").read_text()
    assert sorted(key for key in keys if key not in citations) == []


def test_the_table_of_components_is_what_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "list", "--markdown"]) == 0
    table = capsys.readouterr().out.strip()
    assert table in README
    assert re.findall(r"^\| (\w+) \| \[", table, re.MULTILINE) == list(KINDS)


SHARDED = ["train.shard=all", "train.memory_device=host"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small", "medium", "large", "xl", "xxl"])
def test_sizes_are_what_a_plan_says(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--on", "h100", "--ranks", "8", "--json"]
    words += SHARDED if size in ("large", "xl", "xxl") else []
    assert " ".join(SHARDED) in README
    assert main(["plan", str(ROOT / "recipes" / f"{size}.toml"), *words]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    (row,) = re.findall(rf"^\| `recipes/{size}.toml` \| (.*) \|$", README, re.MULTILINE)
    parameters, *_, memory, time = row.split(" | ")
    assert parameters == f"{plan['parameters']['total']:,}"
    assert memory == f"{plan['memory']['total'] / 1e9:.0f}"
    hours = plan["time"]["seconds"] / 3600
    assert time == (f"{hours:.1f} h" if hours < 24 else f"{hours / 24:.1f} d")


@pytest.mark.parametrize(
    "variable", ["LSWT_CACHE_DIR", "HF_CACHE_DIR", "HF_API_KEY", "WANDB_API_KEY"]
)
def test_environment_variables_are_the_ones_that_are_read(variable: str) -> None:
    sources = "".join(
        path.read_text()
        for folder in ("lswt_core", "plugins")
        for path in (ROOT / folder).rglob("*.py")
    )
    assert variable in GUIDE and variable in sources
