"""Code that is edited while a run waits to go on, and texts that are cached: neither is taken for
what it was.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import slow_unless
from nano import NANO

from lswt_core.checkpoint.compatibility import check_code
from lswt_core.checkpoint.saved import Manifest, Saved
from lswt_core.data.corpus import open_corpus
from lswt_core.decode.load_run import load_run
from lswt_core.distributed.world import World
from lswt_core.model.code_fingerprint import core_libraries
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.run import main as run
from lswt_core.train.session import Session

RECIPE = (
    NANO
    + """
[tokenizer]
use = "bytes"
[ffn]
use = "own"
[train]
batch_size = 2
seq_len = 16
steps = 3
[evaluate]
tokens = 64
batch_size = 2
[checkpoint]
every = 1
[sample]
tokens = 0
"""
)
OWN = """
import multiplier
from lswt_core.hooks import hookimpl
from lswt_swiglu import SwiGlu

class Own(SwiGlu):
    name = "own"

    def forward(self, x):
        return multiplier.FACTOR * super().forward(x)

@hookimpl
def lswt_components():
    return [Own]
"""


def test_the_libraries_of_the_training_code_are_found() -> None:
    assert {"torch", "numpy"} <= core_libraries()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a recipe, a text, and a plugin whose module imports another."""
    tmp_path.joinpath("corpus.txt").write_text(
        "It is a truth universally acknowledged, that a single man needs a wife.\n" * 60
    )
    tmp_path.joinpath("nano.toml").write_text(RECIPE.format(corpus=tmp_path / "corpus.txt"))
    tmp_path.joinpath("own.py").write_text(f"# {tmp_path}\n{OWN}")  # a module of its own
    tmp_path.joinpath("multiplier.py").write_text("FACTOR = 1.0\n")
    monkeypatch.delitem(sys.modules, "multiplier", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


# ---------- code of components


@pytest.mark.parametrize("edited", slow_unless(["multiplier.py"], ["own.py", "multiplier.py"]))
def test_a_run_does_not_go_on_with_other_code_unless_that_is_asked_for(
    place: Path,
    edited: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # without its report a run is not finished, and goes on
    monkeypatch.setattr(Session, "write_report", lambda session: None)
    words = ["nano.toml", "--out", "run", "--plugin", "own.py"]
    assert run(words) == 0
    load_run(place / "run", Registry(files=[place / "own.py"]))
    assert not caplog.messages
    with place.joinpath(edited).open("a") as file:
        file.write("# edited\n")
    assert run(words) == 5
    output = capsys.readouterr().err
    assert "ffn/own: file" in output
    assert "--accept-changes" in output
    assert "norm/layernorm" not in output
    load_run(place / "run", Registry(files=[place / "own.py"]))
    (warning,) = caplog.messages
    assert "ffn/own" in warning
    assert run([*words, "--accept-changes"]) == 0
    assert "ffn/own" in "".join(capsys.readouterr())


def test_a_checkpoint_that_does_not_know_its_code_says_so(tmp_path: Path) -> None:
    (note,) = check_code(Saved(tmp_path, Manifest(step=1, files={})), {}, accept_changes=False)
    assert "cannot be told" in note


# ---------- caches

CONSTANT = """
from lswt_bytes import Bytes
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import DataSource, Document

class Words(DataSource):
    name = "words"

    def __init__(self, *, word: str = "a") -> None:
        self.word = word

    def documents(self, split):
        yield Document("0", self.word * 40)

    def fingerprint(self):
        return "constant"

class Shifted(Bytes):
    name = "shifted"

    def __init__(self, *, shift: int = 0) -> None:
        self.shift = shift

    def fit(self, documents, fingerprint, cache):
        path = cache / f"shifted-{fingerprint}"  # without its own options
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{self.shift} {next(iter(documents())).text[:1]}")
        self.learned = path.read_text()

    def encode(self, texts):
        return [[(number + self.shift) % 256 for number in ids] for ids in super().encode(texts)]

    def fingerprint(self):
        return "constant"

@hookimpl
def lswt_components():
    return [Words, Shifted]
"""


def corpus(place: Path, word: str, shift: int) -> Any:
    registry = Registry(files=[place / "constant.py"])
    overrides = [
        "ffn.use=gelu",
        "data.use=words",
        f"data.word={word}",
        "tokenizer.use=shifted",
        f"tokenizer.shift={shift}",
    ]
    return open_corpus(
        Recipe.load("nano.toml", overrides, registry=registry),
        registry,
        World.read(),
        lambda *_: None,
    )


def test_a_constant_fingerprint_gives_no_text_of_other_options(place: Path) -> None:
    place.joinpath("constant.py").write_text(f"# {place}\n{CONSTANT}")
    place.joinpath("nano.toml").write_text(
        RECIPE.format(corpus="").replace('use = "text"\npaths = [""]', 'use = "words"')
    )
    for word, shift in (("a", 0), ("b", 0), ("b", 1), ("a", 0)):
        opened = corpus(place, word, shift)
        assert opened.tokenizer.learned == f"{shift} {word}"
        assert opened.train.ids[1] == opened.valid.ids[1] == ord(word) + shift


def test_a_run_finds_what_its_tokenizer_learned(place: Path) -> None:
    assert (
        run(
            [
                "nano.toml",
                "ffn.use=gelu",
                "train.steps=1",
                "tokenizer.use=bpe",
                "tokenizer.vocab_size=270",
                "--out",
                "run",
            ]
        )
        == 0
    )
    place.joinpath("corpus.txt").unlink()
    assert load_run(place / "run", Registry()).model.tokenizer.vocab_size <= 270
