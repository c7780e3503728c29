"""The original's token stream, and how ours differs (tests/golden/lswt_train/manifest.json says how
it was made).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import GOLDEN
from lswt_bytes import Bytes
from safetensors.torch import load_file

from lswt_core.data import StreamingRows
from lswt_core.data.corpus import open_corpus
from lswt_core.distributed.world import World
from lswt_core.errors import DataError, Incompatible
from lswt_core.interfaces import DataSource, Document
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

GIVEN = json.loads((GOLDEN / "lswt_train" / "stream_input.json").read_text())
NUMBERS = load_file(GOLDEN / "lswt_train" / "stream.safetensors")
ROWS, LENGTH = GIVEN["shards_per_file"], GIVEN["seq_length"]


class Letters(Bytes):
    """The golden run's tokenizer: "a" is 10; BOS and EOS are 2."""

    bos_id = eos_id = 2

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) - 87 for letter in text] for text in texts]


class Lines(DataSource):
    """The golden run's lines. One is no JSON: the original drops it but counts it, as ours do empty
    documents.
    """

    name, streaming = "lines", True

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def documents(self, split: str) -> Iterator[Document]:
        yield from (Document(str(number), text) for number, text in enumerate(self.texts))

    def fingerprint(self) -> str:
        return str(self.texts)


def text_of(line: str) -> str:
    """The text of a line of JSON, empty where it is none."""
    return json.loads(line)["text"] if line.endswith("}") else ""


def rows(document_assignment: Any, texts: Sequence[str], count: int = ROWS) -> StreamingRows:
    """Our rows over some texts."""
    return StreamingRows(
        Lines(texts),
        Letters(),
        global_batch_size=count,
        rows=range(count),
        seq_len=LENGTH,
        seed=0,
        document_assignment=document_assignment,
    )


def test_round_robin_is_the_originals_stream_and_least_loaded_is_not() -> None:
    assert GIVEN["lines"][7] == "{not json"
    texts = [text_of(line) for line in GIVEN["lines"]]
    round_robin, least_loaded, differ = rows("round-robin", texts), rows("least-loaded", texts), 0
    for x, y in zip(NUMBERS["x"], NUMBERS["y"], strict=True):
        batch = round_robin.segment()
        assert torch.equal(batch.inputs, x) and torch.equal(batch.labels, y)
        differ += not torch.equal(least_loaded.segment().inputs, x)
        round_robin.advance()
        least_loaded.advance()
    assert differ  # ours keeps rows equally long, so that none ends early and none is hoarded


@pytest.mark.parametrize("document_assignment", ["round-robin", "least-loaded"])
def test_labels_are_the_originals_with_either_assignment(document_assignment: str) -> None:
    """x = [begin] + t, y = t + [end]: a label is the next input, or the end where a document begins
    next.
    """
    texts = [text_of(line) for line in GIVEN["lines"]]
    batch = rows(document_assignment, texts, 1).segment()
    (row,), (labels,) = batch.inputs, batch.labels
    assert row[0] == 2 and torch.equal(row[1:], labels[:-1])  # BOS and EOS are the same id here


def test_rows_that_no_document_reaches_are_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"3 documents of data source 'lines'.* 4 rows",
    ):
        rows("round-robin", ["abc", "def", "ghi"], 4).segment()


def test_round_robin_assignment_of_a_finite_text_is_refused_before_it_is_read() -> None:
    recipe = Recipe.load(
        GOLDEN.parent.parent / "recipes" / "quickstart.toml",
        ["train.document_assignment='round-robin'"],
    )
    with pytest.raises(
        Incompatible,
        match=r"train\.document_assignment = 'round-robin'.*'stdlib'",
    ):
        open_corpus(recipe, Registry(), World(), lambda *_: pytest.fail("too late"))
