"""The weights of an exported run: read, written and compared a tensor at a time, as the files that
transformers itself would write.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from runs import inside, write_recipe
from safetensors.torch import load_file
from test_hf import STRANGER
from torch import Tensor
from transformers import AutoModelForCausalLM

from lswt_core import Registry, export_run
from lswt_core.__main__ import main
from lswt_core.checkpoint import Files, verify
from lswt_core.checkpoint.pieces import Piece
from lswt_core.checkpoint.saved import MANIFEST, Manifest, Record
from lswt_core.errors import CheckpointError
from lswt_core.hf import export, weight_files

SHORT = ["train.steps=1", "evaluate.every=0", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, whose table is frozen and so stored in float16."""
    recipe = write_recipe(tmp_path_factory.mktemp("files"))
    with pytest.MonkeyPatch.context() as patch:
        words = [*SHORT, "embedding.trainable=false", "--out", "run"]
        assert inside(patch, recipe, *words) == 0
    return recipe.parent / "run"


def newest(run: Path) -> Path:
    return max(run.joinpath("checkpoints").glob("step-????????"))


def contents(directory: Path, names: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob(names)}


def test_the_files_are_those_of_save_pretrained(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    theirs, ours = contents(tmp_path / "theirs", "*"), contents(tmp_path / "ours", "*")
    assert "model.safetensors" in theirs
    assert theirs == {name: ours[name] for name in theirs}
    stored = verify(newest(run)).tensors("model")
    assert stored["decoder.vocabulary.table.weight"].dtype == torch.float16
    for name, tensor in model.model.decoder.state_dict().items():
        assert tensor.equal(stored[f"decoder.{name}"].float()), name


def test_a_large_model_has_several_files_and_an_index(run: Path, tmp_path: Path) -> None:
    for size in ("5GB", "50KB"):
        export_run(run, tmp_path / size, max_file_size=size)
    whole = load_file(tmp_path / "5GB" / "model.safetensors")
    files = [*tmp_path.joinpath("50KB").glob("*.safetensors")]
    parts = {path.name: load_file(path) for path in files}
    assert len(parts) == 5 and all(path.stat().st_size < 52_000 for path in files)
    index = json.loads(tmp_path.joinpath("50KB", "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, part in parts.items() for name in part}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "50KB")
    assert all(tensor.equal(whole[name]) for name, tensor in model.state_dict().items())


def cut(tensor: Tensor, rank: int) -> Piece:
    """What the first or second of two ranks holds of a tensor."""
    if not tensor.ndim:
        return Piece(tensor, (), ())
    half = len(tensor) // 2
    piece = (tensor[:half], tensor[half:])[rank]
    return Piece(piece, (rank * half, *(0,) * (tensor.ndim - 1)), tuple(tensor.shape))


def write_pieces(checkpoint: Path) -> None:
    """Replace the weights of a checkpoint by what two ranks would have written."""
    saved = verify(checkpoint)
    files = {name: record for name, record in saved.manifest.files.items() if "model" not in name}
    tensors = saved.tensors("model")
    checkpoint.joinpath("model.safetensors").unlink()
    for rank in range(2):
        name = f"model-{rank + 1:05}-of-00002.safetensors"
        pieces = {key: cut(tensor, rank) for key, tensor in tensors.items() if tensor.ndim or rank}
        written = Files().write_tensors(checkpoint / name, pieces)
        files[name] = Record(bytes=written.bytes, sha256=written.sha256)
    manifest = Manifest(step=saved.step, files=files).sealed()
    checkpoint.joinpath(MANIFEST).write_text(json.dumps(manifest.model_dump()))


def test_what_several_ranks_wrote_is_exported_alike(run: Path, tmp_path: Path) -> None:
    sharded = shutil.copytree(run, tmp_path / "run")
    write_pieces(newest(sharded))
    for name in ("one", "two"):
        export_run(run if name == "one" else sharded, tmp_path / name)
    names = "*.[sj]*"  # weights and JSON; the card names the directory
    assert contents(tmp_path / "one", names) == contents(tmp_path / "two", names)


def test_a_component_with_a_buffer_that_is_not_saved_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, recipe = tmp_path / "waves.py", write_recipe(tmp_path)
    plugin.write_text(STRANGER)
    words = [*SHORT, "positional.use=waves", "--plugin", plugin, "--unchecked", "--out", "run"]
    assert inside(monkeypatch, recipe, *words) == 0
    export_run("run", "out", registry=Registry(files=[plugin]))


# ---------- what goes wrong is noticed, and nothing is left


def flip_a_bit(tensor: Tensor) -> memoryview:
    content = weight_files_bytes(tensor).tobytes()
    return memoryview(content[:-1] + bytes([content[-1] ^ 1]))


weight_files_bytes: Callable[[Tensor], memoryview] = weight_files.tensor_bytes


class Exchanged(weight_files.ConvertedTensors):
    """Gives one norm's weights for another's, while they are written."""

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name.replace("blocks.1.ffn_norm", "blocks.0.ffn_norm"))


def write_exchanged(directory: Path, tensors: Any, size: Any) -> None:
    wrong = Exchanged(tensors.outlines, tensors.stored, tensors.prefix)
    weight_files.write_weights(directory, wrong, size)


def load_exchanged(directory: Path) -> Any:
    """As if transformers put two layers' tensors into each other's modules."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    blocks = model.model.decoder.blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]
    return model


def load_with_other_recipe(change: Mapping[str, Any]) -> Callable[[Path], Any]:
    def load(directory: Path) -> Any:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        for name, value in change.items():
            table, _, key = name.rpartition(".")
            tables = config["recipe"]
            for part in table.split("."):
                tables = tables[part]
            tables[key] = value
        path.write_text(json.dumps(config))
        return AutoModelForCausalLM.from_pretrained(directory)

    return load


@pytest.mark.parametrize(
    ("where", "mistake"),
    [
        ("lswt_core.hf.weight_files.tensor_bytes", flip_a_bit),
        ("lswt_core.hf.save.write_weights", write_exchanged),
    ],
)
def test_files_that_do_not_hold_the_runs_weights_are_noticed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, mistake: Any
) -> None:
    monkeypatch.setattr(where, mistake)
    with pytest.raises(CheckpointError, match="do not hold what the checkpoint does"):
        export_run(run, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


class Loading:
    """In place of transformers' AutoModelForCausalLM."""

    def __init__(self, load: Callable[[Path], Any]) -> None:
        self.from_pretrained = load


@pytest.mark.parametrize(
    "mistake",
    [
        load_exchanged,
        load_with_other_recipe({"positional.base": 100.0}),
        # which so short a text would not show
        load_with_other_recipe({"memory.xl.length": 40}),
    ],
)
def test_a_model_that_is_put_together_otherwise_is_noticed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Callable[[Path], Any]
) -> None:
    monkeypatch.setattr(export, "AutoModelForCausalLM", Loading(mistake))
    with pytest.raises(CheckpointError, match="not give the logits of the run"):
        export_run(run, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_a_size_that_is_none_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(run), str(tmp_path / "out"), "--max-file-size", "big"])
    assert "'big' is no size such as 500MB" in capsys.readouterr().err


# ---------- memory


@pytest.mark.slow
def test_an_export_needs_memory_for_a_tensor_not_for_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    words = ["model.d_model=384", "model.n_layers=12", "train.batch_size=1", "train.seq_len=64"]
    small = ["train.micro_batch_size=1", "optimizer.use=adamw", "evaluate.tokens=64"]
    assert inside(monkeypatch, recipe, *SHORT, *words, *small, "--out", "run") == 0
    stored = verify(newest(tmp_path / "run")).lazily("model")
    model = sum(tensor.nbytes for tensor in stored.values())
    done = processes.run(
        "peak_memory", tmp_path / "run", tmp_path / "out", cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    assert len([*tmp_path.joinpath("out").glob("model-*-of-*.safetensors")]) > 5
    print(f"{int(done.stdout) / model:.2f} of {model:,} bytes")
    assert int(done.stdout) < model / 4
