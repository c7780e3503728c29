"""Under what texts and tokenizers are cached."""

from __future__ import annotations

import json
from hashlib import blake2b

from lswt_core.recipe import Chosen


def keyed(fingerprint: str, *made_by: Chosen) -> str:
    """A fingerprint together with the names and options of the components that made what it is of:
    a component whose fingerprint leaves an option out does not find what it made with another one.
    """
    parts = [fingerprint, *([one.kind, one.name, one.options] for one in made_by)]
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
