"""Tiny models, texts and a run, for the tests of what ``evaluate`` measures."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny, tokens
from lswt_xl_cache import XlCache
from nano import NANO
from runs import inside
from torch import Tensor
from torch.nn import functional as F

from lswt_core.__main__ import main
from lswt_core.decode.load_run import LoadedModel
from lswt_core.device import Precision
from lswt_core.evaluation.texts import Text, Whole

SEQ_LEN, MEMORY, EOS = 4, 6, 1
XL = {"xl": partial(XlCache, length=MEMORY)}
RECIPE = (
    NANO
    + """
valid = ["{corpus}/1*.txt"]
[memory.xl]
use = "xl-cache"
length = 16
[optimizer]
use = "adamw"
lr = 1e-2
[schedule]
warmup_steps = 2
[tokenizer]
use = "bytes"
[train]
batch_size = 2
seq_len = 16
steps = 2
"""
)


def model_of(**parts: Any) -> LoadedModel:
    """A model with numbers, in float64."""
    precision = Precision(torch.float32, "parameters as they are")
    return LoadedModel(tiny(**parts).eval(), SimpleNamespace(), precision, SEQ_LEN)  # type: ignore[arg-type]


def text_of(*lengths: int) -> Text:
    """Documents of random ids."""
    documents = [tokens(1, length, seed=length)[0].numpy() for length in lengths]
    labels = [np.append(ids[1:], EOS) for ids in documents]
    whole = Whole.of(np.array(lengths))
    return Text("text", documents, labels, [str(n) for n in lengths], EOS, 2 * sum(lengths), whole)


def padded(ids: np.ndarray) -> Tensor:
    """A document [1, T] filled up to whole segments."""
    return F.pad(torch.from_numpy(ids)[None], (0, -len(ids) % SEQ_LEN), value=EOS)


def make_run(root: Path, *words: str) -> Path:
    """A run of two steps on a corpus of files of about 250 characters; ``words`` change its
    recipe.
    """
    corpus = root / "corpus"
    corpus.mkdir()
    for i in range(40):
        corpus.joinpath(f"{i}.txt").write_text(" ".join(f"sense {i * j}" for j in range(30)))
    recipe = root / "nano.toml"
    recipe.write_text(RECIPE.format(corpus=corpus))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSWT_CACHE_DIR", str(root / "cache"))
        assert inside(patch, recipe, *words, "--out", root / "run") == 0
    return root / "run"


def evaluate(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Call the command: exit code, standard output, standard error."""
    code = main(["evaluate", *map(str, words)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err, captured.err
    return code, captured.out, captured.err
