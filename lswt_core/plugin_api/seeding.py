"""Derived seeds: every random stream is seeded by the run's seed and the stream's purpose, so that
no generator state is saved and rows can move between micro-batches and ranks.
"""

from __future__ import annotations

from hashlib import blake2b


def derive_seed(*purpose: int | str) -> int:
    """A 63-bit seed, e.g. ``derive_seed(run_seed, "init", "blocks.0.ffn.fc1.weight")``."""
    digest = blake2b("\0".join(map(str, purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
