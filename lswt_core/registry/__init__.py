"""The plugin registry: components by kind and name, described from source without importing them,
imported only when used. Imports no torch.
"""

from lswt_core.registry.blame import Culprit
from lswt_core.registry.lookup import NotOffered, Registry
from lswt_core.registry.offer import AUTO, REQUIRED, Broken, Offer, Option
from lswt_core.registry.suggest import nearest

__all__ = [
    "AUTO",
    "REQUIRED",
    "Broken",
    "Culprit",
    "NotOffered",
    "Offer",
    "Option",
    "Registry",
    "nearest",
]
