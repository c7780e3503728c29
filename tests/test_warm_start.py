"""Word embeddings taken from elsewhere: files, local models, and what is said when they cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from lswt_core.errors import DataError
from lswt_core.warm_start import pretrained_table

TABLE = torch.arange(320 * 24, dtype=torch.float32).reshape(320, 24) / 1000


def test_a_safetensors_or_npz_file_gives_its_table(tmp_path: Path) -> None:
    save_file({"weight": TABLE.half()}, tmp_path / "table.safetensors")
    numpy.savez(tmp_path / "table.npz", weight=TABLE.numpy())
    assert pretrained_table(str(tmp_path / "table.safetensors"), vocab_size=320, d_vocab=24).equal(TABLE.half().float())
    assert pretrained_table(str(tmp_path / "table.npz"), vocab_size=320, d_vocab=24).equal(TABLE)


@pytest.mark.parametrize(("vocab_size", "d_vocab"), [(321, 24), (320, 48)])
def test_another_size_is_refused_with_both_numbers(tmp_path: Path, vocab_size: int, d_vocab: int) -> None:
    save_file({"weight": TABLE}, tmp_path / "table.safetensors")
    with pytest.raises(DataError, match=rf"320 x 24.*vocab_size = {vocab_size}.*d_vocab = {d_vocab}"):
        pretrained_table(str(tmp_path / "table.safetensors"), vocab_size=vocab_size, d_vocab=d_vocab)


def test_a_file_without_one_table_is_refused(tmp_path: Path) -> None:
    save_file({"a": TABLE.clone(), "b": TABLE.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(DataError, match=r"exactly one 2-D tensor.*\['a', 'b'\]"):
        pretrained_table(str(tmp_path / "two.safetensors"), vocab_size=320, d_vocab=24)
    with pytest.raises(DataError, match="no such file"):
        pretrained_table(str(tmp_path / "none.npz"), vocab_size=320, d_vocab=24)


@pytest.mark.slow
def test_a_run_starts_from_the_embeddings_of_a_local_model_and_keeps_them_frozen(tmp_path: Path) -> None:
    prepare = f"""
import torch
from transformers import OPTConfig, OPTModel
torch.manual_seed(0)
model = OPTModel(OPTConfig(vocab_size=320, hidden_size=24, word_embed_proj_dim=24, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32))
model.save_pretrained({str(tmp_path / "opt")!r})
"""
    environment = os.environ | {"LSWT_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", prepare], env=environment, check=True, capture_output=True)
    (weight,) = (t for name, t in load_file(tmp_path / "opt" / "model.safetensors").items() if name.endswith("embed_tokens.weight"))
    tmp_path.joinpath("text.txt").write_text("It is a truth universally acknowledged. " * 200)
    tmp_path.joinpath("warm.toml").write_text(
        """
[model]
d_model = 32
n_layers = 1
n_heads = 2
[embedding]
vocab_size = 320
d_vocab = 24
warm_start = "opt"
trainable = false
[data]
use = "text"
paths = ["text.txt"]
[tokenizer]
use = "bytes"
[train]
rows = 2
context = 16
steps = 2
[evaluate]
tokens = 64
rows = 2
[sample]
tokens = 0
"""
    )

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "lswt_core.run", "warm.toml", "--out", "run", *more]
        return subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    trained = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors")
    assert trained["decoder.vocabulary.table.weight"].equal(weight)
    offline = run("embedding.warm_start=facebook/opt-125m", "--out", "other")
    assert offline.returncode == 4 and "facebook/opt-125m" in offline.stderr and "warm_start = 'none'" in offline.stderr
