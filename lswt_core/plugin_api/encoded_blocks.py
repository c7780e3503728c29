"""For mixers of the softmax-attention family: queries and keys encoded for their positions, as the
blocks that an attention backend takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.interfaces import KeyValue, KVBlock, PositionalEncoding


def encode_positions(
    q: Tensor,
    key_values: Sequence[KeyValue],
    positions: Tensor,
    first_visible: Tensor | None,
    positional: PositionalEncoding,
) -> list[KVBlock]:
    """Apply the positional encoding to queries [B, T, H, D] and all keys. Sinks have no position
    and become blocks of their own, first; the last of ``key_values`` is the new tokens' own.
    """
    sinks = [kv for kv in key_values if kv.positions is None]
    placed = [(kv, kv.positions) for kv in key_values if kv.positions is not None]
    oldest = torch.cat([k_positions for _, k_positions in placed]).amin()  # []
    if first_visible is not None:
        oldest = first_visible.clamp_min(oldest)  # [B or 1, T]
    q = positional.scale_queries(q, positions, oldest)
    blocks = [encode_sink_block(q, sink, positions, oldest, positional) for sink in sinks]
    q, keys = encode_keys(q, placed, positions, positional)
    encoded = [kv._replace(k=k) for (kv, _), k in zip(placed, keys, strict=True)]
    biases = positional.block_biases(q, encoded, positions)
    for i, (kv, bias) in enumerate(zip(encoded, biases, strict=True)):
        # a single query sees all keys: no mask
        causal = i == len(encoded) - 1 and len(positions) > 1
        blocks.append(KVBlock(q, kv.k, kv.v, causal, bias, kv.positions, first_visible))
    return blocks


def encode_keys(
    q: Tensor,
    key_values: list[tuple[KeyValue, Tensor]],
    positions: Tensor,
    positional: PositionalEncoding,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Encode queries [B, T, H, D] and the keys of every block for each other.

    An encoding that rotates each key by its own position alone is applied block by block: nothing
    is concatenated, and cached keys stay without gradient.
    """
    if type(positional).encode is PositionalEncoding.encode:
        keys = [
            kv.k if kv.encoded else positional.rotate(kv.k, k_positions)
            for kv, k_positions in key_values
        ]
        return positional.rotate(q, positions), keys
    q, k = positional.encode(
        q,
        torch.cat([kv.k for kv, _ in key_values], dim=1),
        positions,
        torch.cat([k_positions for _, k_positions in key_values]),
    )
    return q, k.split([kv.k.shape[1] for kv, _ in key_values], dim=1)


def encode_sink_block(
    q: Tensor, sink: KeyValue, positions: Tensor, oldest: Tensor, positional: PositionalEncoding
) -> KVBlock:
    """The key block of a sink, attended to by the queries [B, T, H, D] as the positional encoding
    encodes them for sinks, or by the sink's own queries.
    """
    if sink.q is not None:
        return KVBlock(sink.q.expand(q.shape).contiguous(), sink.k, sink.v, causal=False)
    return KVBlock(*positional.encode_sink(q, sink.k, positions, oldest), sink.v, causal=False)
