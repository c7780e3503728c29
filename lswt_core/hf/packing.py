"""Padded and packed batches: padding is moved to the beginning of each row and masked, and texts
that share a row do not attend to each other.

The hidden states of a text are those it would have alone in its row: attention starts at its first
token, and positions count from there or from the end of the segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lswt_core.hf.cache import LswtCache
from lswt_core.interfaces import PositionalEncoding
from lswt_core.model.decoder import Decoder


class Packing(NamedTuple):
    """Order of the new tokens of a batch [B, T] and the span each of them attends to."""

    # [B, T] index of the token at each packed place; None: unchanged order
    order: Tensor | None = None
    # [B, T] first position that each packed token attends to; None: no limit
    first_visible: Tensor | None = None
    # [B] number of tokens so far of the last text of each row; None: all tokens
    text_length: Tensor | None = None

    @classmethod
    def from_padding_mask(cls, is_token: Tensor) -> Packing:
        """Return the packing of a mask [B, T], False at padding."""
        # padding first, tokens in their order
        order = is_token.to(torch.int8).argsort(dim=1, stable=True)
        first = (~is_token).sum(1, keepdim=True)  # [B, 1]
        place = torch.arange(is_token.shape[1], device=is_token.device)
        return cls(order, first.where(place >= first, 0), is_token.sum(1))

    def split_texts(self, begins: Tensor, n_cached: Tensor) -> Packing:
        """Return the packing with texts starting where ``begins`` [B, T] is true, in packed order;
        ``n_cached`` [B] tokens of each row's first text are in the cache.
        """
        length = begins.shape[1]
        first = self.first_visible
        if first is None:
            first = -n_cached[:, None]
        place = torch.arange(length, device=begins.device)
        first_visible = place.where(begins, first).cummax(1).values
        text_length = length - first_visible[:, -1]
        if self.text_length is not None:
            text_length = self.text_length.minimum(text_length)
        return Packing(self.order, first_visible, text_length)

    def pack(self, x: Tensor) -> Tensor:
        """Reorder [B, T, ...] into packed order."""
        return x if self.order is None else x.gather(1, broadcast_index(self.order, x))

    def unpack(self, x: Tensor) -> Tensor:
        """Reorder packed [B, T, ...] back into the batch's order."""
        if self.order is None:
            return x
        return x.gather(1, broadcast_index(self.order.argsort(dim=1), x))


def broadcast_index(order: Tensor, x: Tensor) -> Tensor:
    """Expand an order [B, T] to an index into x [B, T, ...]."""
    return order.view(*order.shape, *(1,) * (x.ndim - 2)).expand(x.shape)


def pack_batch(
    decoder: Decoder,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    embedded: Tensor,
    cache: LswtCache | None,
) -> Packing:
    """Return the packing of embedded tokens [B, T, d_vocab].

    Raises ValueError if the mask, the positions or the decoder's positional encoding do not allow
    each text to be computed as it would be alone.
    """
    is_token = read_attention_mask(decoder, attention_mask, embedded, cache)
    if is_token is None:
        packing = Packing(first_visible=first_visible_in_cache(decoder, cache, embedded))
        is_token = torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
    else:
        packing = Packing.from_padding_mask(is_token)
    if position_ids is None:
        return packing
    rows, length = embedded.shape[:2]
    if tuple(position_ids.shape) not in {(1, length), (rows, length)}:
        raise ValueError(f"position_ids must be [{rows}, {length}], not {list(position_ids.shape)}")
    n_cached, cache_length = count_cached(cache, rows, embedded.device)
    positions = packing.pack(position_ids.to(embedded.device).expand(rows, length))
    begins = find_text_starts(positions, packing.pack(is_token), (n_cached, cache_length))
    if begins is None:
        return packing
    refuse_encodings(
        decoder,
        "a row of several texts",
        lambda encoding: is_absolute(encoding) or encoding.sinks_depend_on_segment_end,
    )
    return packing.split_texts(begins, n_cached)


def count_cached(cache: LswtCache | None, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the number of cached tokens of each row's last text, and of all its cached tokens and
    padding, [B] each.
    """
    zero = torch.zeros(rows, dtype=torch.int64, device=device)
    if cache is None:
        return zero, zero
    of_text = zero if cache.text_length is None else cache.text_length.to(device)
    return of_text, zero + cache.length


def read_attention_mask(
    decoder: Decoder, attention_mask: Tensor | None, embedded: Tensor, cache: LswtCache | None
) -> Tensor | None:
    """Return which new tokens [B, T] are not padding; None if all are tokens."""
    if attention_mask is None:
        return None
    rows, length = embedded.shape[:2]
    shape = attention_mask.shape
    if attention_mask.ndim != 2 or shape[0] != rows or shape[1] < length:
        raise ValueError(
            f"attention_mask must be [{rows}, {length}], or longer by the cached tokens, not"
            f" {list(shape)}"
        )
    is_token = attention_mask[:, -length:].bool()
    if bool(is_token.all()):
        return None
    if cache is not None and cache.length:
        raise ValueError(
            "padding in the middle of a text: rows with cached tokens must continue with equally"
            " many new tokens; pad at the beginning of the text, or run the rows apart"
        )
    refuse_encodings(decoder, "a padded batch", is_absolute)
    return is_token


def first_visible_in_cache(
    decoder: Decoder, cache: LswtCache | None, embedded: Tensor
) -> Tensor | None:
    """Return the first position [B, T] that new tokens attend to if the cache still holds padding
    or earlier texts; None if everything in it is visible.
    """
    if cache is None or cache.text_length is None or not cache.has_masked_tokens:
        return None
    # recurrent layers may keep the last tokens too, those of a convolution or a chunk
    if not decoder.is_recurrent and int(cache.text_length.min()) >= decoder.memory_length:
        return None
    return -cache.text_length.to(embedded.device)[:, None].expand(embedded.shape[:2])


def is_absolute(encoding: PositionalEncoding) -> bool:
    """Return whether an encoding depends on the length of a segment or on where it begins."""
    return encoding.length_dependent or type(encoding).embed is not PositionalEncoding.embed


def refuse_encodings(
    decoder: Decoder, batch: str, is_unsuited: Callable[[PositionalEncoding], bool]
) -> None:
    """Raise ValueError if a positional encoding makes texts depend on the rest of the batch."""
    for module in decoder.modules():
        if isinstance(module, PositionalEncoding) and is_unsuited(module):
            raise ValueError(
                f"positional encoding {module.name!r} does not support {batch}: it depends on the"
                " number of tokens, or on where the segment begins or ends, which all rows share;"
                " put texts of one length together, one per row"
            )


def find_text_starts(
    positions: Tensor, is_token: Tensor, allowed: tuple[Tensor, ...]
) -> Tensor | None:
    """Return where a new text begins within a row, bool [B, T], from packed positions [B, T]; None
    if nowhere.

    A text begins at every position 0 except that of the row's first token, which must be at one of
    the positions ``allowed``, each [B]. ``is_token`` [B, T] is False at padding. Raises ValueError
    if positions do anything but count up by one or restart at 0.
    """
    previous = positions.roll(1, 1)
    # [B, T] true at each row's first token
    head = is_token & ~torch.cat((torch.zeros_like(is_token[:, :1]), is_token[:, :-1]), 1)
    expected = torch.stack([positions == one[:, None] for one in allowed]).any(0)
    begins = is_token & ~head & (positions == 0)
    wrong = is_token & ~torch.where(head, expected, begins | (positions == previous + 1))
    any_wrong, any_begins = torch.stack((wrong.any(), begins.any())).tolist()
    if any_wrong:
        row, place = (int(i) for i in wrong.nonzero()[0])
        refuse_position(positions[row], place, bool(head[row, place]), row, allowed)
    return begins if any_begins else None


def refuse_position(
    positions: Tensor, place: int, is_first: bool, row: int, allowed: tuple[Tensor, ...]
) -> None:
    """Raise ValueError for the position at a place of a row, positions [T]."""
    if is_first:
        starts = sorted({int(one[row]) for one in allowed})
        raise ValueError(
            f"position_ids of row {row} begin at {int(positions[place])}, not"
            f" {' or '.join(map(str, starts))}: positions are relative here and count the tokens"
            " that were read; leave position_ids out"
        )
    raise ValueError(
        f"position_ids of row {row} go from {int(positions[place - 1])} to"
        f" {int(positions[place])}: they must count up by one, or restart at 0 where another text"
        " begins"
    )
