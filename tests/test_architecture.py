"""How the code is built, read from its syntax: floors, independence of core and plugins, words, and
what is banned.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from helpers import PLUGINS, ROOT

# A module imports from lower floors only. A package stands on one floor as a whole.
FLOORS = (
    {"interfaces", "errors"},
    {"hooks", "plugin_api"},
    {"device"},
    {"registry", "distributed"},
    {"recipe", "reporting"},
    {"model"},
    {"data", "checkpoint"},
    {"decode", "budget"},
    {"train"},
    {"evaluation"},
    {"hf"},
    {"ablation", "benchmark", "conformance"},
    {"acceptance"},
    {"cli"},
    {"run"},
    {"__main__"},
)
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}
OPEN_TO_PLUGINS = {"interfaces", "hooks", "errors", "plugin_api"}
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALLS = {
    "torch.load",
    "torch.save",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
}
LONGEST = 300  # lines
# lines of interfaces.py, the one file that every author of a plugin reads from top to bottom
CATALOGUE = 1000

CORE = sorted((ROOT / "lswt_core").rglob("*.py"))
PLUGIN = {
    path: name for name in PLUGINS for path in sorted((ROOT / "plugins" / name).rglob("*.py"))
}
SOURCES = [*CORE, *PLUGIN]


def shown(path: Path) -> str:
    """A test's id for a file."""
    return str(path.relative_to(ROOT))


def every(paths: Iterable[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """Make one test of a check of files, which names the files that fail it."""

    def test_of(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            failed = []
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    failed.append(f"{shown(path)}: {str(error).partition(chr(10))[0]}")
            assert not failed, "\n".join(failed)

        test.__name__ = check.__name__
        return test

    return test_of


every_source = every(SOURCES)
every_core_file = every(CORE)
every_plugin_file = every(PLUGIN)


@cache
def tree_of(path: Path) -> ast.Module:
    """A file's syntax."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def module_of(path: Path) -> str:
    """A file's module name."""
    base = ROOT if path in CORE else ROOT / "plugins"
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in SOURCES}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as exactly as it is named: ``from a import
    b`` is a.b where that is a module of ours.
    """
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                for alias in node.names
            )


def top(module: str) -> str:
    """The module or package directly in lswt_core, e.g. "recipe" of lswt_core.recipe.toml_lines."""
    return module.split(".")[1] if "." in module else ""


@every_core_file
def test_imports_go_downwards(path: Path) -> None:
    own = top(module_of(path))
    if not own:  # lswt_core itself
        assert not [name for name in imports(path) if name.startswith("lswt_core")]
        return
    assert own in FLOOR, f"{own} stands on no floor: give it one in FLOORS"
    for name in imports(path):
        below = top(name) if name.split(".")[0] == "lswt_core" else ""
        assert below in ("", own) or FLOOR[below] < FLOOR[own], (
            f"{shown(path)} on floor {FLOOR[own]} imports {name} on {FLOOR[below]}"
        )


def test_every_floor_is_inhabited() -> None:
    assert {top(module_of(path)) for path in CORE} - {""} == set(FLOOR)


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {
        module_of(path): {name for name in imports(path) if name in MODULES} - {module_of(path)}
        for path in SOURCES
    }
    # raises CycleError, which names the cycle
    ordered = list(TopologicalSorter(graph).static_order())
    assert set(ordered) == set(graph)


@every_core_file
def test_the_core_imports_no_plugin(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & set(PLUGINS)


@every_plugin_file
def test_plugins_import_the_core_by_its_front_doors_and_never_each_other(path: Path) -> None:
    ours = {
        name
        for name in imports(path)
        if name.split(".")[0] in {"lswt_core", *PLUGINS} - {PLUGIN[path]}
    }
    assert {top(name) for name in ours} <= OPEN_TO_PLUGINS


@every_source
def test_everything_public_says_what_it_is_for(path: Path) -> None:
    silent = [name for name, node in public(tree_of(path)) if not ast.get_docstring(node)]
    assert ast.get_docstring(tree_of(path)) and not silent


def public(
    scope: ast.Module | ast.ClassDef,
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Functions, classes and methods without a leading underscore."""
    for node in scope.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{name}", below) for name, below in public(node))


@every_source
def test_nothing_is_pickled(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & PICKLERS
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in PICKLING_CALLS and node.attr not in PICKLING_CALLS
        assert not (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and ast.unparse(node.value) != "False"
        )


@every_source
def test_files_stay_short(path: Path) -> None:
    limit = CATALOGUE if path.name == "interfaces.py" else LONGEST
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def decorated(path: Path, marker: str) -> set[str]:
    """Names of a file's functions under a decorator."""
    functions = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef))
    return {
        node.name
        for node in functions
        if marker in {ast.unparse(decorator) for decorator in node.decorator_list}
    }


def test_every_hook_is_implemented_and_every_plugin_implements_one() -> None:
    hooks = decorated(ROOT / "lswt_core" / "hooks.py", "hookspec")
    implemented = {name: set[str]() for name in PLUGINS}
    for path, name in PLUGIN.items():
        implemented[name] |= decorated(path, "hookimpl")
    assert hooks and hooks == set.union(*implemented.values())
    assert all(implemented.values())
