"""Options as a pydantic model, and annotations in words."""

from __future__ import annotations

import types
import typing
import warnings
from dataclasses import asdict
from typing import Annotated, Any, Literal

import annotated_types
from pydantic import BaseModel, ConfigDict, create_model

from lswt_core.errors import PluginError
from lswt_core.registry.component_option import ComponentOption
from lswt_core.registry.offer import REQUIRED, Offer

STRICT = ConfigDict(
    extra="forbid",
    strict=True,
    frozen=True,
    allow_inf_nan=False,
    validate_default=True,
    protected_namespaces=(),
)
NOUNS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    list: "a list",
    dict: "a table",
}


def build(offer: Offer) -> type[BaseModel]:
    """Build a strict model with one field per option. Raises PluginError for annotations that
    pydantic does not know.
    """
    fields: dict[str, Any] = {
        option.name: (
            as_table(option.annotation),
            ... if option.default is REQUIRED else option.default,
        )
        for option in offer.options
    }
    try:
        with warnings.catch_warnings():
            # an option may be named like a method of BaseModel, e.g. "copy"
            warnings.simplefilter("ignore", UserWarning)
            return create_model(offer.name, __config__=STRICT, **fields)
    except Exception as error:  # pydantic raises many types for annotations it does not know
        problem = (
            f"the options of {offer.kind} {offer.name!r} ({offer.distribution} {offer.version},"
            f" {offer.source}) cannot be checked"
        )
        raise PluginError(
            f"{problem}: {str(error).partition('. ')[0]}; use bool, int, float, str, list, Literal,"
            " bounds of annotated_types and interfaces of components"
        ) from error


def as_table(annotation: Any) -> Any:
    """The type of an option's value in a recipe: tables for components, whose own options are
    checked elsewhere.
    """
    if not isinstance(annotation, ComponentOption):
        return annotation
    table = dict[str, Any]
    return Annotated[table | None if annotation.optional else table, annotation]


def words(annotation: Any) -> str:
    """An annotation in words, e.g. "a whole number, at least 1"."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    for part in (annotation, *arguments):
        if isinstance(part, ComponentOption):
            return part.words()
    if origin is typing.Annotated:
        return ", ".join([words(arguments[0]), *filter(None, map(bound, arguments[1:]))])
    if origin is Literal:
        names = [
            f'"{value}"' if isinstance(value, str) else str(value).lower() for value in arguments
        ]
        return ("one of " if len(names) > 1 else "") + ", ".join(names)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"a list, each item {words(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a table"
    return NOUNS.get(origin or annotation, str(annotation))


def plain(annotation: Any) -> Any:
    """The type without its bounds."""
    if typing.get_origin(annotation) is typing.Annotated:
        return typing.get_args(annotation)[0]
    return annotation


def bounds(annotation: Any) -> dict[str, Any]:
    """The bounds of an annotation by the names annotated_types gives them, e.g. {"ge": 1}."""
    if typing.get_origin(annotation) is not typing.Annotated:
        return {}
    limits: dict[str, Any] = {}
    for limit in typing.get_args(annotation)[1:]:
        grouped = isinstance(limit, annotated_types.GroupedMetadata)
        singles: list[Any] = list(limit) if grouped else [limit]
        for single in singles:
            if bound(single):
                limits |= asdict(single)
    return limits


def bound(limit: Any) -> str:
    """A bound of annotated_types in words."""
    match limit:
        case annotated_types.Ge(ge=least):
            return f"at least {least}"
        case annotated_types.Gt(gt=below):
            return f"greater than {below}"
        case annotated_types.Le(le=most):
            return f"at most {most}"
        case annotated_types.Lt(lt=above):
            return f"less than {above}"
        case annotated_types.MultipleOf(multiple_of=factor):
            return f"a multiple of {factor}"
        case annotated_types.MinLen(min_length=least):
            return f"at least {least} long"
        case annotated_types.MaxLen(max_length=most):
            return f"at most {most} long"
        case annotated_types.GroupedMetadata():
            return ", ".join(filter(None, map(bound, limit)))
    return ""
