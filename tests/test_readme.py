"""README says only what is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lswt_core.registry import Registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_plugin_example_trains(tmp_path: Path) -> None:
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "hookimpl" in code]
    tmp_path.joinpath("squared.py").write_text(example)
    tmp_path.joinpath("text.txt").write_text("It is a truth universally acknowledged. " * 200)
    nano = [
        "model.d_model=32",
        "model.n_heads=2",
        "model.n_layers=1",
        "train.rows=2",
        "train.steps=2",
        "schedule.warmup_steps=1",
        "sample.tokens=2",
    ]
    text = ["data.use=text", "data.paths=['text.txt']", "tokenizer.use=bytes", "train.context=16", "evaluate.tokens=64", "evaluate.rows=2"]
    swap = ["--plugin", "squared.py", "ffn.use=squared-relu", "ffn.scale=0.5", "--out", "run"]
    assert " ".join(swap[:-2]) in README
    words = [sys.executable, "-m", "lswt_core.run", str(ROOT / "recipes" / "quickstart.toml"), *swap, *nano, *text]
    environment = os.environ | {"LSWT_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ffn.squared-relu" in done.stdout and "ffn=squared-relu" in done.stdout


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"(?<![\w/])((?:recipes|plugins|tests|lswt_core)/[\w./-]+\.\w+|\.github/[\w.-]+)", README))
    assert len(named) >= 10
    assert [name for name in named if not ROOT.joinpath(name).exists()] == []


def test_every_method_is_cited() -> None:
    keys = {key for offer in Registry().offers() for key in re.findall(r"@\w+\{(\w+),", offer.citation)}
    assert len(keys) > 12
    assert sorted(key for key in keys if key not in README) == []


@pytest.mark.parametrize("variable", ["LSWT_CACHE_DIR", "HF_CACHE_DIR", "HF_API_KEY", "WANDB_API_KEY"])
def test_environment_variables_are_the_ones_that_are_read(variable: str) -> None:
    sources = "".join(path.read_text() for folder in ("lswt_core", "plugins") for path in (ROOT / folder).rglob("*.py"))
    assert variable in README and variable in sources
