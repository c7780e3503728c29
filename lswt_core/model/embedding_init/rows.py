"""Copy rows of a pretrained table into the model's: by id if both vocabularies number their tokens
alike, else by the bytes that tokens stand for.
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
from lswt_core.plugin_api.sharded_tensor import local_tensor, piece_offset

# a leading space as GPT-2's byte-level vocabularies spell it, and as SentencePiece does
SPACE_OF_BYTES, SPACE_OF_PIECES = "Ġ", "▁"
# how SentencePiece spells a byte that no piece covers
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class CopiedRows(NamedTuple):
    """A report of copied rows."""

    text: str  # a line for the log
    record: dict[str, Any]  # for environment.json


class RowPairs(NamedTuple):
    """Rows to copy: row ``theirs[i]`` of the source to row ``ours[i]`` of the model."""

    theirs: list[int]
    ours: list[int]
    by: str  # "row" or "token string"


def copy_rows(source: PretrainedEmbedding, weight: Tensor, tokenizer: Tokenizer) -> CopiedRows:
    """Copy rows of a pretrained table into ``weight`` [V, width], cast to its dtype; rows without a
    counterpart keep their values. Of a sharded table every rank copies its own rows.

    Raises DataError if the vocabularies share no token, or a value overflows weight's dtype.
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
    copy_own_rows(weight, torch.tensor(pairs.ours), narrowed)
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


@torch.no_grad()
def copy_own_rows(weight: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """Copy rows to those numbers of a table, as far as this rank holds them."""
    piece, first = local_tensor(weight), piece_offset(weight)[0]
    own = (numbers >= first) & (numbers < first + len(piece))
    device = piece.device
    piece.index_copy_(0, (numbers[own] - first).to(device), rows[own].to(device))


def largest_rounding_error(rows: Tensor, narrowed: Tensor) -> float:
    """The largest absolute error of casting to a narrower dtype; 0 if it is not narrower."""
    exact = torch.promote_types(rows.dtype, narrowed.dtype)
    if narrowed.dtype == exact:
        return 0.0
    return float((narrowed.to(exact) - rows.to(exact)).abs().max())


def describe_copy(
    source: PretrainedEmbedding, pairs: RowPairs, size: int, rounding: float, precision: str
) -> str:
    """The line for the log."""
    rows, width = source.table.shape
    share = f"all {size:,} rows by {pairs.by}"
    if len(pairs.ours) < size:
        share = f"{len(pairs.ours):,} of {size:,} rows by {pairs.by}, the rest random"
    rounded = f"; rounded to {precision}, by {rounding:.1e} at most" if rounding else ""
    return f"word embeddings from {source.name}: {rows:,} x {width}; {share}{rounded}"


def match_rows(source: PretrainedEmbedding, size: int, tokenizer: Tokenizer) -> RowPairs:
    """Match rows of the source to rows of a table of ``size`` rows. Raises DataError."""
    if source.tokens is None:  # the sizes are equal: `load_pretrained` checks it
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
    """Match rows whose tokens stand for the same bytes. Raises DataError if there are none."""
    assert source.tokens is not None
    row_of_bytes = {
        text: row for row, text in token_bytes(source.tokens).items() if row < len(source.table)
    }
    matches = {
        row: row_of_bytes[text] for row, text in token_bytes(own).items() if text in row_of_bytes
    }
    if not matches:
        raise DataError(
            f"embedding.warm_start = {source.name!r}: not one token is in both its vocabulary and"
            " the run's\n  fix: take the model's own tokenizer, or another warm start"
        )
    return RowPairs(list(matches.values()), list(matches), "token string")


def token_bytes(tokens: Mapping[str, int]) -> dict[int, bytes]:
    """The bytes of every id. SentencePiece's single-byte tokens come first, so that among equal
    ones a proper token is matched.
    """
    decode = token_decoder(tokens)
    ordered = sorted(tokens.items(), key=lambda item: BYTE_PIECE.fullmatch(item[0]) is None)
    return {row: decode(token) for token, row in ordered}


def token_decoder(tokens: Mapping[str, int]) -> Callable[[str], bytes]:
    """The spelling of a vocabulary (byte-level, SentencePiece or plain), by how most tokens with a
    leading space spell it.
    """
    byte_level = sum(token.startswith(SPACE_OF_BYTES) for token in tokens)
    sentencepiece = sum(token.startswith(SPACE_OF_PIECES) for token in tokens)
    if byte_level == sentencepiece == 0:
        return str.encode
    return decode_byte_level if byte_level >= sentencepiece else decode_sentencepiece


def decode_sentencepiece(token: str) -> bytes:
    """The bytes of a SentencePiece token: "▁the" is " the", "<0x0A>" a line break (Kudo and
    Richardson 2018, arXiv 1808.06226).
    """
    single_byte = BYTE_PIECE.fullmatch(token)
    if single_byte:
        return bytes([int(single_byte[1], 16)])
    return token.replace(SPACE_OF_PIECES, " ").encode()


def decode_byte_level(token: str) -> bytes:
    """The bytes of a byte-level token, in which every byte is a printable character (Radford et al.
    2019): "Ġthe" is " the". A token with other characters is an added one, in plain UTF-8.
    """
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def byte_level_alphabet() -> dict[str, int]:
    """The byte of every character of a byte-level vocabulary: printable Latin-1 characters are
    their own byte, the remaining bytes are numbered from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHARACTER = byte_level_alphabet()
