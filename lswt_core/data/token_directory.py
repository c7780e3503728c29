"""A directory of token files (data.token_directory), opened for a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lswt_core.data.concatenated import ConcatenatedIds, ConcatenatedNames
from lswt_core.data.token_cache import Split, cache_directory
from lswt_core.data.token_file import Tokens
from lswt_core.data.token_index import (
    check_contents,
    check_sizes,
    map_ids,
    read_index,
    read_starts,
)
from lswt_core.data.token_parts import SPLITS
from lswt_core.errors import DataError
from lswt_core.interfaces import DataSource, Tokenizer
from lswt_core.recipe import Chosen, Recipe

TOKENIZER = "tokenizer"  # the directory of what a tokenizer learnt from the text

logger = logging.getLogger(__name__)


def tokenizer_cache(recipe: Recipe) -> Path:
    """The directory of the tokenizer that was trained on a recipe's text: that of its token files,
    if it has some, else the cache.
    """
    directory = recipe.one("data").token_directory
    if directory is not None and token_path(directory).is_dir():
        return token_path(directory) / TOKENIZER
    return cache_directory()


def token_path(given: str) -> Path:
    """The path of a recipe's data.token_directory."""
    return Path(given).expanduser()


class TokenDirectory:
    """Token files that were made by ``tokenize``. Opening it reads the index and looks up the
    files' sizes; ``check_share`` reads contents.
    """

    def __init__(self, directory: Path, made_by: Sequence[Chosen]) -> None:
        """Raises DataError, with the cure, if it is missing, not complete, or was made from other
        tables than ``made_by`` (the recipe's source and tokenizer).
        """
        self.directory, self.index = directory, read_index(directory)
        check_tables(directory, self.index, made_by)
        check_sizes(directory, self.index)

    @property
    def text(self) -> str:
        """The fingerprint that the text's source had."""
        return str(self.index["data"]["fingerprint"])

    def check_text(self, source: DataSource) -> None:
        """Raise DataError if the text was changed since. Where the text is not within reach, a
        warning says so.
        """
        try:
            found = source.fingerprint()
        except DataError as error:
            logger.warning(
                "the text of %s is not here, so whether it has changed since it was tokenised is"
                " not checked: %s",
                self.directory,
                error,
            )
            return
        if found != self.text:
            raise self.stale("the text has changed since", self.text, found)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise DataError if the tokenizer is another one."""
        expected, found = self.index["tokenizer"]["fingerprint"], tokenizer.fingerprint()
        if found != expected:
            raise self.stale("the tokenizer is another one", expected, found)

    def check_share(self, number: int, of: int) -> None:
        """Raise DataError if a file's content is damaged; of every ``of`` files the one with
        ``number`` is read (about 1 s a GB).
        """
        check_contents(self.directory, self.index, slice(number, None, of))

    def stale(self, why: str, then: str, now: str) -> DataError:
        """The error of a directory that does not belong to what the recipe says."""
        return DataError(
            f"the token files in {self.directory} do not belong to this recipe: {why} (fingerprint"
            f" {then[:12]} then, {now[:12]} now)\n  fix: restore what was changed, or tokenise into"
            f" another directory: python -m lswt_core tokenize RECIPE --out DIR"
        )

    def tokens(self, split: Split) -> Tokens:
        """The tokens of a split, memory-mapped file by file; where documents begin is read."""
        made = self.index["splits"][split]
        files = made["files"]
        paths = [self.directory / entry["name"] for entry in files]
        arrays = [
            map_ids(path, self.dtype, one["tokens"]) for path, one in zip(paths, files, strict=True)
        ]
        ids = ConcatenatedIds(arrays)
        starts = [
            read_starts(path, array.nbytes, one["documents"]) + begin
            for path, array, one, begin in zip(paths, arrays, files, ids.bounds, strict=False)
        ]
        return Tokens(
            ids,
            np.concatenate(starts),
            made["n_bytes"],
            made["n_empty"],
            self._names(files),
            self.index["fingerprints"][split],
            self._label_counts()[SPLITS.index(split)],
        )

    def _names(self, files: list[dict[str, Any]]) -> ConcatenatedNames:
        """The names of the documents of some files."""
        return ConcatenatedNames(
            [one["documents"] for one in files],
            [partial(read_names, self.directory, self.dtype, one) for one in files],
        )

    @property
    def dtype(self) -> str:
        """The type of the ids."""
        return str(self.index["dtype"])

    def _label_counts(self) -> np.ndarray:
        """How often each id is a label, [splits, V]."""
        path = self.directory / self.index["label_counts"]["name"]
        return np.fromfile(path, "<i8").reshape(len(SPLITS), -1)


def read_names(directory: Path, dtype: str, entry: Mapping[str, Any]) -> list[str]:
    """The names of a token file's documents."""
    with (directory / entry["name"]).open("rb") as file:
        file.seek(entry["tokens"] * np.dtype(dtype).itemsize + 8 * entry["documents"])
        return [json.loads(line) for line in file.read(entry["names"]).splitlines()]


def check_tables(directory: Path, index: Mapping[str, Any], made_by: Sequence[Chosen]) -> None:
    """Raise DataError, naming the keys, if the recipe's tables are not those of the index."""
    lines = []
    for kind, chosen in zip(("data", "tokenizer"), made_by, strict=True):
        then, now = index[kind]["table"], json.loads(json.dumps(chosen.as_table()))
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key):
                lines.append(f"  {kind}.{key}: {then.get(key)!r} there, {now.get(key)!r} here")
    if lines:
        raise DataError(
            f"the token files in {directory} were made for another recipe:\n"
            + "\n".join(lines)
            + "\n  fix: restore these keys, correct data.token_directory, or tokenise this recipe's"
            " text: python -m lswt_core tokenize RECIPE --out DIR"
        )
