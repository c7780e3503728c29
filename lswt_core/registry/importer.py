"""Imports a plugin and asks its hook for component classes; whatever goes wrong is told with the
plugin's name and version.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import typing
from types import ModuleType

import pluggy

from lswt_core import hooks
from lswt_core.errors import PluginError
from lswt_core.registry.blame import place
from lswt_core.registry.discover import Entry
from lswt_core.registry.kinds import KIND_OF_INTERFACE
from lswt_core.registry.offer import NAME, Offer, Option, complaint
from lswt_core.registry.suggest import nearest

HOOKS = [name for name in vars(hooks) if name.startswith(f"{hooks.PROJECT}_")]


def read(entry: Entry) -> list[Offer]:
    """The offers of a plugin."""
    offers = [describe(entry, component) for component in classes(entry)]
    if problem := complaint(offers):
        raise PluginError(f"{entry}: {problem}; its author must rename it")
    return offers


def classes(entry: Entry) -> list[type]:
    """The component classes a plugin offers."""
    module = entry.live or import_module(entry)
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    try:
        manager.register(module, name=f"{entry.distribution}:{entry.name}")
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{entry}: {hook_problem(manager, module, error)}") from error
    try:
        answers = manager.hook.lswt_components()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{entry}: its hook {HOOKS[0]} raised {cause(error)}; update or uninstall the plugin"
        ) from error
    if len(answers) != 1:
        raise PluginError(
            f"{entry}: it has no hook; define a function {HOOKS[0]}() marked with"
            " @lswt_core.hooks.hookimpl"
        )
    if not isinstance(answers[0], list | tuple) or not all(
        isinstance(item, type) for item in answers[0]
    ):
        raise PluginError(
            f"{entry}: its hook {HOOKS[0]} must return a list of classes, not {answers[0]!r}"
        )
    return list(answers[0])


def hook_problem(manager: pluggy.PluginManager, module: ModuleType, error: Exception) -> str:
    """What is wrong with a plugin's hooks, in words that name the right one."""
    unknown = [
        caller.name for caller in manager.get_hookcallers(module) or () if not caller.has_spec()
    ]
    if not unknown:
        return f"its hook {HOOKS[0]} must take no arguments: {cause(error)}"
    return (
        f"there is no hook {unknown[0]!r}; the nearest is"
        f" {nearest(unknown[0], HOOKS) or HOOKS[0]!r}"
    )


def import_module(entry: Entry) -> ModuleType:
    """Import a plugin."""
    if not all(part.isidentifier() for part in entry.module.split(".")):
        raise PluginError(
            f"{entry}: its entry point must read 'name = \"module\"', not {entry.module!r}"
        )
    try:
        return importlib.import_module(entry.module) if entry.path is None else import_file(entry)
    except (Exception, SystemExit) as error:
        if entry.path is not None:
            raise PluginError(
                f"{entry} cannot be imported: {cause(error)}{place(error, entry.path)}; mend it"
            ) from error
        raise PluginError(
            f"{entry} cannot be imported: {cause(error)}; update or uninstall it"
        ) from error


def import_file(entry: Entry) -> ModuleType:
    """Import a single-file plugin under a name made of its content's hash."""
    if entry.module in sys.modules:
        return sys.modules[entry.module]
    spec = importlib.util.spec_from_file_location(entry.module, entry.path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{entry.path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[entry.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[entry.module]
        raise
    return module


def kind_of(entry: Entry, component: type) -> str:
    """The kind a class belongs to: the one interface it implements."""
    from lswt_core import interfaces  # torch, which only a real import may cost

    kinds = [
        kind
        for interface, kind in KIND_OF_INTERFACE.items()
        if issubclass(component, getattr(interfaces, interface))
    ]
    if len(kinds) != 1:
        expected = ", ".join(KIND_OF_INTERFACE)
        raise PluginError(
            f"{entry}: {component.__name__} must derive from exactly one of lswt_core.interfaces:"
            f" {expected}"
        )
    return kinds[0]


def describe(entry: Entry, component: type) -> Offer:
    """The offer a class makes."""
    kind, name = kind_of(entry, component), getattr(component, "name", None)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise PluginError(
            f"{entry}: {component.__name__} needs a class attribute 'name', a text of letters,"
            " digits, '.', '_' and '-'"
        )
    try:
        options, source = options_of(component), inspect.getsourcefile(component) or ""
    except (NameError, TypeError, ValueError, AttributeError, SyntaxError, OSError) as error:
        raise PluginError(
            f"{entry}: the options of {kind} {name!r} cannot be read: {cause(error)}"
        ) from error
    doc, citation = (
        inspect.cleandoc(text)
        for text in (component.__doc__ or "", getattr(component, "citation", ""))
    )
    return Offer(
        kind, name, entry.distribution, entry.version, entry.module, source, doc, citation, options
    )


def options_of(component: type) -> tuple[Option, ...]:
    """The keyword-only parameters of a class's constructor."""
    constructor = inspect.unwrap(component.__init__)  # type: ignore[misc]
    named = [
        p for p in inspect.signature(constructor).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    hints = typing.get_type_hints(constructor, include_extras=True) if named else {}
    for parameter in named:
        if parameter.name not in hints:
            raise TypeError(f"the parameter {parameter.name!r} has no annotation")
    return tuple(Option(p.name, hints[p.name], p.default) for p in named)


def cause(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")
