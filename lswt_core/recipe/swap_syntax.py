"""Swaps, as ``ablate``, ``bench`` and ``plan`` take them: "ffn=gelu", "memory.xl=false", and
"mixer=mamba2,memory.xl=false,positional=none", several keys that change together. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from lswt_core.errors import Problem, RecipeError
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.recipe.overrides import PLACE, parse_value
from lswt_core.recipe.toml_lines import Key, parse_key
from lswt_core.registry.kinds import KIND_OF_TABLE

USE = "use"
EXAMPLE = "ffn=gelu, memory.xl=false, positional.base=10000 or mixer=mamba2,memory.xl=false"
# strings, then single characters: a quote that is never closed is an ordinary one
PIECE = re.compile(r"""(?s)"(?:\\.|[^"\\])*"|'[^']*'|.""")


def overrides_of(swap: str) -> tuple[str, ...]:
    """Translate a swap to overrides of a recipe, one for each of its keys.

    The table of a component takes a name: "ffn=gelu" -> "ffn.use=gelu", "memory.cache=xl-cache" ->
    "memory.cache.use=xl-cache". "memory.registers=true" adds the component of that name,
    "memory.xl=false" removes it. Any other key is an option: "positional.base=10000". Raises
    RecipeError for anything else, and for a key that is named twice.
    """
    overrides = tuple(override_of(part, swap) for part in split_keys(swap))
    keys = [override.partition("=")[0] for override in overrides]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise refusal(swap, f"it names {twice} twice", "leave one of them out")
    return overrides


def split_keys(swap: str) -> Iterator[str]:
    """Yield each KEY=VALUE of a swap. A comma ends a value if a key and "=" follow, unless it
    stands in quotes or brackets: values may hold commas.
    """
    start, depth = 0, 0
    for match in PIECE.finditer(swap):
        piece = match[0]
        depth += (piece in "[{") - (piece in "]}")
        if piece == "," and depth <= 0 and begins_with_key(swap[match.end() :]):
            yield swap[start : match.start()]
            start = match.end()
    yield swap[start:]


def begins_with_key(text: str) -> bool:
    """Whether a text reads KEY=... ."""
    key, equals, _ = text.partition("=")
    return bool(equals) and parse_key(key.strip()) is not None


def override_of(part: str, swap: str) -> str:
    """The override of one KEY=VALUE of a swap."""
    key, equals, text = (word.strip() for word in part.partition("="))
    path = parse_key(key)
    if not equals or path is None:
        raise refusal(swap, "it does not read AXIS=VALUE", f"write e.g. {EXAMPLE}")
    value = parse_value(text)
    if not names_component(path):
        return f"{key}={text}"
    if value is True:
        return f"{key}.{USE}={path[-1]}"
    if value is False:
        return f"{key}={text}"
    return f"{key}.{USE}={text}"


def refusal(swap: str, why: str, fix: str) -> RecipeError:
    """The error about a swap that cannot be read."""
    return RecipeError([Problem(f"cannot use the swap {swap!r}", PLACE, why, fix)])


def names_component(path: Key) -> bool:
    """Whether a key is the table of one component, of all layers or of some."""
    table = path[2:] if path[0] == LAYERS else path
    kind = KIND_OF_TABLE.get(table[0]) if table else None
    return kind is not None and len(table) == (2 if kind.many else 1)
