"""Checkpoints of the original authors' code, imported: the logits are theirs, and what cannot be
carried over is said.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GOLDEN, distance
from lswt_bytes import Bytes
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lswt_core
from lswt_core.__main__ import main
from lswt_core.errors import CheckpointError, DataError

FORMATS = GOLDEN / "lswt_formats"
CASES = json.loads((FORMATS / "manifest.json").read_text())["cases"]
# float64: the original keeps frequencies and angles in float32
TOLERANCE = {torch.float64: 2e-6, torch.float32: 5e-5}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case, converted to our format."""
    where = tmp_path_factory.mktemp("imported")
    return {
        case: lswt_core.import_checkpoint(FORMATS / case, where / case).directory for case in CASES
    }


def logits(model: Any, ids: Tensor, size: int) -> Tensor:
    """Logits of ids [B, T] read in calls of ``size`` tokens."""
    cache, chunks = None, []
    with torch.no_grad():
        for piece in ids.split(size, dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.cache if "cache" in out else out.past_key_values
            chunks.append(out.logits)
    return torch.cat(chunks, dim=1)


@every_case
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_the_originals(
    case: str, dtype: torch.dtype, attention: str, imported: dict[str, Path]
) -> None:
    golden, size, length = (
        load_file(FORMATS / case / "expected" / "expected.safetensors"),
        CASES[case]["chunk"],
        CASES[case]["memory"],
    )
    ids = golden["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(imported[case], dtype=dtype, attention=attention)
    assert distance(logits(whole, ids, ids.shape[1]), golden["logits_full_f64"]) <= TOLERANCE[dtype]
    short = AutoModelForCausalLM.from_pretrained(
        imported[case], dtype=dtype, attention=attention, memory_length=length
    )
    assert (
        distance(logits(short, ids, size), golden[f"logits_chunk{size}_trim{length}_f64"])
        <= TOLERANCE[dtype]
    )


@every_case
def test_weights_are_stored_in_the_requested_dtype(
    case: str, imported: dict[str, Path], tmp_path: Path
) -> None:
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(imported[case]).parameters()} == {
        torch.float32
    }
    half = lswt_core.import_checkpoint(FORMATS / case, tmp_path / "half", dtype="float16").directory
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {
        torch.float16
    }


def test_the_comparison_notices_the_other_gelu(
    imported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_file(
        FORMATS / "seed_gelu_forward_registers" / "expected" / "expected.safetensors"
    )
    model = AutoModelForCausalLM.from_pretrained(
        imported["seed_gelu_forward_registers"], dtype=torch.float64
    )
    monkeypatch.setattr("lswt_gelu.gelu", partial(torch.nn.functional.gelu, approximate="tanh"))
    assert (
        distance(logits(model, golden["input_ids"], 24), golden["logits_full_f64"])
        > 10 * TOLERANCE[torch.float64]
    )


def changed(tmp_path: Path, case: str = "seed_checkpoint", **config: Any) -> Path:
    """A case with other values in its config; None removes one."""
    copy = tmp_path / "changed"
    shutil.copytree(FORMATS / case, copy)
    report = json.loads((copy / "config.json").read_text()) | config
    (copy / "config.json").write_text(
        json.dumps({key: value for key, value in report.items() if value is not None})
    )
    return copy


def test_unknown_keys_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = lswt_core.import_checkpoint(
        changed(tmp_path, warp_factor=9, dropout_ffn_int=0.1), tmp_path / "out"
    )
    for note in (
        "unknown key 'warp_factor' = 9",
        "dropout_ffn_int = 0.1 was left out",
        "has no tokenizer",
        "split into calls",
    ):
        assert any(note in one for one in done.notes) and note in caplog.text


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    source = changed(tmp_path)
    (source / "tokenizer.json").write_text("{}")
    done = lswt_core.import_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not any("tokenizer" in note for note in done.notes)


def test_a_tokenizer_can_be_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Bytes().save(tmp_path)
    words = [
        "import",
        str(FORMATS / "seed_checkpoint"),
        str(tmp_path / "out"),
        "--tokenizer",
        str(tmp_path),
        "--memory-length",
        "40",
    ]
    assert main(words) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"] == [256, 97]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.decoder.memory_length == 40
    capsys.readouterr()
    assert (
        main(["evaluate", str(tmp_path / "out"), "--text", __file__]) == CheckpointError.exit_code
    )
    assert "another model's tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, why",
    [
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({"n_registers": None}, "n_registers"),
        ({"n_registers": 4}, r"memory.registers.keys: \(3, 4, 16\), expected \(4, 4, 16\)"),
        ({"d_ffn": 128}, r"config\.json"),
        ({"gated_att": True}, "gated_att"),
        ({"rope_xpos_enabled": True}, "xPos"),
        ({"hidden_act": "laplace"}, "'laplace'"),
        ({"rope_dynamic": True}, "rope_positions"),
    ],
)
def test_unsupported_checkpoints_are_refused(
    config: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=why):
        lswt_core.import_checkpoint(changed(tmp_path, **config), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed"], "nothing is left behind"


def test_sharded_weights_are_read_by_their_index(tmp_path: Path) -> None:
    source = changed(tmp_path)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    halves = {
        "one.safetensors": sorted(weights)[::2],
        "two.safetensors": sorted(weights)[1::2],
        "optimizer.safetensors": ["head_proj.weight"],
    }
    for name, keys in halves.items():
        save_file({key: weights[key] for key in keys}, source / name)
    index = {
        key: name
        for name, keys in halves.items()
        if name != "optimizer.safetensors"
        for key in keys
    }
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    done = lswt_core.import_checkpoint(source, tmp_path / "out")
    whole = lswt_core.import_checkpoint(FORMATS / "seed_checkpoint", tmp_path / "whole")
    one, other = (load_file(imported.directory / "model.safetensors") for imported in (done, whole))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    source = changed(tmp_path)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        lswt_core.import_checkpoint(source, tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(CheckpointError, match=str(tmp_path / "out")):
        lswt_core.import_checkpoint(FORMATS / "seed_checkpoint", tmp_path / "out")


def test_a_name_is_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(FORMATS / "seed_checkpoint")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setenv("HF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_API_KEY", "secret")
    done = lswt_core.import_checkpoint(
        "Avelina/lovelace-medium-alpha1", tmp_path / "out", revision="main"
    )
    assert done.config.hidden_size == 64
    assert (asked["name"], asked["revision"], asked["token"]) == (
        "Avelina/lovelace-medium-alpha1",
        "main",
        "secret",
    )
    assert asked["cache_dir"] == str(tmp_path / "cache")
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])


def test_a_name_without_a_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="Avelina/lovelace-medium-alpha1"):
        lswt_core.import_checkpoint("Avelina/lovelace-medium-alpha1", tmp_path / "out")
