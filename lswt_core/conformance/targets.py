"""From what a user names to the components that it offers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from lswt_core.errors import PluginError
from lswt_core.interfaces import Component
from lswt_core.registry import Offer, Registry
from lswt_core.registry.discover import normal

Target = str | Path | ModuleType | type[Component]


def find_offers(target: Target) -> tuple[Registry, list[Offer]]:
    """The components of a target, and a registry of these and of all installed components. Raises
    PluginError if the target cannot be imported.
    """
    if isinstance(target, type):
        return find_class(target)
    if isinstance(target, str | Path) and Path(target).suffix == ".py":
        return with_installed(Registry([], files=[Path(target)]))
    if isinstance(target, ModuleType):
        return with_installed(Registry([target]))
    modules = [
        entry.module
        for entry in Registry().entries
        if normal(entry.distribution) == normal(str(target))
    ]
    try:
        plugins = [import_module(module) for module in modules or [str(target)]]
        return with_installed(Registry(plugins))
    except ImportError as error:
        raise PluginError(
            f"{target} cannot be imported: {error}\n  fix: give an installed package, its module,"
            " or a .py file"
        ) from error


def find_class(component: type[Component]) -> tuple[Registry, list[Offer]]:
    """The offer of one component class, by its module or by the package around it."""
    plugin = component.__module__
    if not hasattr(import_module(plugin), "lswt_components"):
        plugin = plugin.rpartition(".")[0]
    registry, offers = find_offers(import_module(plugin))
    return registry, [offer for offer in offers if registry.load(offer) is component]


def with_installed(own: Registry) -> tuple[Registry, list[Offer]]:
    """Add all installed plugins to a registry, which partner components come from; returns it with
    its own offers. Raises PluginError if one of its own plugins is broken.
    """
    offers = own.offers()
    if broken := own.broken():
        raise PluginError(broken[0].cause)
    modules = {offer.module for offer in offers}
    installed = [entry for entry in Registry().entries if entry.module not in modules]
    own.entries = (*own.entries, *installed)
    return own, offers
