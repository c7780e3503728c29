"""``evaluate`` of models whose numbers are known: trained ones, of several shapes, and imported."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from data_parts import BEGIN, END
from evaluation_parts import MEMORY, SEQ_LEN, evaluate, make_run, model_of, text_of
from helpers import GOLDEN, VOCAB, tokens
from lswt_recall import Copy, Integers
from lswt_xl_cache import XlCache
from mutants.memories import ShowsTheFuture
from original import rebuild
from processes import environment
from runs import inside
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lswt_core import Registry
from lswt_core.__main__ import main
from lswt_core.data import tokenise
from lswt_core.decode.load_run import LoadedModel, load_run
from lswt_core.evaluation.memory_gain import memory_gain
from lswt_core.evaluation.recall import recall_by_distance
from lswt_core.evaluation.texts import Limits, Text, text_of_tokens
from lswt_core.interfaces import IGNORE
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.pytree import detach_state

pytestmark = pytest.mark.slow


# ---------- recall

SEGMENT, SYMBOLS = 16, 14  # tokens; ids that a fact may be
RECALL = f"""
extends = "lswt:recall"
[model]
d_model = 64
n_heads = 2
[embedding]
vocab_size = 18
[memory.xl]
length = {SEGMENT}
[data]
tokens = 8
vocabulary = {SYMBOLS + 2}
segment = {SEGMENT}
[tokenizer]
size = {SYMBOLS + 2}
[optimizer]
lr = 5e-3
[train]
seq_len = {SEGMENT}
steps = 240
[evaluate]
every = 240
"""


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe recall, so small that it learns its task in seconds."""
    root = tmp_path_factory.mktemp("recall")
    recipe = root / "recall-nano.toml"
    recipe.write_text(RECALL)
    with pytest.MonkeyPatch.context() as patch:
        assert inside(patch, recipe, "--out", root / "run") == 0
    return root / "run"


def recall_text(distance: int, where: Path) -> Text:
    """Questions so many segments after their facts."""
    task = Copy(
        tokens=8, segment=SEGMENT, vocabulary=SYMBOLS + 2, distances=[distance], held_out=24
    )
    tokenizer = Integers(size=SYMBOLS + 2)
    held_out = tokenise(task, tokenizer, "valid", where)
    return text_of_tokens("far", held_out, tokenizer, Limits(100_000, 10_000))


def accuracy(model: LoadedModel, text: Text, distance: int) -> float:
    """The accuracy of a text's answers, all at one distance."""
    [point] = recall_by_distance(model, text)
    assert point.distance == distance and point.accuracy.tokens > 1000
    return point.accuracy.value


def test_a_model_that_learned_recall_answers_from_its_memory_alone(
    recall: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = evaluate(
        capsys, recall, "--tokens", 3000, "--memory", f"0,4,{SEGMENT}", "--json"
    )
    assert code == 0, err
    [text] = json.loads(out)["texts"].values()
    [point] = text["recall"]
    assert point["distance"] == 1 and point["accuracy"]["value"] > 0.98
    loss = {one["memory"]: one["loss"]["value"] for one in text["memory"]}
    assert loss[None] == loss[SEGMENT] < 0.1
    for length in (0, 4):  # the facts lie further back than four tokens
        assert loss[length] > math.log(SYMBOLS) - 0.1
    [*_, whole] = text["memory"]
    assert whole["gain"]["value"] == pytest.approx(loss[0] - loss[None], abs=1e-6)
    model, near = load_run(recall, Registry()).model, recall_text(1, tmp_path)
    assert accuracy(model, near, 1) > 0.98
    forgetful = copy.deepcopy(model.decoder)
    for block in forgetful.blocks:
        del block.attention.memory["xl"]
    assert accuracy(model._replace(decoder=forgetful), near, 1) < 2 / SYMBOLS


def test_facts_beyond_what_all_layers_reach_are_not_recalled(recall: Path, tmp_path: Path) -> None:
    model = load_run(recall, Registry()).model
    reach = len(model.decoder.blocks) * SEGMENT
    distance = reach // SEGMENT + 2  # the segment itself and what is left of the first one
    assert accuracy(model, recall_text(distance, tmp_path), distance) < 2 / SYMBOLS


# ---------- a memory that shows the future


def independent(rows: int, length: int) -> Text:
    """Documents of ids that are drawn independently: nothing earlier says what comes next."""
    drawn = tokens(rows, length, seed=99).numpy()
    labels = [np.append(ids[1:], IGNORE) for ids in drawn]
    return text_of(*[length] * rows)._replace(documents=list(drawn), labels=labels)


def train_on_draws(memory: type, steps: int) -> LoadedModel:
    """A model trained to predict independent draws, with a memory of MEMORY tokens."""
    model = model_of(memories={"xl": partial(memory, length=MEMORY)}, dtype=torch.float32, std=0.1)
    decoder = model.decoder
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for step in range(steps):
        ids = tokens(32, 3 * SEQ_LEN + 1, seed=1000 + step)
        state, losses = None, []
        for first in range(0, 3 * SEQ_LEN, SEQ_LEN):
            states, state = decoder(ids[:, first : first + SEQ_LEN], state)
            state = detach_state(state)
            logits = decoder.vocabulary.logits(states)
            labels = ids[:, first + 1 : first + 1 + SEQ_LEN]
            losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    return model


def test_the_gain_of_a_memory_that_shows_the_future_cannot_be_true() -> None:
    """Of independent draws every model's loss is their entropy or more."""
    text, entropy = independent(40, 6 * SEQ_LEN), math.log(VOCAB)
    for memory in (XlCache, ShowsTheFuture):
        model = train_on_draws(memory, steps=150)
        without, whole = memory_gain(model, text, SEQ_LEN, ())
        assert without.loss.value > entropy - 0.05
        if memory is XlCache:
            assert whole.loss.value > entropy - 0.05 and abs(whole.gain.value) < 0.1
        else:
            assert whole.loss.value < entropy - 1 and whole.gain.value > 1


# ---------- other models


def losses(decoder: Decoder, ids: list[int], labels: list[int], size: int, carry: bool) -> Tensor:
    """Losses [tokens] of a document read in segments of ``size``."""
    pieces, state, parts = torch.tensor([ids]).split(size, dim=1), None, []
    with torch.no_grad():
        for piece in pieces:
            states, after = decoder(piece, state)
            state = after if carry else None
            parts.append(decoder.vocabulary.logits(states)[0])
    return F.cross_entropy(torch.cat(parts), torch.tensor(labels), reduction="none")


RECURRENT = ["memory.registers=false", "memory.xl=false", "positional.use=none"]


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        (["model.n_heads=4", "model.n_kv_heads=2"], [0, 8, None]),
        ([*RECURRENT, "mixer.use=mamba2", "mixer.d_state=8"], [0, None]),
        ([*RECURRENT, "mixer.use=gated-delta-net"], [0, None]),
    ],
    ids=["grouped", "mamba2", "gated-delta-net"],
)
def test_what_the_memory_of_other_models_is_worth(
    words: list[str],
    memory: list[int | None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path, "model.init_std=0.3", "train.precision=float32", *words)
    content = "sense and sensibility, pride and prejudice; sense and pride. " * 2
    text = tmp_path / "text.txt"
    text.write_text(content)
    capsys.readouterr()
    asked = ["--memory", 8] if 8 in memory else []
    code, out, err = evaluate(capsys, run, "--text", f"a={text}", *asked, "--json")
    assert code == 0, err
    report = json.loads(out)["texts"]["a"]
    points = {one["memory"]: one for one in report["memory"]}
    assert list(points) == memory
    decoder = load_run(run, Registry()).model.decoder
    ids = list(content.encode())
    full, short = (
        losses(decoder, [BEGIN, *ids], [*ids, END], 16, carry) for carry in (True, False)
    )
    gain = float((short - full)[16:].mean())
    assert abs(gain) > 1e-3
    assert points[None]["gain"]["value"] == pytest.approx(gain, abs=1e-5)
    assert points[0]["loss"]["value"] == pytest.approx(float(short.mean()), abs=1e-5)
    assert report["loss"]["value"] == pytest.approx(float(full.mean()), abs=1e-5)
    if not asked:
        code, _, err = evaluate(capsys, run, "--text", text, "--memory", 8)
        assert code == 2 and "cannot be cut to a number of tokens" in err


@pytest.mark.parametrize("case", ["seed_checkpoint", "seed_gelu_forward_registers"])
def test_an_imported_checkpoint_has_the_loss_of_the_original(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model, text = GOLDEN / "lswt_formats" / case, tmp_path / "model", tmp_path / "text"
    config = json.loads((source / "config.json").read_text())
    size = config["vocab_size"] - 2
    Integers(size=size).save(tmp_path)
    asked = ["--tokenizer", str(tmp_path), "--memory-length", "6"]
    assert main(["import", str(source), str(model), *asked]) == 0
    # whole segments with BOS: to the original's logits padding at the end would not be nothing
    documents = tokens(3, 39, seed=5, size=size).tolist()
    text.mkdir()
    for number, ids in enumerate(documents):
        text.joinpath(f"{number}.txt").write_text(" ".join(map(str, ids)))
    capsys.readouterr()
    words = ["--text", f"a={text}", "--seq-len", 8, "--json"]
    code, out, err = evaluate(capsys, model, *words)
    assert code == 0, err
    report = json.loads(out)["texts"]["a"]
    decoder = rebuild(config, load_file(source / "model.safetensors"), length=6)
    full, short = (
        torch.cat([losses(decoder, [size, *ids], [*ids, size + 1], 8, carry) for ids in documents])
        for carry in (True, False)
    )
    assert report["loss"]["tokens"] == len(full)
    assert report["loss"]["value"] == pytest.approx(float(full.mean()), abs=2e-5)
    assert report["memory"][0]["loss"]["value"] == pytest.approx(float(short.mean()), abs=2e-5)


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    run, text = make_run(tmp_path), tmp_path / "text.txt"
    text.write_text("sense and sensibility")
    with subprocess.Popen(
        [sys.executable, "-m", "lswt_core", "evaluate", run, "--text", text, "--json"],
        env=environment(PYTHONUNBUFFERED=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        output = process.stderr.read()
    assert (process.returncode, output) == (141, b"")
