"""Components that cheat, each planted: what a run finds in itself, and that the certificate refuses
it.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pytest
import torch
from nano import NANO

from lswt_core.ablation.runs.context_probe import probe_context
from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.ablation.runs.worker import work
from lswt_core.decode.load_run import LoadedModel
from lswt_core.device import Precision
from lswt_core.interfaces import Tokenizer
from lswt_core.model.build import build_decoder_spec
from lswt_core.model.components import build_component
from lswt_core.model.initialise import initialise
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

RECIPE = (
    NANO
    + """
[memory.xl]
use = "xl-cache"
length = 8
[optimizer]
use = "adamw"
lr = 1e-3
[schedule]
use = "constant"
[tokenizer]
use = "bytes"
[train]
batch_size = 2
seq_len = 16
steps = 2
precision = "float32"
[evaluate]
tokens = 64
batch_size = 2
[sample]
tokens = 0
"""
)
CHEATS = """
import torch
from torch import nn
from lswt_adamw import AdamW
from lswt_schedules import Constant
from lswt_tied import Tied
from lswt_xl_cache import XlCache
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import FeedForward

class Honest(FeedForward):
    name = "honest"
    def __init__(self, dims):
        super().__init__(dims)
        self.fc = nn.Linear(dims.d_model, dims.d_model)
    def forward(self, x):
        return self.fc(x)

class Ahead(Honest):
    name = "ahead"
    def forward(self, x):
        return self.fc(x + x.roll(-1, 1))

class AheadAtTheEnd(Honest):
    name = "ahead-at-the-end"
    def forward(self, x):
        return self.fc(torch.cat((x[:, :-2], x[:, -1:], x[:, -1:]), 1)) if x.shape[1] > 1 else x

class Batched(Honest):
    name = "batched"
    def forward(self, x):
        return self.fc(x - x.mean(0, keepdim=True))

class Remembering(Honest):
    name = "remembering"
    past = 0.0
    def forward(self, x):
        out = self.fc(x + self.past)
        self.past = x.mean((0, 1)).detach()
        return out

class Moving(Honest):
    name = "moving"
    moved = False
    def forward(self, x):
        if not self.moved and self.training:
            self.moved = True
            with torch.no_grad():
                self.fc.weight.mul_(0.5)
        return self.fc(x)

class Longer(XlCache):
    name = "longer"
    def __init__(self, dims, *, length: int = 8):
        super().__init__(dims, length=length + 1)
        self.length = length
        self.kept = length + 1
    def forward(self, x, positions, state, project):
        self.length = self.kept
        try:
            return super().forward(x, positions, state, project)
        finally:
            self.length = self.kept - 1

class Forgetting(XlCache):
    name = "forgetting"
    def forward(self, x, positions, state, project):
        return super().forward(x, positions, None, project)

class Generous(Tied):
    name = "generous"
    def score(self, *arguments, **options):
        out = super().score(*arguments, **options)
        return out._replace(total=0.9 * out.total, nll=0.9 * out.nll)

class Creeping(Constant):
    name = "creeping"
    calls = 0
    def factor(self, step):
        self.calls += 1
        return 1 + self.calls

class Faster(AdamW):
    name = "faster"
    def __init__(self, groups, *, lr: float = 1e-3):
        super().__init__(groups, lr=3 * lr)

@hookimpl
def lswt_components():
    return [Honest, Ahead, AheadAtTheEnd, Batched, Remembering, Moving, Longer, Forgetting,
            Generous, Creeping, Faster]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tmp_path.joinpath("cheats.py").write_text(f"# {tmp_path}\n{CHEATS}")
    text = "".join(random.Random(0).choices("abcde ", k=4000))
    tmp_path.joinpath("corpus.txt").write_text(text)
    tmp_path.joinpath("nano.toml").write_text(RECIPE.format(corpus=tmp_path / "corpus.txt"))
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def load(place: Path, *overrides: str) -> tuple[Recipe, Registry]:
    registry = Registry(files=[place / "cheats.py"])
    return Recipe.load(place / "nano.toml", overrides, registry=registry), registry


def model(recipe: Recipe, registry: Registry) -> LoadedModel:
    """A model with initial values."""
    device = torch.device("cpu")
    precision = Precision.choose("float32", device)
    with torch.device("meta"):
        spec = build_decoder_spec(recipe, registry, device=device, dtype=precision.dtype)
        decoder = spec.build()
    decoder.to_empty(device=device)
    initialise(decoder, seed=0, std=0.1)
    tokenizer: Tokenizer = build_component(registry, recipe.one("tokenizer"))
    return LoadedModel(decoder.eval(), tokenizer, precision, recipe.train.seq_len)


@pytest.mark.parametrize(
    ("override", "about"),
    [
        ("ffn.use=honest", []),
        ("memory.xl=false", []),
        ("mixer.use=gated-delta-net", []),
        ("memory.xl.use=longer", ["context"]),
        ("memory.xl.use=forgetting", ["context"]),
        ("ffn.use=ahead", ["causality"]),
        ("ffn.use=ahead-at-the-end", ["causality"]),
        ("ffn.use=batched", ["causality"]),
        ("head.use=generous", ["loss"]),
    ],
)
def test_what_a_model_sees_is_probed(place: Path, override: str, about: list[str]) -> None:
    flaws = probe_context(model(*load(place, override)), torch.device("cpu"))
    assert [flaw.about for flaw in flaws] == about


def test_a_model_that_keeps_something_between_passes_is_seen(place: Path) -> None:
    flaws = probe_context(model(*load(place, "ffn.use=remembering")), torch.device("cpu"))
    assert "causality" in {flaw.about for flaw in flaws}


def make(place: Path, *overrides: str) -> list[list[str]]:
    """What a whole run found in itself."""
    recipe, _ = load(place, *overrides)
    directory = place / "run"
    directory.mkdir()
    directory.joinpath("nano.toml").write_text(recipe.dump())
    arguments = argparse.Namespace(
        recipe=directory / "nano.toml",
        directory=directory,
        plugin=[place / "cheats.py"],
        parent=None,
        like=None,
        runs_at_once=1,
        code=None,
        unchecked=True,
        overrides=[],
        out=None,
        resume=False,
        full=True,
        accept_changes=False,
        traceback=False,
    )
    assert work(arguments) == 0
    outcome = Outcome.from_json(json.loads((directory / "outcome.json").read_text()))
    assert 0 < (outcome.unigram_loss or 0) < 3 and (outcome.evaluated_bytes or 0) > 0
    return [list(flaw) for flaw in outcome.flaws]


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        pytest.param(["ffn.use=honest"], [], marks=pytest.mark.slow),
        (
            ["ffn.use=moving", "schedule.use=creeping"],
            ["changed between the start", "learning rate 0.00"],
        ),
        pytest.param(
            ["optimizer.use=faster"],
            ["update 2 had learning rate 0.003, by the recipe it is 0.001"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_compares_itself_with_its_recipe(
    place: Path, overrides: list[str], texts: list[str]
) -> None:
    found = [text for _, text in make(place, *overrides)]
    assert len(found) == len(texts)
    assert all(part in text for part, text in zip(texts, found, strict=True))
