"""Parameters of a model: weight-decay groups, the component that owns each, and their counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lswt_core.interfaces import (
    Component,
)
from lswt_core.model.attention import Attention
from lswt_core.model.embedding import TiedEmbedding
from lswt_core.registry.kinds import KIND_OF_INTERFACE


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters that decay, and those that do not.

    Decided by module type and explicit tags, not by substrings of names: embeddings and everything
    with fewer than two dimensions (biases, norms) do not decay, nor what a module lists in
    ``no_weight_decay``. ``matrices`` names a group's hidden matrices: the weights of linear layers
    that are not the vocabulary's.
    """
    vocabulary = {
        id(part)
        for module in model.modules()
        if isinstance(module, TiedEmbedding)
        for part in module.modules()
    }
    matrices: set[str] = set()
    decayed: dict[str, nn.Parameter] = {}
    undecayed: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        exempt = getattr(module, "no_weight_decay", ())
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                skipped = isinstance(module, nn.Embedding) or parameter.ndim < 2 or key in exempt
                name = f"{path}.{key}".lstrip(".")
                (undecayed if skipped else decayed)[name] = parameter
                if (
                    isinstance(module, nn.Linear)
                    and key == "weight"
                    and id(module) not in vocabulary
                ):
                    matrices.add(name)
    groups: list[dict[str, Any]] = [
        {"name": "decayed", "params": list(decayed.values()), "names": list(decayed)}
    ]
    if undecayed:
        groups.append(
            {
                "name": "undecayed",
                "params": list(undecayed.values()),
                "names": list(undecayed),
                "weight_decay": 0.0,
            }
        )
    for group in groups:
        group["matrices"] = [name for name in group["names"] if name in matrices]
    return groups


def owners(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Every parameter with its name and the component it belongs to, e.g. ("...",
    "memory.registers", parameter).
    """
    core = {
        "vocabulary.table": "embedding",
        "vocabulary.input": "projections",
        "vocabulary.output": "projections",
    }

    def walk(module: nn.Module, path: str, owner: str) -> Iterator[tuple[str, str, nn.Parameter]]:
        if isinstance(module, Component):
            owner = f"{kind_of(module)}.{module.name}"
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{key}".lstrip("."), owner, parameter
        for key, child in module.named_children():
            below = f"{path}.{key}".lstrip(".")
            named = next((label for end, label in core.items() if below.endswith(end)), None)
            yield from walk(
                child, below, named or ("attention" if isinstance(child, Attention) else owner)
            )

    return walk(model, "", "decoder")


def kind_of(component: Component) -> str:
    """The kind whose interface a component implements."""
    return next(
        KIND_OF_INTERFACE[base.__name__]
        for base in type(component).__mro__
        if base.__name__ in KIND_OF_INTERFACE
    )


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """Exact numbers of parameters: total, trainable, and both by component."""
    found: dict[str, int] = {}
    trainable: dict[str, int] = {}
    for _, owner, parameter in owners(model):
        found[owner] = found.get(owner, 0) + parameter.numel()
        trainable[owner] = trainable.get(owner, 0) + parameter.numel() * parameter.requires_grad
    totals = {"total": sum(found.values()), "trainable": sum(trainable.values())}
    return totals | {"by_component": found, "trainable_by_component": trainable}


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that learn."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def describe_groups(
    groups: Sequence[Mapping[str, Any]],
) -> list[tuple[str, int, int, float | None]]:
    """For the table printed at the start: group, tensors, parameters, weight decay."""
    return [
        (
            group["name"],
            len(group["params"]),
            sum(parameter.numel() for parameter in group["params"]),
            group.get("weight_decay"),
        )
        for group in groups
    ]
