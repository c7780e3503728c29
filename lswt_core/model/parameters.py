"""Parameters of a model: weight-decay groups, the component that owns each, and their counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from lswt_core.interfaces import Component, Head, Optimizer, Scaling
from lswt_core.recipe.schema import Group, Groups
from lswt_core.registry.kinds import KIND_OF_INTERFACE

DEFAULT_GROUPS = Groups()
# parameters that are listed apart from their component, by the end of their module's name
OWNERS_APART = {
    "vocabulary.table": "embedding",
    "vocabulary.input": "projections",
    "vocabulary.output": "projections",
}


class GroupKey(NamedTuple):
    """What the parameters of one group share."""

    decayed: bool
    lr_factor: float
    weight_decay: float | None  # None: the optimizer's
    weight_decay_factor: float

    @property
    def name(self) -> str:
        """The group's name: "decayed", "undecayed, lr x 0.1"."""
        words = ["decayed" if self.decayed else "undecayed"]
        if self.lr_factor != 1:
            words.append(f"lr x {self.lr_factor:.4g}")
        if self.decayed and self.weight_decay is not None:
            words.append(f"weight decay {self.weight_decay:.4g}")
        if self.weight_decay_factor != 1:
            words.append(f"weight decay x {self.weight_decay_factor:.4g}")
        return ", ".join(words)


class Parameter(NamedTuple):
    """A trainable parameter of the model and what decides its group."""

    name: str
    tensor: nn.Parameter
    role: str  # a key of [groups]
    is_exempt: bool  # from weight decay, unless the recipe says otherwise
    # the weight of a linear layer, or in ``matrix_parameters``, and not the vocabulary's
    is_hidden_matrix: bool


def build_parameter_groups(
    model: nn.Module,
    groups: Groups = DEFAULT_GROUPS,
    scalings: Mapping[str, Scaling] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay and learning rate: at least "decayed", and
    "undecayed".

    Decided by module type and explicit tags, not by substrings of names: embeddings, everything
    with fewer than two dimensions (biases, norms) and what a module lists in ``no_weight_decay``
    do not decay, unless ``groups`` says otherwise for their role. ``scalings`` are those of a
    parametrisation, by name. ``matrices`` names a group's hidden matrices: the weights of linear
    layers, and what modules list in ``matrix_parameters`` (stacks of matrices, [..., out, in]),
    that are not the vocabulary's. See ``apply_group_factors``.
    """
    members: dict[GroupKey, list[Parameter]] = {GroupKey(True, 1.0, None, 1.0): []}
    for parameter in trainable_with_roles(model):
        group: Group = getattr(groups, parameter.role)
        scaling = scalings.get(parameter.name, Scaling())
        decays = not parameter.is_exempt
        if group.weight_decay is not None:
            decays = group.weight_decay > 0
        key = GroupKey(
            decays,
            group.lr_factor * scaling.lr,
            group.weight_decay if decays else None,
            scaling.weight_decay if decays else 1.0,
        )
        members.setdefault(key, []).append(parameter)
    return [parameter_group(key, parameters) for key, parameters in sorted_groups(members)]


def sorted_groups(
    members: Mapping[GroupKey, list[Parameter]],
) -> list[tuple[GroupKey, list[Parameter]]]:
    """Groups with weight decay first, those of the recipe's own learning rate before others."""
    return sorted(members.items(), key=lambda item: (not item[0].decayed, item[0].lr_factor != 1))


def trainable_with_roles(model: nn.Module) -> Iterator[Parameter]:
    """Yield every trainable parameter with what decides its group."""
    vocabulary = vocabulary_modules(model)
    for path, module in model.named_modules():
        exempt = getattr(module, "no_weight_decay", ())
        matrices = ("weight",) if isinstance(module, nn.Linear) else ()
        matrices += tuple(getattr(module, "matrix_parameters", ()))
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, nn.Embedding):
                role = "embedding"
            elif parameter.ndim < 2:
                role = "vectors"
            else:
                role = "projections" if module in vocabulary else "matrices"
            yield Parameter(
                f"{path}.{key}".lstrip("."),
                parameter,
                role,
                role in ("embedding", "vectors") or key in exempt,
                key in matrices and parameter.ndim >= 2 and module not in vocabulary,
            )


def vocabulary_modules(model: nn.Module) -> set[nn.Module]:
    """The heads and their submodules."""
    heads = [module for module in model.modules() if isinstance(module, Head)]
    return {part for head in heads for part in head.modules()}


def parameter_group(key: GroupKey, parameters: Sequence[Parameter]) -> dict[str, Any]:
    """A parameter group for torch's optimizers."""
    group: dict[str, Any] = {
        "name": key.name,
        "params": [one.tensor for one in parameters],
        "names": [one.name for one in parameters],
        "matrices": [one.name for one in parameters if one.is_hidden_matrix],
    }
    if not key.decayed:
        group["weight_decay"] = 0.0
    elif key.weight_decay is not None:
        group["weight_decay"] = key.weight_decay
    if key.lr_factor != 1:
        group["lr_factor"] = key.lr_factor
    if key.weight_decay_factor != 1:
        group["weight_decay_factor"] = key.weight_decay_factor
    return group


def apply_group_factors(optimizer: Optimizer) -> None:
    """Multiply the learning rate and weight decay of every group by its factors, after the
    optimizer has filled in its options.
    """
    for group in optimizer.param_groups:
        group["lr"] *= group.get("lr_factor", 1.0)
        if "weight_decay_factor" in group and "weight_decay" in group:
            group["weight_decay"] *= group["weight_decay_factor"]


def parameters_with_components(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield every parameter with its name and the component that owns it, e.g. ("...",
    "memory.registers", parameter).
    """
    for name, owners, parameter in parameters_with_owners(model):
        yield name, owners[-1], parameter


def parameters_with_owners(
    model: nn.Module,
) -> Iterator[tuple[str, tuple[str, ...], nn.Parameter]]:
    """Yield every parameter with its name and all components that it lies in, the outermost first,
    e.g. ("decoder", "block.pre-norm", "ffn.moe").
    """

    def walk(
        module: nn.Module, path: str, owners: tuple[str, ...]
    ) -> Iterator[tuple[str, tuple[str, ...], nn.Parameter]]:
        if isinstance(module, Component):
            owners += (f"{component_kind(module)}.{module.name}",)
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{key}".lstrip("."), owners, parameter
        for key, child in module.named_children():
            child_path = f"{path}.{key}".lstrip(".")
            apart = owner_apart(child_path)
            yield from walk(child, child_path, owners if apart is None else (*owners, apart))

    return walk(model, "", ("decoder",))


def owner_apart(path: str) -> str | None:
    """The name under which a module counts its parameters; None: its parent's."""
    return next((owner for suffix, owner in OWNERS_APART.items() if path.endswith(suffix)), None)


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
