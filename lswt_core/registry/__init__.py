"""What installed plugins offer: found by name, read from source without importing, imported only when used. Imports no torch."""

from lswt_core.registry.blame import Culprit
from lswt_core.registry.lookup import NotOffered, Registry
from lswt_core.registry.nearest import nearest
from lswt_core.registry.values import AUTO, REQUIRED, Broken, Offer, Option

__all__ = ["AUTO", "REQUIRED", "Broken", "Culprit", "NotOffered", "Offer", "Option", "Registry", "nearest"]
