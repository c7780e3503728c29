"""The sources of a model beside its weights, so that it loads without this library
(``trust_remote_code=True``).

transformers copies and runs the files that a config's ``auto_map`` names. Two are written: the
config's, and one that holds the decoder, the model's components and the model classes, put together
from this library's own modules: the same lines, in order of need, without their imports of each
other and without what belongs to plugins only.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from lswt_core import __version__
from lswt_core.errors import PluginError
from lswt_core.hf.components import plugins, suitable_backend
from lswt_core.hf.configuration import LswtConfig
from lswt_core.recipe.layer_selectors import LAYERED, LAYERS
from lswt_core.registry import Offer
from lswt_core.registry.discover import FILE

BUNDLED = ("lswt-core", FILE)  # whose sources come along: no package has those of a single file
CONFIGURATION, MODELING = "lswt_core.hf.configuration", "lswt_core.hf.modeling"
REPLACED = "lswt_core.hf.components"  # finds plugins; a bundle knows its own
# to import
NOT_NEEDED = (
    "annotated_types",
    "lswt_core.hooks",
    "lswt_core.hf.announce",
    "transformers.models.auto",
)
AUTO_MAP = {
    "AutoConfig": "configuration_lswt.LswtConfig",
    "AutoModel": "modeling_lswt.LswtModel",
    "AutoModelForCausalLM": "modeling_lswt.LswtForCausalLM",
}
BOUNDS = re.compile(r"Annotated\[(\w+), [^\[\]]*\]")  # options were checked when the model was made
HEADER = (
    f"# Written by lswt-core {__version__} (Apache-2.0). The library's own lines; edit them"
    " there.\n"
)


def sources(config: LswtConfig) -> dict[str, str] | None:
    """File names and contents of a model's own code; None if a component belongs to another
    package.
    """
    if any(told["distribution"] not in BUNDLED for told in config.components.values()):
        return None
    registry = plugins()
    offers = {(kind, use): registry.find(kind, use) for kind, use in chosen(config)}
    backend = suitable_backend(config)
    offers |= {
        ("attention", name): registry.find("attention", name) for name in (backend, "eager", "sdpa")
    }
    modules = in_order({MODELING, *(offer.module for offer in offers.values())})
    parts = [ModuleSource(module) for module in modules if module not in (CONFIGURATION, REPLACED)]
    return {
        "configuration_lswt.py": file_of(
            [ModuleSource(CONFIGURATION)], "The config of an LSWT model."
        ),
        "modeling_lswt.py": file_of(
            parts, "An LSWT model with all of its components.", own_components(offers, backend)
        ),
    }


def chosen(config: LswtConfig) -> Iterator[tuple[str, str]]:
    """Kind and name of every component of a config but an "auto" attention."""
    for held in (config.recipe, *config.recipe.get(LAYERS, {}).values()):
        for kind in LAYERED:
            found = held.get(kind, {})
            tables = (
                [table for table in found.values() if table]
                if kind == "memory"
                else [found]
                if found
                else []
            )
            yield from (
                (kind, table["use"])
                for table in tables
                if (kind, table["use"]) != ("attention", "auto")
            )


def in_order(wanted: set[str]) -> list[str]:
    """The modules and all of ours that they import, each after those it needs."""
    graph: dict[str, set[str]] = {}
    waiting = sorted(wanted)
    while waiting:
        module = waiting.pop()
        if module not in graph:
            graph[module] = (
                {"lswt_core.model.spec"}
                if module == REPLACED
                else ours(ast.parse(path_of(module).read_text(encoding="utf-8")))
            )
            waiting += sorted(graph[module])
    return list(TopologicalSorter(graph).static_order())


def ours(tree: ast.Module) -> set[str]:
    """The modules of this library and its plugins that a module needs once it is bundled."""
    named = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    return {name for name in named if name.startswith("lswt_") and not name.startswith(NOT_NEEDED)}


def path_of(module: str) -> Path:
    """A module's file."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise PluginError(f"{module} has no source file to bundle")
    return Path(spec.origin)


class ModuleSource:
    """What a bundle takes from one module: its outside imports, and its other statements with the
    comments before them.
    """

    def __init__(self, module: str) -> None:
        self.module = module
        self.text = path_of(module).read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        # (module, name), and (module, "") for the module itself
        self.imports: set[tuple[str, str]] = set()
        self.statements: list[str] = []
        self.names: set[str] = set()
        tree = ast.parse(self.text)
        documented = ast.get_docstring(tree) is not None
        end = (tree.body[0].end_lineno or 0) if documented else 0
        for node in tree.body[documented:]:
            text = "\n".join(self.lines[end : node.end_lineno]).strip("\n")
            end = node.end_lineno or end
            self.take(node, text)

    def take(self, node: ast.stmt, text: str) -> None:
        """One top-level statement."""
        match node:
            case ast.ImportFrom(module=module, names=names):
                if any(alias.asname for alias in names) and (module or "").startswith("lswt_"):
                    raise PluginError(
                        f"{self.module}:{node.lineno} renames what it imports from {module}, which"
                        " a bundle cannot"
                    )
                if module != "__future__" and not (module or "").startswith(("lswt_", *NOT_NEEDED)):
                    self.imports |= {(module or "", ast.unparse(alias)) for alias in names}
            case ast.Import(names=names):
                self.imports |= {(ast.unparse(alias), "") for alias in names}
            case (
                ast.FunctionDef(decorator_list=[ast.Name(id="hookimpl")])
                | ast.If(test=ast.Name(id="TYPE_CHECKING"))
            ):
                pass
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr="register"))):
                pass
            case _:
                self.statements.append(BOUNDS.sub(r"\1", text))
                self.names |= defined(node)


def defined(node: ast.stmt) -> set[str]:
    """The names a statement binds."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return {name}
        case ast.Assign() | ast.AnnAssign():
            return {
                part.id
                for part in ast.walk(node)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            }
    return set()


def file_of(parts: list[ModuleSource], doc: str, last: str = "") -> str:
    """Parts as one file; raises PluginError if two of them use a name for different things."""
    owners: dict[str, str] = {}
    for part in parts:
        for name in part.names:
            if owners.setdefault(name, part.module) != part.module:
                raise PluginError(
                    f"{owners[name]} and {part.module} both define {name!r}: a bundle has one name"
                    " for one thing"
                )
    imports = import_lines(set().union(*(part.imports for part in parts)))
    bodies = [
        f"# {'-' * 20} {part.module}\n\n\n" + "\n\n\n".join(part.statements)
        for part in parts
        if part.module != MODELING
    ]
    bodies += [last] if last else []
    bodies += ["\n\n\n".join(part.statements) for part in parts if part.module == MODELING]
    local = ["from .configuration_lswt import LswtConfig"] if last else []
    head = [
        HEADER + f'"""{doc}"""',
        "from __future__ import annotations",
        "\n".join([*imports, "", *local]),
    ]
    return "\n\n".join(head) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


def import_lines(found: set[tuple[str, str]]) -> list[str]:
    """Import statements, one a module."""
    plain = [f"import {module}" for module, name in sorted(found) if not name]
    modules = sorted({module for module, name in found if name})
    return plain + [
        f"from {home} import"
        f" {', '.join(sorted(name for module, name in found if module == home and name))}"
        for home in modules
    ]


def own_components(offers: dict[tuple[str, str], Offer], backend: str) -> str:
    """The bundle's way from a config to a blueprint."""
    registry = plugins()
    classes: dict[Any, str] = {key: registry.load(offer).__name__ for key, offer in offers.items()}
    classes[("attention", "auto")] = classes[("attention", backend)]
    table = "\n".join(f"    {key!r}: {name}," for key, name in sorted(classes.items()))
    return f'''# {"-" * 20} the components of this model


CLASSES: dict[tuple[str, str], Any] = {{
{table}
}}


def blueprint(config: LswtConfig) -> DecoderSpec:
    """What the model of a config is built from."""

    def builder(kind: str, table: Mapping[str, Any]) -> Builder:
        if (kind, table["use"]) not in CLASSES:
            offered = ", ".join(use for other, use in CLASSES if other == kind)
            raise ValueError(f"this model's code has no {{kind}} {{table['use']!r}}; it has {{offered}}. Install lswt-core for others.")
        options = {{}} if table["use"] == "auto" else {{key: value for key, value in table.items() if key != "use"}}
        return lambda dims: CLASSES[kind, table["use"]](dims, **options)

    return DecoderSpec.from_tables(config.recipe, builder)'''
