"""From a resolved recipe to modules: components are loaded, checked against each other, wired on the meta device, and given
memory last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from lswt_core.blueprint import Blueprint, Builder
from lswt_core.blueprint import dimensions as sizes
from lswt_core.errors import Incompatible, PluginError
from lswt_core.head import Vocabulary
from lswt_core.interfaces import (
    AttentionBackend,
    AuxiliaryLoss,
    Component,
    CrossEntropy,
    Dims,
    Horizon,
    Memory,
    Need,
    Optimizer,
    PositionalEncoding,
    Schedule,
    Unsupported,
)
from lswt_core.kinds import KIND_OF_INTERFACE
from lswt_core.loss import Loss
from lswt_core.model import Attention, initialise
from lswt_core.parallel import allow_two_backward_passes, compile_each, compiles, spread_rows
from lswt_core.recipe import Chosen, Recipe
from lswt_core.registry import AUTO, Registry


class Assembled(NamedTuple):
    """A model without memory yet, and what was decided on the way."""

    loss: Loss
    backends: tuple[str, ...]  # of attention; several where layers differ
    notes: tuple[str, ...]  # why it is that one

    @property
    def attention(self) -> str:
        """The backends' names."""
        return ", ".join(self.backends)


class Backends(NamedTuple):
    """The attention backends of a model."""

    automatic: Chosen  # what "auto" stands for; where nothing is automatic, the recipe's own
    names: tuple[str, ...]  # of all
    notes: tuple[str, ...]  # why it is those


def create(registry: Registry, chosen: Chosen, *given: Any) -> Any:
    """One component, from its class and options."""
    try:
        return registry.load(chosen.offer)(*given, **chosen.options)
    except (Unsupported, ValueError) as error:
        raise Incompatible(f"[{chosen.table}] {chosen.name} ({chosen.offer.distribution} {chosen.offer.version}): {error}") from error
    except TypeError as error:
        if registry.culprit(error) is not None:
            raise
        raise PluginError(  # its constructor could not even be called
            f"[{chosen.table}] {chosen.name} ({chosen.offer.distribution} {chosen.offer.version}) cannot be built: {error}"
        ) from error


def assemble(recipe: Recipe, registry: Registry, *, device: torch.device, dtype: torch.dtype) -> Assembled:
    """Build decoder and losses on the meta device; every "does A go with B" question is settled here."""
    with torch.device("meta"):
        backends = suitable_attention(recipe, registry, device, dtype)
        decoder = blueprint(recipe, registry, backends).build()
        decoder.activation_checkpointing = recipe.train.activation_checkpointing == "block"
        scoring = cross_entropy(recipe, registry)
        try:
            scoring.require(device.type)
        except Unsupported as error:
            raise Incompatible(f"[cross_entropy] {scoring.name} cannot be used here: {error}") from error
        return Assembled(Loss(decoder, auxiliary_losses(recipe, registry), scoring), backends.names, backends.notes)


def cross_entropy(recipe: Recipe, registry: Registry) -> CrossEntropy:
    """How the recipe scores states against the vocabulary, wherever that may run."""
    scoring: CrossEntropy = create(registry, recipe.one("cross_entropy"))
    return scoring


def auxiliary_losses(recipe: Recipe, registry: Registry) -> dict[str, tuple[AuxiliaryLoss, float]]:
    """The losses beside cross-entropy, with their weights, on torch's default device."""
    dims = dimensions(recipe)
    return {name: (create(registry, chosen, dims), chosen.weight) for name, chosen in recipe.many("loss").items()}


def assemble_blueprint(recipe: Recipe, registry: Registry, *, device: torch.device, dtype: torch.dtype) -> Blueprint:
    """What the recipe's decoder is built from, with the attention backend that suits the device."""
    return blueprint(recipe, registry, suitable_attention(recipe, registry, device, dtype))


def blueprint(recipe: Recipe, registry: Registry, backends: Backends) -> Blueprint:
    """What the recipe's decoder is built from, with the attention backends that were chosen for it."""
    backend = {"use": backends.automatic.name, **backends.automatic.options}

    def builder(kind: str, table: Mapping[str, Any]) -> Builder:
        options = dict(backend if (kind, table["use"]) == ("attention", AUTO.name) else table)
        name = options.pop("use")
        return partial(create, registry, Chosen(kind, kind, name, registry.find(kind, name), options))

    return Blueprint.from_tables(recipe.resolved(), builder)


def dimensions(recipe: Recipe) -> Dims:
    """The sizes components are built for."""
    return sizes(recipe.resolved()["model"])


def suitable_attention(recipe: Recipe, registry: Registry, device: torch.device, dtype: torch.dtype) -> Backends:
    """The attention backends for a device and precision, and why it is those."""
    dims, needs = dimensions(recipe), attention_needs(recipe, registry, device, dtype)
    named = [chosen for chosen in recipe.every("attention") if chosen.name != AUTO.name]
    how = {chosen.name: require(registry, chosen, dims, needs) for chosen in named}
    automatic = [chosen for chosen in recipe.every("attention") if chosen.name == AUTO.name]
    if not automatic:
        return Backends(named[0], tuple(one.name for one in named), ("the recipe asks for it", *filter(None, how.values())))
    first, notes = choose_attention(automatic[0], registry, dims, needs)
    return Backends(first, tuple(dict.fromkeys([first.name, *how])), (*notes, *filter(None, how.values())))


def attention_needs(recipe: Recipe, registry: Registry, device: torch.device, dtype: torch.dtype) -> list[Need]:
    """What every attention backend of a recipe must be able to do."""
    need = Need(
        device=device.type,
        dtype=dtype,
        d_head=dimensions(recipe).d_head,
        biased=any(encoding.biased for encoding in encodings(recipe, registry)),
        bounded=recipe.train.documents == "reset" or any(memory.window for memory in memories_of(recipe, registry)),
    )
    differenced = optimizer_class(recipe, registry).takes_hessian_vectors  # gradients that are must be computed in float32 besides
    return [need, need._replace(dtype=torch.float32)] if differenced else [need]


def encodings(recipe: Recipe, registry: Registry) -> list[PositionalEncoding]:
    """The positional encodings of the recipe, without memory; raises Incompatible if one cannot be used for single layers."""
    with torch.device("meta"):
        made: list[PositionalEncoding] = [create(registry, chosen, dimensions(recipe)) for chosen in recipe.every("positional")]
    for encoding in made[1:]:
        if type(encoding).embed is not PositionalEncoding.embed:
            raise Incompatible(
                f"positional encoding {encoding.name!r} adds to the model's input, which all layers share: it cannot be used for some of "
                "them; name it in [positional]"
            )
    return made


def memories_of(recipe: Recipe, registry: Registry) -> list[Memory]:
    """The memories of the recipe, of whatever layers, without memory of their own."""
    with torch.device("meta"):
        return [create(registry, chosen, dimensions(recipe)) for chosen in recipe.every("memory")]


def choose_attention(auto: Chosen, registry: Registry, dims: Dims, needs: Sequence[Need]) -> tuple[Chosen, list[str]]:
    """The first backend that "auto" prefers and that can do what is needed, and why it is not an earlier one."""
    notes = []
    for name in auto.options["prefer"]:
        candidate = Chosen("attention", "attention", name, registry.find("attention", name), {})
        try:
            how = require(registry, candidate, dims, needs)
        except Incompatible as error:
            notes.append(f"not {name}: {error.__cause__ or error}")
            continue
        return candidate, [*([how] if how else []), *notes]
    raise Incompatible("attention.use = 'auto' found no backend:\n  " + "\n  ".join(notes))


def require(registry: Registry, chosen: Chosen, dims: Dims, needs: Sequence[Need]) -> str | None:
    """Raise Incompatible if a backend cannot do what is needed; how it will, where there is a choice."""
    backend: AttentionBackend = create(registry, chosen, dims)
    try:
        first, *_ = [backend.require(need) for need in needs]
    except Unsupported as error:
        raise Incompatible(f"[attention] {chosen.name} cannot be used here: {error}") from error
    return first


def materialise(loss: Loss, recipe: Recipe, device: torch.device) -> None:
    """Give the model memory on the device and every parameter its initial value; nothing of it is compiled before its first call."""
    loss.to_empty(device=device)
    initialise(loss, seed=recipe.train.seed, std=recipe.model.init_std)
    if compiles(recipe.train.compile, device):
        compile_each(loss.decoder.blocks)
        if loss.cross_entropy is not None:
            loss.cross_entropy.fuse()


def optimizer_class(recipe: Recipe, registry: Registry) -> type[Optimizer]:
    """The class of the optimizer the recipe names."""
    return registry.load(recipe.one("optimizer").offer)


def build_optimizer(recipe: Recipe, registry: Registry, loss: nn.Module) -> Optimizer:
    """The optimizer over the model's trainable parameters."""
    optimizer: Optimizer = create(registry, recipe.one("optimizer"), parameter_groups(loss))
    spread_rows(optimizer.fraction, recipe.train.rows)  # refuses here what the first refresh would refuse
    if optimizer.shares_forward:
        allow_two_backward_passes()
    return optimizer


def build_schedule(recipe: Recipe, registry: Registry) -> Schedule:
    """The learning rate's course over the run."""
    train = recipe.train
    horizon = Horizon(train.total_steps, train.tokens_per_step, train.tokens if train.steps is None else None)
    return create(registry, recipe.one("schedule"), horizon)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters that decay, and those that do not.

    Decided by module type and explicit tags, not by substrings of names: embeddings and everything with fewer than two
    dimensions (biases, norms) do not decay, nor what a module lists in ``no_weight_decay``. ``matrices`` names a group's hidden
    matrices: the weights of linear layers that are not the vocabulary's.
    """
    vocabulary = {id(part) for module in model.modules() if isinstance(module, Vocabulary) for part in module.modules()}
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
                if isinstance(module, nn.Linear) and key == "weight" and id(module) not in vocabulary:
                    matrices.add(name)
    groups: list[dict[str, Any]] = [{"name": "decayed", "params": list(decayed.values()), "names": list(decayed)}]
    if undecayed:
        groups.append({"name": "undecayed", "params": list(undecayed.values()), "names": list(undecayed), "weight_decay": 0.0})
    for group in groups:
        group["matrices"] = [name for name in group["names"] if name in matrices]
    return groups


def owners(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Every parameter with its name and the component it belongs to, e.g. ("...", "memory.registers", parameter)."""
    core = {"vocabulary.table": "embedding", "vocabulary.input": "projections", "vocabulary.output": "projections"}

    def walk(module: nn.Module, path: str, owner: str) -> Iterator[tuple[str, str, nn.Parameter]]:
        if isinstance(module, Component):
            owner = f"{kind_of(module)}.{module.name}"
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{key}".lstrip("."), owner, parameter
        for key, child in module.named_children():
            below = f"{path}.{key}".lstrip(".")
            named = next((label for end, label in core.items() if below.endswith(end)), None)
            yield from walk(child, below, named or ("attention" if isinstance(child, Attention) else owner))

    return walk(model, "", "decoder")


def kind_of(component: Component) -> str:
    """The kind whose interface a component implements."""
    return next(KIND_OF_INTERFACE[base.__name__] for base in type(component).__mro__ if base.__name__ in KIND_OF_INTERFACE)


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


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int, float | None]]:
    """For the table printed at the start: group, tensors, parameters, weight decay."""
    return [
        (group["name"], len(group["params"]), sum(parameter.numel() for parameter in group["params"]), group.get("weight_decay"))
        for group in groups
    ]
