"""Whose mistake it is: errors in the code of plugins are named, and what a command cannot use is
refused.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nano import NANO
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from lswt_core import LswtForCausalLM
from lswt_core.__main__ import main
from lswt_core.conformance import checks
from lswt_core.errors import PluginError

PLUGIN = '''
from typing import Annotated

import torch
from annotated_types import Gt
from torch import nn
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import FeedForward
{before}
class OwnLinear(FeedForward):
    """Scaled."""
    name = "{name}"
    citation = "@misc{{own, title={{A mixture}}}}"
    def __init__(self, dims, *, scale: Annotated[float, Gt(0)] = 1.0) -> None:
        super().__init__(dims)
        self.scale = scale
        self.fc = nn.Linear(dims.d_model, dims.d_model)
        {init}
    def forward(self, x):
        {body}
        return self.fc(x) * self.scale

@hookimpl
def lswt_components():
    return [OwnLinear]
'''
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a single-file plugin with something in one place."""

    def written(
        before: str = "", init: str = "pass", body: str = "pass", name: str = "own"
    ) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(PLUGIN.format(before=before, init=init, body=body, name=name))
        return path

    return written


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of one step."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(12):
        corpus.joinpath(f"{i}.txt").write_text("sense and sensibility. " * 20)
    path = tmp_path / "nano.toml"
    more = (
        '[tokenizer]\nuse = "bytes"\n[train]\nsteps = 1\nbatch_size = 2\nseq_len = 16\nprecision ='
        ' "float32"\n[schedule]\nwarmup_steps = 0\n'
    )
    more += "[evaluate]\ntokens = 32\nbatch_size = 1\n[sample]\ntokens = 2\n"
    path.write_text(NANO.format(corpus=corpus) + more)
    return path


@pytest.mark.parametrize("place", ["init", "body"])
def test_an_error_in_a_plugins_code_names_it(
    place: str,
    write: Write,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    file = write(**{place: "torch.ones(2) @ torch.ones(3)"})
    words = ["--plugin", str(file), "ffn.use=own", "--unchecked"]
    assert main(["run", str(recipe), *words]) == 3
    output = capsys.readouterr().err
    method = "OwnLinear.__init__" if place == "init" else "OwnLinear.forward"
    line = 1 + file.read_text().splitlines().index("        torch.ones(2) @ torch.ones(3)")
    last = output.rpartition("\nerror: ")[2]
    assert "ffn/own" in last and "'mine'" in last
    assert method in last and "RuntimeError" in last
    assert f"{file}:{line}" in last
    assert "Traceback" in output


def test_an_error_of_the_core_is_a_bug_still(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lswt_core.cli.plan.text", lambda found: 1 / 0)
    assert main(["plan", str(recipe), "--on", "h100"]) == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_options_that_no_constructor_takes_are_the_plugins_fault(
    write: Write, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write()
    file.write_text(file.read_text().replace("(self, dims, *,", "(self, dims, more, *,"))
    assert main(["plan", str(recipe), "--on", "h100", "--plugin", str(file), "ffn.use=own"]) == 3
    assert "own" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "plan", "explain", "resolve", "ablate", "bench"])
def test_a_file_that_cannot_be_imported_is_refused_although_it_is_not_used(
    command: str, write: Write, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(before="raise ValueError('not today')")
    before = ["train.steps"] if command == "explain" else []
    after = ["--swap", "ffn=gelu"] if command == "ablate" else []
    assert main([command, *before, str(recipe), "--plugin", str(file), *after]) == 3
    output = capsys.readouterr().err
    assert "ValueError: not today" in output
    assert f"{file}:" in output
    assert not tmp_path.joinpath("runs").exists()


@pytest.mark.parametrize("option", ["nonsense=3", "scale=-1", "scale=wide"])
def test_options_that_nothing_takes_are_refused(
    option: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "check", str(write()), "--only", "citation", "--option", option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_the_components_of_a_file_are_checked_whatever_they_are_called(write: Write) -> None:
    broken = write(body="raise KeyError('mine')", name="swiglu")
    messages = [one.result().message for one in checks(broken) if one.rule.name == "forward"]
    assert "KeyError" in messages[0]
    asked = ("huggingface", "shapes", "causality")
    found = [one for one in checks(write(name="swiglu")) if one.rule.name in asked]
    results = {one.rule.name: one.result() for one in found}
    assert results["huggingface"].outcome == "skipped"
    assert "another component" in results["huggingface"].message
    assert results["shapes"].outcome == results["causality"].outcome == "ok"


def test_a_run_with_a_file_is_exported_with_the_file(
    write: Write,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "cache"))
    file, run, out = write(), tmp_path / "run", tmp_path / "out"
    for name in ("matplotlib", "matplotlib.figure"):  # pictures take longer than all the rest
        monkeypatch.setitem(sys.modules, name, None)
    words = ["--plugin", str(file), "ffn.use=own", "--unchecked", "--out", str(run)]
    assert main(["run", str(recipe), *words]) == 0
    assert main(["export", str(run), str(out)]) != 0
    assert main(["export", str(run), str(out), "--plugin", str(file)]) == 0, capsys.readouterr().err
    assert "class OwnLinear(FeedForward)" in out.joinpath("modeling_lswt.py").read_text()
    loaded = get_class_from_dynamic_module("modeling_lswt.LswtForCausalLM", out).from_pretrained(
        out
    )
    assert type(loaded.model.decoder.blocks[0].ffn).__name__ == "OwnLinear"
    with pytest.raises(PluginError, match="trust_remote_code"):
        LswtForCausalLM.from_pretrained(out)
    told = capsys.readouterr().out.rpartition("next:\n")[2].splitlines()
    command = shlex.split(told[0].partition("lswt_core ")[2])
    assert main([*command, "--tokens", "2"]) == 0, capsys.readouterr().err
    assert main([*command[:2], *command[-2:]]) == PluginError.exit_code
    assert "--plugin FILE" in capsys.readouterr().err
    python = "\n".join(line.strip() for line in told[2:])
    assert "trust_remote_code=True" in python and "lswt_core.hf" not in python
    assert "import lswt_core.hf" not in out.joinpath("README.md").read_text()
