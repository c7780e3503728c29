"""Randomness is derived, not stored: every draw comes from (run seed, what it is for), so nothing
has to be saved and rows can move between micro-batches and ranks.
"""

from __future__ import annotations

from hashlib import blake2b


def derive(*purpose: int | str) -> int:
    """A 63-bit seed for a purpose, e.g. ``derive(run_seed, "init", "blocks.0.ffn.fc1.weight")``."""
    digest = blake2b("\0".join(map(str, purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
