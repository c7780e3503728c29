"""Parameters of a model: weight-decay groups, the component that owns each, and their counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lswt_core.interfaces import Component
from lswt_core.model.embedding import TiedEmbedding
from lswt_core.registry.kinds import KIND_OF_INTERFACE

# parameters of the core, by the end of their module's name; all others belong to a component
CORE_OWNERS = {
    "vocabulary.table": "embedding",
    "vocabulary.input": "projections",
    "vocabulary.output": "projections",
}


def build_parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Group trainable parameters into "decayed" and "undecayed".

    Decided by module type and explicit tags, not by substrings of names: embeddings, everything
    with fewer than two dimensions (biases, norms) and what a module lists in ``no_weight_decay``
    do not decay. ``matrices`` names a group's hidden matrices: the weights of linear layers that
    are not the vocabulary's.
    """
    vocabulary = vocabulary_modules(model)
    matrices: set[str] = set()
    decayed: dict[str, nn.Parameter] = {}
    undecayed: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        exempt = getattr(module, "no_weight_decay", ())
        is_hidden_linear = isinstance(module, nn.Linear) and module not in vocabulary
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            name = f"{path}.{key}".lstrip(".")
            if isinstance(module, nn.Embedding) or parameter.ndim < 2 or key in exempt:
                undecayed[name] = parameter
            else:
                decayed[name] = parameter
            if is_hidden_linear and key == "weight":
                matrices.add(name)
    groups = [parameter_group("decayed", decayed, matrices)]
    if undecayed:
        groups.append(parameter_group("undecayed", undecayed, matrices) | {"weight_decay": 0.0})
    return groups


def vocabulary_modules(model: nn.Module) -> set[nn.Module]:
    """The tied embedding and its submodules."""
    vocabularies = [module for module in model.modules() if isinstance(module, TiedEmbedding)]
    return {part for vocabulary in vocabularies for part in vocabulary.modules()}


def parameter_group(
    name: str, parameters: Mapping[str, nn.Parameter], matrices: set[str]
) -> dict[str, Any]:
    """A parameter group for torch's optimizers."""
    return {
        "name": name,
        "params": list(parameters.values()),
        "names": list(parameters),
        "matrices": [parameter for parameter in parameters if parameter in matrices],
    }


def parameters_with_components(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield every parameter with its name and the component that owns it, e.g. ("...",
    "memory.registers", parameter).
    """

    def walk(module: nn.Module, path: str, owner: str) -> Iterator[tuple[str, str, nn.Parameter]]:
        if isinstance(module, Component):
            owner = f"{component_kind(module)}.{module.name}"
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{key}".lstrip("."), owner, parameter
        for key, child in module.named_children():
            child_path = f"{path}.{key}".lstrip(".")
            yield from walk(child, child_path, core_owner(child_path) or owner)

    return walk(model, "", "decoder")


def core_owner(path: str) -> str | None:
    """The name under which a module of the core counts its parameters; None: its parent's."""
    return next((owner for suffix, owner in CORE_OWNERS.items() if path.endswith(suffix)), None)


def component_kind(component: Component) -> str:
    """The kind whose interface a component implements, e.g. "memory"."""
    names = [base.__name__ for base in type(component).__mro__]
    return next(KIND_OF_INTERFACE[name] for name in names if name in KIND_OF_INTERFACE)


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """Count parameters: total, trainable, and both by component."""
    counts: dict[str, int] = {}
    trainable: dict[str, int] = {}
    for _, owner, parameter in parameters_with_components(model):
        counts[owner] = counts.get(owner, 0) + parameter.numel()
        trainable[owner] = trainable.get(owner, 0) + parameter.numel() * parameter.requires_grad
    totals = {"total": sum(counts.values()), "trainable": sum(trainable.values())}
    return totals | {"by_component": counts, "trainable_by_component": trainable}


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def summarise_groups(
    groups: Sequence[Mapping[str, Any]],
) -> list[tuple[str, int, int, float | None]]:
    """Name, number of tensors, number of parameters and weight decay of every group, for the table
    printed at the start of a run.
    """
    return [
        (
            group["name"],
            len(group["params"]),
            sum(parameter.numel() for parameter in group["params"]),
            group.get("weight_decay"),
        )
        for group in groups
    ]
