"""Checks of every component: docstring, citation, options."""

from __future__ import annotations

import inspect

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import MODEL_KINDS, Subject
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KINDS


@rule(
    "documentation",
    KINDS,
    why="`plugins describe` shows the docstring to those who choose the component in a recipe",
    fix="give the class a docstring: what it computes, with shapes or the paper's equation",
)
def has_docstring(subject: Subject) -> None:
    """The class has a docstring of its own, not its interface's."""
    docstring = subject.component.__dict__.get("__doc__")
    require(docstring and docstring.strip(), "the class has no docstring")


@rule(
    "citation",
    (*MODEL_KINDS, "loss", "optimizer"),
    why="reports and model cards collect the citations of all that a published number depends on",
    fix='set citation = "@article{...}" (BibTeX; @misc{...} for work of your own)',
)
def has_citation(subject: Subject) -> None:
    """The citation is BibTeX. A component called "none" (the identity) needs none."""
    citation = subject.component.citation.strip()
    require(citation or subject.offer.name == "none", "citation is empty")
    require(
        not citation or citation.startswith("@"),
        f"citation is not BibTeX: it begins with {citation[:20]!r}",
    )
    require(citation.count("{") == citation.count("}"), "citation has unbalanced braces")


@rule(
    "options",
    KINDS,
    why="recipes are validated against the constructor's annotations before anything is built",
    fix=(
        "make every option a keyword-only parameter (after *) with a type annotation, and give"
        " optional ones a default that the annotation allows"
    ),
)
def options_are_valid(subject: Subject) -> None:
    """Every option is keyword-only and annotated, and its default satisfies the annotation."""
    parameters = list(inspect.signature(subject.component).parameters.values())
    options = parameters[KINDS[subject.kind].given :]
    names = [p.name for p in options if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    require(not names, f"parameters that are not keyword-only: {', '.join(names)}")
    names = [p.name for p in options if p.annotation is inspect.Parameter.empty]
    require(not names, f"options without a type annotation: {', '.join(names)}")
    schema = Registry([]).schema(subject.offer)
    values = {}
    for option in subject.offer.options:
        field = schema.model_fields[option.name]
        if option.name in subject.options:
            values[option.name] = subject.options[option.name]
        elif field.is_required():
            return  # the subject cannot be built without it
        elif field.default is not None:
            values[option.name] = field.default
    schema.model_validate(values)
