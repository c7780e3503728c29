"""Checks of every component: what it says of itself."""

from __future__ import annotations

import inspect

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import MODEL_KINDS, Subject
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KINDS

SCIENCE = (*MODEL_KINDS, "loss", "optimizer")


@rule(
    "documentation",
    KINDS,
    why="a recipe names the component; its docstring is all that `plugins describe` can say of it",
    mend=(
        "give the class a docstring of its own: what it computes, with shapes or the paper's"
        " equation"
    ),
)
def documented(subject: Subject) -> None:
    """The class has a docstring that is not its interface's."""
    own = subject.component.__dict__.get("__doc__")
    require(own and own.strip(), "the class has no docstring")


@rule(
    "citation",
    SCIENCE,
    why=(
        "whoever publishes a number must be able to cite what made it; reports and model cards"
        " collect these entries"
    ),
    mend='set citation = "@article{...}" (BibTeX; @misc{...} for work of your own)',
)
def cited(subject: Subject) -> None:
    """BibTeX is given; the identity, which is called "none", has nothing to cite."""
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
    why=(
        "recipes are checked against the constructor's annotations before anything is imported or"
        " built"
    ),
    mend=(
        "make every option a keyword-only parameter (after *) with a type annotation and, if it may"
        " be left out, a default in its bounds"
    ),
)
def options(subject: Subject) -> None:
    """Every option is annotated and keyword-only, and defaults are what the annotations allow."""
    parameters = list(inspect.signature(subject.component).parameters.values())
    given = KINDS[subject.kind].given
    loose = [p.name for p in parameters[given:] if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    require(not loose, f"parameters that a recipe cannot set: {', '.join(loose)}")
    bare = [p.name for p in parameters[given:] if p.annotation is inspect.Parameter.empty]
    require(not bare, f"options without a type: {', '.join(bare)}")
    schema = Registry([]).schema(subject.offer)
    defaults = {
        o.name: field.default
        for o in subject.offer.options
        if not (field := schema.model_fields[o.name]).is_required()
    }
    given_too = {
        name: value for name, value in subject.options.items() if name in schema.model_fields
    }
    required = {
        name for name, field in schema.model_fields.items() if field.is_required()
    } - given_too.keys()
    if not required:
        schema.model_validate(
            {name: value for name, value in defaults.items() if value is not None} | given_too
        )
