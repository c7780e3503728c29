"""Which attention backend a recipe gets on a device and in a precision, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lswt_core.errors import Incompatible
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Dims,
    Unsupported,
)
from lswt_core.model.components import create, dimensions, encodings, memories_of, optimizer_class
from lswt_core.recipe import Chosen, Recipe
from lswt_core.registry import AUTO, Registry


class Backends(NamedTuple):
    """The attention backends of a model."""

    automatic: Chosen  # what "auto" stands for; where nothing is automatic, the recipe's own
    names: tuple[str, ...]  # of all
    notes: tuple[str, ...]  # why it is those


def suitable_attention(
    recipe: Recipe, registry: Registry, device: torch.device, dtype: torch.dtype
) -> Backends:
    """The attention backends for a device and precision, and why it is those."""
    dims, needs = dimensions(recipe), attention_needs(recipe, registry, device, dtype)
    named = [chosen for chosen in recipe.every("attention") if chosen.name != AUTO.name]
    how = {chosen.name: require(registry, chosen, dims, needs) for chosen in named}
    automatic = [chosen for chosen in recipe.every("attention") if chosen.name == AUTO.name]
    if not automatic:
        return Backends(
            named[0],
            tuple(one.name for one in named),
            ("the recipe asks for it", *filter(None, how.values())),
        )
    first, notes = choose_attention(automatic[0], registry, dims, needs)
    return Backends(
        first, tuple(dict.fromkeys([first.name, *how])), (*notes, *filter(None, how.values()))
    )


def attention_needs(
    recipe: Recipe, registry: Registry, device: torch.device, dtype: torch.dtype
) -> list[AttentionRequirements]:
    """What every attention backend of a recipe must be able to do."""
    need = AttentionRequirements(
        device=device.type,
        dtype=dtype,
        d_head=dimensions(recipe).d_head,
        has_bias=any(encoding.has_bias for encoding in encodings(recipe, registry)),
        has_mask=recipe.train.document_masking
        or any(memory.window for memory in memories_of(recipe, registry)),
    )
    # gradients that are must be computed in float32 besides
    differenced = optimizer_class(recipe, registry).needs_hessian_vector_products
    return [need, need._replace(dtype=torch.float32)] if differenced else [need]


def choose_attention(
    auto: Chosen, registry: Registry, dims: Dims, needs: Sequence[AttentionRequirements]
) -> tuple[Chosen, list[str]]:
    """The first backend that "auto" prefers and that can do what is needed, and why it is not an
    earlier one.
    """
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


def require(
    registry: Registry, chosen: Chosen, dims: Dims, needs: Sequence[AttentionRequirements]
) -> str | None:
    """Raise Incompatible if a backend cannot do what is needed; how it will, where there is a
    choice.
    """
    backend: AttentionBackend = create(registry, chosen, dims)
    try:
        first, *_ = [backend.require(need) for need in needs]
    except Unsupported as error:
        raise Incompatible(f"[attention] {chosen.name} cannot be used here: {error}") from error
    return first
