"""Choose the attention backend of a recipe for a device and dtype, and say why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lswt_core.errors import Incompatible
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Dims,
    Mixer,
    ScoreTransform,
    Unsupported,
)
from lswt_core.model.components import (
    build_component,
    build_encodings,
    build_memories,
    dims_of,
    optimizer_class,
)
from lswt_core.recipe import Chosen, Recipe
from lswt_core.registry import AUTO, Registry


class AttentionChoice(NamedTuple):
    """The attention backends of a model."""

    automatic: Chosen  # what "auto" stands for; the recipe's own backend if nothing is automatic
    names: tuple[str, ...]  # of all layers' backends
    notes: tuple[str, ...]  # the reasons, for the log


def choose_backends(
    recipe: Recipe, registry: Registry, device: torch.device, dtype: torch.dtype
) -> AttentionChoice:
    """Resolve "auto" and check every backend that the recipe names; raises Incompatible."""
    dims = dims_of(recipe)
    needs = attention_requirements(recipe, registry, device, dtype)
    names: list[str] = []
    backend_notes: list[str] = []
    automatic: list[Chosen] = []
    for chosen in recipe.every("attention"):
        if chosen.name == AUTO.name:
            automatic.append(chosen)
            continue
        note = check_backend(registry, chosen, dims, needs)
        names.append(chosen.name)
        backend_notes += [note] if note else []
    if not automatic:
        notes = ("the recipe asks for it", *dict.fromkeys(backend_notes))
        return AttentionChoice(recipe.every("attention")[0], tuple(names), notes)
    resolved, auto_notes = resolve_auto(automatic[0], registry, dims, needs)
    unique_names = dict.fromkeys([resolved.name, *names])
    return AttentionChoice(
        resolved, tuple(unique_names), (*auto_notes, *dict.fromkeys(backend_notes))
    )


def attention_requirements(
    recipe: Recipe, registry: Registry, device: torch.device, dtype: torch.dtype
) -> list[AttentionRequirements]:
    """Return what every attention backend of a recipe must support."""
    dims = dims_of(recipe)
    has_window = any(memory.window for memory in build_memories(recipe, registry))
    mixers: list[type[Mixer]] = [registry.load(one.offer) for one in recipe.every("mixer")]
    encodings = build_encodings(recipe, registry)
    # mixers may split the model's width into other heads; the model's own first
    heads = dict.fromkeys(mixer.head_dims(dims) for mixer in mixers)
    first, *others = sorted(heads, key=lambda one: one != dims)
    required = AttentionRequirements(
        device=device.type,
        dtype=dtype,
        d_head=first.d_head,
        has_bias=any(one.has_bias for one in encodings) or any(one.has_bias for one in mixers),
        has_mask=recipe.train.document_masking or has_window,
        queries_per_kv=dims.queries_per_kv,
        transform=common_class([mixer.transforms_scores for mixer in mixers]),
        has_selection=any(mixer.selects_keys for mixer in mixers),
    )
    needs = [required, *(required._replace(d_head=one.d_head) for one in others)]
    # finite differences of the gradient are taken in float32
    if optimizer_class(recipe, registry).needs_hessian_vector_products:
        needs += [need._replace(dtype=torch.float32) for need in needs]
    return needs


def common_class(transforms: Sequence[type[ScoreTransform] | None]) -> type[ScoreTransform] | None:
    """Return the class that all transforms of scores are of, None if there are none."""
    classes = {one for one in transforms if one is not None}
    if len(classes) > 1:
        return ScoreTransform
    return next(iter(classes), None)


def resolve_auto(
    auto: Chosen, registry: Registry, dims: Dims, needs: Sequence[AttentionRequirements]
) -> tuple[Chosen, list[str]]:
    """Return the first backend of "auto"'s preference list that meets the requirements, and notes
    on it and on those rejected before it. Raises Incompatible if none does.
    """
    rejected: list[str] = []
    for name in auto.options["prefer"]:
        candidate = Chosen("attention", "attention", name, registry.find("attention", name), {})
        try:
            note = check_backend(registry, candidate, dims, needs)
        except Incompatible as error:
            rejected.append(f"not {name}: {error.__cause__ or error}")
            continue
        return candidate, [note, *rejected] if note else rejected
    raise Incompatible("attention.use = 'auto' found no backend:\n  " + "\n  ".join(rejected))


def check_backend(
    registry: Registry, chosen: Chosen, dims: Dims, needs: Sequence[AttentionRequirements]
) -> str | None:
    """Raise Incompatible if a backend does not meet the requirements; return its own note on how
    it will run (which kernel), if it has one.
    """
    backend: AttentionBackend = build_component(registry, chosen, dims)
    try:
        notes = [backend.require(need) for need in needs]
    except Unsupported as error:
        raise Incompatible(
            f"[{chosen.table}] {chosen.name} cannot be used here: {error}"
        ) from error
    return notes[0]
