"""Error messages about recipes: what is wrong, why, and the nearest valid name or value."""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

import tomli
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from lswt_core.errors import Problem
from lswt_core.recipe.provenance import OVERLAYS, Branch, Leaf
from lswt_core.recipe.toml_writer import key, value
from lswt_core.registry import nearest
from lswt_core.registry.component_option import ComponentOption
from lswt_core.registry.option_schema import words

ALIASES = {  # names of other libraries and of older versions -> ours
    name: known
    for known, names in {
        "lr": "learning_rate max_lr lr_max peak_lr",
        "batch_size": "rows global_batch_size n_batch",
        "micro_batch_size": "micro_rows mini_batch_size",
        "seq_len": "context seq_length sequence_length context_length block_size max_seq_len",
        "grad_clip": "clip clip_grad max_grad_norm gradient_clipping",
        "document_masking": "documents",
        "document_assignment": "dealing",
        "hessian_update_interval": "refresh_every",
        "steps": "max_steps num_steps n_steps",
        "tokens": "max_tokens num_tokens",
        "d_model": "hidden_size d_hidden n_embd embed_dim",
        "d_ffn": "d_ff intermediate_size ffn_dim",
        "n_layers": "num_layers num_hidden_layers n_layer depth",
        "n_heads": "num_heads num_attention_heads n_head",
        "base": "rope_theta theta",
        "weight_decay": "wd decay",
        "use": "type component",
    }.items()
    for name in names.split()
}
ABSENT = {"dropout": "this family of models has no dropout"}


class Owner(typing.NamedTuple):
    """The component or core table whose keys a recipe table holds."""

    table: str  # "memory.xl"
    words: str  # 'the memory "xl-cache" (lswt-core 0.1.0)'
    model: type[BaseModel]
    extra: frozenset[str] = frozenset()  # keys besides the model's
    usual: str | None = None  # the default of ``use``

    @property
    def keys(self) -> list[str]:
        """The keys a recipe may set."""
        return sorted({*self.model.model_fields, *self.extra})

    def annotation(self, name: str) -> Any:
        """The type of a key, with its bounds."""
        field = self.model.model_fields[name]
        if not field.metadata:
            return field.annotation
        return Annotated[field.annotation, *field.metadata]

    def is_component(self, name: str) -> bool:
        """Whether a key holds components."""
        field = self.model.model_fields.get(name)
        return field is not None and any(isinstance(one, ComponentOption) for one in field.metadata)

    def inner(self, name: object) -> Owner | None:
        """The owner of a table inside of this one; None if the key is no table."""
        field = self.model.model_fields.get(str(name))
        annotation = None if field is None else field.annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        table = f"{self.table}.{name}"
        return Owner(table, f"[{table}]", annotation)


def unknown_key(node: Leaf | Branch, owner: Owner, homes: Mapping[str, Collection[str]]) -> Problem:
    """A key that its table does not have; ``homes`` are the tables of each valid key."""
    name = node.key.rpartition(".")[2]
    alias = ALIASES.get(name, name)
    elsewhere = {home for candidate in (name, alias) for home in homes.get(candidate, ())}
    if alias in owner.keys:
        fix = f'use "{alias}"'
    elif name in ABSENT:
        fix = "remove it"
    elif len(elsewhere) == 1:
        fix = f"it belongs at {elsewhere.pop()}.{name if name in homes else alias}"
    elif guess := nearest(name, owner.keys):
        fix = f'did you mean "{guess}"?'
    elif owner.keys:
        fix = f"remove it, or use one of: {', '.join(owner.keys)}"
    else:
        fix = "remove it: there are no options"
    why = ABSENT.get(name, f"{owner.words} has no such key")
    return Problem(f'unknown key "{node.key}"', node.origin.where, why, fix, node.origin.text)


def unknown_table(
    node: Leaf | Branch, tables: Collection[str], homes: Mapping[str, Collection[str]]
) -> Problem:
    """An unknown table, or an unknown key outside of any table."""
    name = node.key.rpartition(".")[2]
    alias = ALIASES.get(name, name)
    tables = tables if "." in node.key else [*tables, *OVERLAYS, "extends"]
    elsewhere = [] if isinstance(node, Branch) else [*homes.get(alias, ())]
    if len(elsewhere) == 1:
        fix = f"it belongs at {elsewhere[0]}.{alias}"
    elif guess := nearest(name, tables):
        fix = f'did you mean "{guess}"?'
    else:
        fix = f"use one of: {', '.join(tables)}"
    what = "table" if isinstance(node, Branch) else "key"
    return Problem(
        f'unknown {what} "{node.key}"',
        node.origin.where,
        "recipes have no such table",
        fix,
        node.origin.text,
    )


def not_a_table(node: Leaf, fix: str) -> Problem:
    """A value where a table belongs."""
    return Problem(
        f'"{node.key}" is a table',
        node.origin.where,
        f"{shorten(node.value)} is not a table",
        fix,
        node.origin.text,
    )


def not_a_component(node: Leaf, path: str) -> Problem:
    """A value where the table of a component belongs."""
    fix = f"write [{path}] with use = ..."
    if isinstance(node.value, str):  # written like a swap
        fix = f'write {path}.use = "{node.value}"'
    return not_a_table(node, fix)


def wrong_value(detail: ErrorDetails, table: Branch, owner: Owner) -> Problem:
    """A value that pydantic rejects, or a missing key."""
    node, name = table.at(detail["loc"]), str(detail["loc"][0]) if detail["loc"] else ""
    if not name:
        return inconsistent(detail, table, owner)
    expected = words(owner.annotation(name))
    default = owner.model.model_fields[name].default
    if detail["type"] == "missing":
        named = table.items.get("use", table).origin
        written = (
            f"[{owner.table}.{key(name)}]" if owner.is_component(name) else f"{key(name)} = ..."
        )
        why, fix = f"{owner.words} needs it", f"add {written}, {expected}"
        return Problem(f'missing key "{owner.table}.{name}"', named.where, why, fix, named.text)
    given = node.value if isinstance(node, Leaf) else detail["input"]
    label = node.key if isinstance(node, Leaf) else f"{owner.table}.{name}"
    why = f"{shorten(given)} is not {expected}"
    if detail["type"] == "finite_number":
        why = f"{shorten(given)} is not finite"
    fix = suggest_value(given, owner.annotation(name)) or f"give {expected}"
    if isinstance(default, bool | int | float | str | list):
        fix += f" (default: {value(default)})"
    return Problem(f'wrong value for "{label}"', node.origin.where, why, fix, node.origin.text)


def suggest_value(given: Any, annotation: Any) -> str | None:
    """How to correct a value: the nearest choice, or a number without quotes; None if unknown."""
    if not isinstance(given, str):
        return None
    choices: list[Any] = []
    for member in union_members(annotation):
        if typing.get_origin(member) is Literal:
            choices += typing.get_args(member)
    if choices:
        guess = nearest(given, [choice for choice in choices if isinstance(choice, str)])
        return f'did you mean "{guess}"?' if guess else None
    try:
        parsed = tomli.loads(f"x = {given}")["x"]
    except (ValueError, RecursionError):
        return None
    if isinstance(parsed, bool | int | float | list):
        return f"write {given} without quotes"
    return None


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (Literal, list, dict, None):
        return (annotation,)
    return typing.get_args(annotation)


def inconsistent(detail: ErrorDetails, table: Branch, owner: Owner) -> Problem:
    """Values that are valid alone but not together; points at the one written last."""
    why = detail["msg"].removeprefix("Value error, ")
    named = [name for name in owner.model.model_fields if re.search(rf"\b{re.escape(name)}\b", why)]
    given = [node for name in named if isinstance(node := table.items.get(name), Leaf)]
    node = max(given, key=lambda leaf: leaf.rank, default=table)
    fix = f"change [{owner.table}]"
    if named:
        fix = f"set {' or '.join(f'{owner.table}.{name}' for name in named)} accordingly"
    return Problem(
        f"[{owner.table}] does not fit together", node.origin.where, why, fix, node.origin.text
    )


def shorten(given: Any) -> str:
    """A value as TOML, not too long."""
    text = value(given)
    if len(text) > 60:
        return f"{text[:57]}..."
    return text
