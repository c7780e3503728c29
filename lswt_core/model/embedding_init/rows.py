"""Which rows of a pretrained table go where in ours: by number if both number their tokens alike,
else by what the tokens say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lswt_core.errors import DataError
from lswt_core.interfaces import Tokenizer
from lswt_core.model.embedding_init.sources import PretrainedEmbedding

# a leading space as GPT-2's byte-level vocabularies spell it, and as SentencePiece does
SPACE_OF_BYTES, SPACE_OF_PIECES = "Ġ", "▁"
# how SentencePiece spells a byte that no piece covers
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class CopiedRows(NamedTuple):
    """What became of a pretrained table."""

    text: str  # a line for the user
    record: dict[str, Any]  # for environment.json


class RowPairs(NamedTuple):
    """Rows to copy: number ``theirs[i]`` of the source is number ``ours[i]`` of the model."""

    theirs: list[int]
    ours: list[int]
    by: str  # "row" or "token string"


def copy_rows(source: PretrainedEmbedding, weight: Tensor, tokenizer: Tokenizer) -> CopiedRows:
    """Copy the rows of a table into ``weight`` [V, width], in weight's precision; rows without a
    counterpart stay as they are.

    Raises DataError if no token is known to both, or if the numbers are too large for weight's
    precision.
    """
    pairs = match_rows(source, len(weight), tokenizer)
    rows = source.table[torch.tensor(pairs.theirs)]
    narrowed, precision = rows.to(weight.dtype), str(weight.dtype).removeprefix("torch.")
    if not bool(torch.isfinite(narrowed).all()):
        raise DataError(
            f"embedding.warm_start = {source.name!r}: its largest number,"
            f" {float(rows.abs().max()):.3g}, is too large for {precision}, which a frozen table is"
            " kept in\n  fix: set embedding.trainable = true"
        )
    with torch.no_grad():
        weight.index_copy_(
            0, torch.tensor(pairs.ours, device=weight.device), narrowed.to(weight.device)
        )
    origin = {"source": source.name, **source.facts, "shape": list(source.table.shape)}
    rounding = largest_rounding_error(rows, narrowed)
    moved = {
        "rows": len(pairs.ours),
        "of": len(weight),
        "by": pairs.by,
        "precision": precision,
        "rounding": rounding,
    }
    return CopiedRows(
        describe_copy(source, pairs, len(weight), rounding, precision), origin | moved
    )


def largest_rounding_error(rows: Tensor, narrowed: Tensor) -> float:
    """How far a narrower precision has moved a number at most; 0 where it is not narrower."""
    exact = torch.promote_types(rows.dtype, narrowed.dtype)
    return (
        0.0 if narrowed.dtype == exact else float((narrowed.to(exact) - rows.to(exact)).abs().max())
    )


def describe_copy(
    source: PretrainedEmbedding, pairs: RowPairs, size: int, rounding: float, precision: str
) -> str:
    """What was done, in a line."""
    rows, width = source.table.shape
    share = f"all {size:,} rows by {pairs.by}"
    if len(pairs.ours) < size:
        share = f"{len(pairs.ours):,} of {size:,} rows by {pairs.by}, the rest random"
    rounded = f"; rounded to {precision}, by {rounding:.1e} at most" if rounding else ""
    return f"word embeddings from {source.name}: {rows:,} x {width}; {share}{rounded}"


def match_rows(source: PretrainedEmbedding, size: int, tokenizer: Tokenizer) -> RowPairs:
    """Which row goes where, in a table of ``size`` rows."""
    if source.tokens is None:  # then the sizes are equal: `pretrained` has checked it
        return RowPairs(list(range(size)), list(range(size)), "row")
    own = tokenizer.vocab()
    if own is None:
        raise DataError(
            f"embedding.warm_start = {source.name!r} brings its own tokenizer, but tokenizer"
            f" {tokenizer.name!r} does not tell its tokens, so that rows cannot be matched\n  fix:"
            " take another tokenizer; or, if both number their tokens alike, write the table into"
            " a .safetensors or .npz file, which is copied row by row"
        )
    if all(source.tokens.get(token) == number for token, number in own.items()):
        common = list(range(min(size, len(source.table))))
        return RowPairs(common, common, "row")
    return match_by_bytes(source, own)


def match_by_bytes(source: PretrainedEmbedding, own: Mapping[str, int]) -> RowPairs:
    """Rows whose tokens stand for the same bytes."""
    assert source.tokens is not None
    known = {
        meaning: number
        for number, meaning in token_bytes(source.tokens).items()
        if number < len(source.table)
    }
    found = {
        number: known[meaning] for number, meaning in token_bytes(own).items() if meaning in known
    }
    if not found:
        raise DataError(
            f"embedding.warm_start = {source.name!r}: not one token is in both its vocabulary and"
            " the run's\n  fix: take the model's own tokenizer, or another warm start"
        )
    return RowPairs(list(found.values()), list(found), "token string")


def token_bytes(tokens: Mapping[str, int]) -> dict[int, bytes]:
    """The bytes that every id stands for, ids of SentencePiece's single bytes first: a later one
    that means the same counts.
    """
    read = token_decoder(tokens)
    ordered = sorted(tokens.items(), key=lambda item: BYTE_PIECE.fullmatch(item[0]) is None)
    return {number: read(token) for token, number in ordered}


def token_decoder(tokens: Mapping[str, int]) -> Callable[[str], bytes]:
    """How a vocabulary is spelled, told from the way most of its tokens begin that begin with a
    space.
    """
    of_bytes, of_pieces = (
        sum(token.startswith(sign) for token in tokens)
        for sign in (SPACE_OF_BYTES, SPACE_OF_PIECES)
    )
    if not of_bytes and not of_pieces:
        return str.encode
    return decode_byte_level if of_bytes >= of_pieces else decode_sentencepiece


def decode_sentencepiece(token: str) -> bytes:
    """A SentencePiece token: "▁the" is " the", "<0x0A>" a line break (Kudo and Richardson 2018,
    arXiv 1808.06226).
    """
    single = BYTE_PIECE.fullmatch(token)
    return bytes([int(single[1], 16)]) if single else token.replace(SPACE_OF_PIECES, " ").encode()


def decode_byte_level(token: str) -> bytes:
    """A token of a byte-level vocabulary, in which every byte has a printable character (Radford et
    al. 2019): "Ġthe" is " the". What has other characters in it is an added token, spelled as it
    is.
    """
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones of Latin-1
    for themselves, the others in their order for the characters from U+0100 on.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(0x100) if value not in itself]
    return {chr(value): value for value in itself} | {
        chr(0x100 + place): value for place, value in enumerate(others)
    }


BYTE_OF_CHARACTER = byte_level_alphabet()
