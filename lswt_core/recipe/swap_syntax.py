"""Swaps, as ``ablate``, ``bench`` and ``plan`` take them: "ffn=gelu", "memory.xl=false". Imports no
torch.
"""

from __future__ import annotations

from lswt_core.errors import Problem, RecipeError
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.recipe.overrides import PLACE, parse_value
from lswt_core.recipe.toml_lines import Key, parse_key
from lswt_core.registry.kinds import KIND_OF_TABLE

USE = "use"


def override_of(swap: str) -> str:
    """Translate a swap to an override of a recipe.

    The table of a component takes a name: "ffn=gelu" -> "ffn.use=gelu", "memory.cache=xl-cache" ->
    "memory.cache.use=xl-cache". "memory.registers=true" adds the component of that name,
    "memory.xl=false" removes it. Any other key is an option: "positional.base=10000". Raises
    RecipeError for anything else.
    """
    key, equals, text = (part.strip() for part in swap.partition("="))
    path = parse_key(key)
    if not equals or path is None:
        why, fix = (
            "it does not read AXIS=VALUE",
            "write e.g. ffn=gelu, memory.xl=false or positional.base=10000",
        )
        raise RecipeError([Problem(f"cannot use the swap {swap!r}", PLACE, why, fix)])
    value = parse_value(text)
    if not names_component(path):
        return f"{key}={text}"
    if value is True:
        return f"{key}.{USE}={path[-1]}"
    if value is False:
        return f"{key}={text}"
    return f"{key}.{USE}={text}"


def names_component(path: Key) -> bool:
    """Whether a key is the table of one component, of all layers or of some."""
    table = path[2:] if path[0] == LAYERS else path
    kind = KIND_OF_TABLE.get(table[0]) if table else None
    return kind is not None and len(table) == (2 if kind.many else 1)
