"""The whole text of typical errors, side by side, as a user reads them. All other tests ask for
exit codes, exception classes, keys and places.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from runs import inside, write_recipe

from lswt_core import __version__
from lswt_core.__main__ import main

PLUGIN = '''
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import FeedForward

class Broken(FeedForward):
    """Lacks its method."""
    name = "broken"

@hookimpl
def lswt_components():
    return [Broken]
'''
# the command's words, its exit code, what it prints; DIR is the directory it runs in,
# HASH that of a file's content
ERRORS = {
    "a missing recipe": (
        ["run", "nanno.toml"],
        2,
        """\
error: cannot read the recipe nanno.toml
  --> nanno.toml
  why: No such file or directory
  fix: did you mean nano.toml?
""",
    ),
    "two mistakes in a recipe": (
        ["run", "mistaken.toml"],
        2,
        f"""\
error: wrong value for "train.batch_size"
  --> mistaken.toml:5   batch_size = 0
  why: 0 is not a whole number, at least 1, at most 1048576
  fix: give a whole number, at least 1, at most 1048576 (default: 480)

error: unknown key "optimizer.learning_rate"
  --> mistaken.toml:3   learning_rate = 1e-3
  why: the optimizer "sophia-g" (lswt-core {__version__}) has no such key
  fix: use "lr"
""",
    ),
    "an unknown component": (
        ["run", "nano.toml", "qk_norm.use=layernom"],
        2,
        """\
error: unknown qk_norm "layernom"
  --> command line   qk_norm.use=layernom
  why: no plugin offers it; offered: none, rms
  fix: install the package that offers it, or choose another (see python -m lswt_core plugins list)
""",
    ),
    "sizes that do not fit": (
        ["run", "nano.toml", "model.d_model=33"],
        2,
        """\
error: [model] does not fit together
  --> command line   model.d_model=33
  why: d_model = 33 is not divisible by n_heads = 2; the nearest that divides is 1
  fix: set model.d_model or model.n_heads accordingly
""",
    ),
    "a component for another device": (
        ["run", "nano.toml", "attention.use=flash"],
        2,
        """\
error: [attention] flash cannot be used here: it runs on CUDA devices, not on cpu
""",
    ),
    "a broken plugin": (
        ["run", "nano.toml", "ffn.use=broken", "--plugin", "broken.py"],
        3,
        """\
error: [ffn] broken (file HASH) cannot be built: Can't instantiate abstract class Broken \
with abstract method forward
""",
    ),
    "an unknown plugin": (
        ["plugins", "check", "nothing"],
        3,
        """\
error: nothing cannot be imported: No module named 'nothing'
  fix: give an installed package, its module, or a .py file
""",
    ),
    "no text": (
        ["run", "nano.toml", "data.paths=['none/*.txt']"],
        4,
        """\
error: 'none/*.txt' matches no file (relative to DIR): fix data.paths or data.valid
""",
    ),
    "another recipe's checkpoint": (
        ["run", "nano.toml", "train.steps=4", "evaluate.every=0", "--out", "trained"],
        5,
        """\
error: trained/checkpoints/step-00000002 was written by another recipe:
  train.steps: 2 in the checkpoint, 4 now
  fix: restore the old values; or --accept-changes continues with the new values
""",
    ),
    "training that diverges": (
        ["run", "nano.toml", "optimizer.lr=1e30", "evaluate.every=0", "--out", "diverged"],
        6,
        """\
error: step 1 left weights that are not finite; they were not saved. No checkpoint was saved yet; \
lower optimizer.lr, or set train.precision = 'float32', and start again
""",
    ),
    "an arm that changes more than its axis": (
        ["ablate", "nano.toml", "--swap", "evaluate.tokens=512", "--dry-run"],
        2,
        """\
error: arm "evaluate.tokens=512" is no clean swap: besides evaluate.tokens it differs from the \
baseline in
  - evaluate.tokens changes the text that losses are measured on: they do not compare
  why: the difference in loss could not be attributed to the swap
  fix: undo these differences, or allow them: --allow data
""",
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with recipes, a text, a plugin and a finished run of two steps."""
    path = tmp_path_factory.mktemp("messages")
    recipe = write_recipe(path)
    (path / "mistaken.toml").write_text(
        'extends = "nano.toml"\n[optimizer]\nlearning_rate = 1e-3\n[train]\nbatch_size = 0\n'
    )
    (path / "broken.py").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        words = ["train.steps=2", "evaluate.every=0", "--out", "trained"]
        assert inside(patch, recipe, *words) == 0
    return path


@pytest.mark.parametrize("error", ERRORS)
def test_a_command_that_fails_prints(
    error: str,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, code, text = ERRORS[error]
    monkeypatch.chdir(directory)
    monkeypatch.setenv("LSWT_CACHE_DIR", str(directory / "cache"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert main(words) == code
    printed = capsys.readouterr().err.replace(str(directory), "DIR").lstrip("\n")
    printed = re.sub(r"file [0-9a-f]{12}", "file HASH", printed)
    since_3_12 = "without an implementation for abstract method 'forward'"
    assert printed.replace(since_3_12, "with abstract method forward") == text
