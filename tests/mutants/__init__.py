"""Small components that are wrong in one way each, and the check that is meant to find it
(``MEANT``).
"""

from lswt_core.hooks import hookimpl
from mutants import attention, layers, losses, memories, positions, rest, training  # noqa: F401
from mutants.meant import MEANT as MEANT
from mutants.meant import OFFERED


@hookimpl
def lswt_components() -> list[type]:
    """All of them."""
    return OFFERED
