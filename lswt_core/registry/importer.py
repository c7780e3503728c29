"""Imports plugins and describes the component classes that their hook returns. Every error names
the plugin and its version.
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
from lswt_core.registry.blame import location_in, one_line
from lswt_core.registry.component_option import from_hint
from lswt_core.registry.discover import Entry
from lswt_core.registry.kinds import KIND_OF_INTERFACE
from lswt_core.registry.offer import NAME, Offer, Option, find_flaw
from lswt_core.registry.suggest import nearest

HOOKS = [name for name in vars(hooks) if name.startswith(f"{hooks.PROJECT}_")]


def read_offers(entry: Entry) -> list[Offer]:
    """Import a plugin and describe its components. Raises PluginError."""
    offers = [describe(entry, component) for component in component_classes(entry)]
    if flaw := find_flaw(offers):
        raise PluginError(f"{entry}: {flaw}; its author must change it")
    return offers


def component_classes(entry: Entry) -> list[type]:
    """The component classes that a plugin's hook returns. Raises PluginError."""
    module = entry.live or import_module(entry)
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    try:
        manager.register(module, name=f"{entry.distribution}:{entry.name}")
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{entry}: {hook_problem(manager, module, error)}") from error
    try:
        results = manager.hook.lswt_components()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{entry}: its hook {HOOKS[0]} raised {one_line(error)}; update or uninstall the plugin"
        ) from error
    if len(results) != 1:
        raise PluginError(
            f"{entry}: it has no hook; define a function {HOOKS[0]}() marked with"
            " @lswt_core.hooks.hookimpl"
        )
    (classes,) = results
    if not isinstance(classes, list | tuple) or not all(isinstance(one, type) for one in classes):
        raise PluginError(
            f"{entry}: its hook {HOOKS[0]} must return a list of classes, not {classes!r}"
        )
    return list(classes)


def hook_problem(manager: pluggy.PluginManager, module: ModuleType, error: Exception) -> str:
    """What is wrong with a plugin's hooks: a misspelled name, or arguments."""
    callers = manager.get_hookcallers(module) or ()
    unknown = [caller.name for caller in callers if not caller.has_spec()]
    if not unknown:
        return f"its hook {HOOKS[0]} must take no arguments: {one_line(error)}"
    guess = nearest(unknown[0], HOOKS) or HOOKS[0]
    return f"there is no hook {unknown[0]!r}; the nearest is {guess!r}"


def import_module(entry: Entry) -> ModuleType:
    """Import a plugin's module. Raises PluginError, with the line of a single-file plugin."""
    if not all(part.isidentifier() for part in entry.module.split(".")):
        raise PluginError(
            f"{entry}: its entry point must read 'name = \"module\"', not {entry.module!r}"
        )
    try:
        return importlib.import_module(entry.module) if entry.path is None else import_file(entry)
    except (Exception, SystemExit) as error:
        why, fix = one_line(error), "update or uninstall it"
        if entry.path is not None:
            why, fix = f"{why}{location_in(entry.path, error)}", "mend it"
        raise PluginError(f"{entry} cannot be imported: {why}; {fix}") from error


def import_file(entry: Entry) -> ModuleType:
    """Import a single-file plugin under a module name made of its content's hash."""
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
    """The kind of a class: that of the one interface it implements. Raises PluginError."""
    from lswt_core import interfaces  # imports torch

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
    """Describe a component class. Raises PluginError."""
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
            f"{entry}: the options of {kind} {name!r} cannot be read: {one_line(error)}"
        ) from error
    return Offer(
        kind=kind,
        name=name,
        distribution=entry.distribution,
        version=entry.version,
        module=entry.module,
        source=source,
        doc=inspect.cleandoc(component.__doc__ or ""),
        citation=inspect.cleandoc(getattr(component, "citation", "")),
        options=options,
    )


def options_of(component: type) -> tuple[Option, ...]:
    """The keyword-only parameters of a class's constructor. Raises TypeError for one without an
    annotation.
    """
    constructor = inspect.unwrap(component.__init__)  # type: ignore[misc]
    parameters = inspect.signature(constructor).parameters.values()
    options = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    hints = typing.get_type_hints(constructor, include_extras=True) if options else {}
    for option in options:
        if option.name not in hints:
            raise TypeError(f"the parameter {option.name!r} has no annotation")
    return tuple(
        Option(option.name, from_hint(hint := hints[option.name]) or hint, option.default)
        for option in options
    )
