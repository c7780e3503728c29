"""Tokenises a recipe's text into a directory of token files, or what of it is missing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lswt_core.data.corpus import fit_tokenizer
from lswt_core.data.token_cache import tokens_fingerprint
from lswt_core.data.token_directory import TOKENIZER
from lswt_core.data.token_index import check_sizes, describe_text, read_index, write_index
from lswt_core.data.token_parts import (
    SPLITS,
    Advance,
    PartedText,
    Share,
    SplitParts,
    write_missing_parts,
)
from lswt_core.data.unigram import check_vocabulary
from lswt_core.errors import DataError
from lswt_core.interfaces import DataSource
from lswt_core.model.components import build_component
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

WORKING = ".work"  # the directory of files that are being written, and of locks


class Outcome(NamedTuple):
    """What a directory holds when a process has done its share."""

    tokens: int  # in all files that are there
    files: int
    missing: list[str]  # files of other shares; empty: the index is written


def working_directory(directory: Path, share: Share) -> Path:
    """Where a share's files are written before they are complete."""
    return directory / WORKING / f"{share.number}-of-{share.of}"


def tokenise_text(
    recipe: Recipe,
    registry: Registry,
    directory: Path,
    share: Share,
    say: Callable[[str], None],
    report: Callable[[Advance], None],
) -> Outcome:
    """Write the token files of a share that are not there and, once those of all shares are, the
    index. No other process may have the same share of the directory at the same time. Raises
    DataError for a directory of another text.
    """
    working = working_directory(directory, share)
    for left in working.glob("*.bin"):  # by a process that was killed
        left.unlink()
    text, made_of = prepare(recipe, registry, directory, say)
    parts = [SplitParts(text, split) for split in SPLITS]
    for one in parts:
        write_missing_parts(one, share, working, report)
    missing = [text.path(one.split, i).name for one in parts for i in one.missing() or ()]
    if not missing and not has_index(directory, made_of):
        say("hashing all files for the index")
        write_index(text, parts, made_of)
    headers = [header for one in parts for header in one.headers.values()]
    return Outcome(sum(header["tokens"] for header in headers), len(headers), missing)


def prepare(
    recipe: Recipe, registry: Registry, directory: Path, say: Callable[[str], None]
) -> tuple[PartedText, dict[str, Any]]:
    """The text with its tokenizer, which is trained where need be, and their description."""
    source: DataSource = build_component(registry, recipe.one("data"))
    say("reading the text for its fingerprint")
    fingerprint = source.fingerprint()
    say("preparing the tokenizer")
    tokenizer = fit_tokenizer(recipe, registry, source, fingerprint, directory / TOKENIZER)
    check_vocabulary(tokenizer, recipe.embedding.vocab_size)
    made_by = (recipe.one("data"), recipe.one("tokenizer"))
    splits = {split: tokens_fingerprint(fingerprint, tokenizer, split, made_by) for split in SPLITS}
    text = PartedText(directory, source, tokenizer, splits)
    return text, describe_text(text, made_by, fingerprint)


def has_index(directory: Path, made_of: dict[str, Any]) -> bool:
    """Whether a directory has the index of its files."""
    with suppress(DataError):
        index = read_index(directory)
        check_sizes(directory, index)
        return made_of.items() <= index.items()
    return False
