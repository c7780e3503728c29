"""Small components with one mistake each, and the check that must catch it (EXPECTED_CHECK)."""

from lswt_core.hooks import hookimpl
from mutants import (  # noqa: F401
    attention,
    blocks,
    data,
    heads,
    layers,
    losses,
    memories,
    mixers,
    optimizers,
    parametrisations,
    positions,
    sharded,
    stateful_layers,
)
from mutants.expected import EXPECTED_CHECK as EXPECTED_CHECK
from mutants.expected import MUTANTS


@hookimpl
def lswt_components() -> list[type]:
    """All mutants."""
    return MUTANTS
