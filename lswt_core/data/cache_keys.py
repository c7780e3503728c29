"""Cache keys of tokenised texts and trained tokenizers."""

from __future__ import annotations

import json
from hashlib import blake2b

from lswt_core.recipe import Chosen


def cache_key(fingerprint: str, *components: Chosen) -> str:
    """A hash of a fingerprint and of the names and options of the components it comes from. The
    options are included because a component's own fingerprint may leave one out.
    """
    parts: list[object] = [fingerprint]
    parts += [[chosen.kind, chosen.name, chosen.plain_options()] for chosen in components]
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
