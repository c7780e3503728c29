"""Check how the layers of a model fit together: names that no submodule can have, parts that a
mixer has no use for, entries that a layer reads and no layer below wrote, or wrote of new tokens
only, residual streams of different shape, states that a checkpoint could not rebuild.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.errors import Incompatible, Problem, RecipeError
from lswt_core.interfaces import Block, KeyValue, Layer, Mixer
from lswt_core.model.decoder import EMBEDDINGS, IDS, Decoder
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention
from lswt_core.recipe import Chosen, Recipe
from lswt_core.recipe.layer_selectors import spell
from lswt_core.recipe.provenance import Origin
from lswt_core.registry import AUTO, Registry

PARTS = ("memory", "attention", "qk_norm", "positional")
NO_PART = {("qk_norm", "none"), ("positional", "none"), ("attention", AUTO.name)}


def check_names(recipe: Recipe) -> None:
    """Raise RecipeError if a loss or a memory has a name that no submodule can have."""
    container = nn.ModuleDict()
    for kind in ("loss", "memory"):
        for chosen in recipe.every(kind):
            name = chosen.table.removeprefix(f"{kind}.")
            if name and "." not in name and not hasattr(container, name):
                continue
            origin = origin_of_use(recipe, f'{kind}."{name}".use')
            what = f'a {kind} cannot be called "{name}"'
            why = "it is a submodule of that name: without dots, and no attribute of nn.ModuleDict"
            fix = f'choose another name, e.g. {kind}.my_{kind}.use = "{chosen.name}"'
            raise RecipeError([Problem(what, origin.where, why, fix, origin.text)])


def origin_of_use(recipe: Recipe, key: str) -> Origin:
    """Where a component was chosen; of one that single layers have, the recipe."""
    try:
        return recipe.explain(key)[-1][1]
    except RecipeError:
        return Origin(recipe.source, "")


def check_parts(recipe: Recipe, registry: Registry) -> None:
    """Raise Incompatible if a recipe names a part of a mixer for layers whose mixers have no use
    for it. What all layers share may be of use to some of them only; memories are refused layer
    by layer.
    """
    unused: dict[tuple[str, str], list[int]] = {}  # by mixer and table
    used: set[str] = set()
    for layer in range(recipe.model.n_layers):
        components = recipe.at_layer(layer)
        mixer = components["mixer"]["mixer"]
        mixer_class: type[Mixer] = registry.load(mixer.offer)
        for kind, chosen in named_parts(components):
            if kind in mixer_class.uses:
                used.add(chosen.table)
            else:
                unused.setdefault((mixer.name, chosen.table), []).append(layer)
    refused = [
        UnusedPart(mixer_name, table, () if len(layers) == recipe.model.n_layers else layers)
        for (mixer_name, table), layers in unused.items()
        if table.startswith("memory.") or table not in used
    ]
    if refused:
        raise Incompatible("\n  and ".join(map(str, refused)) + format_remedies(refused))


def named_parts(components: object) -> Iterator[tuple[str, Chosen]]:
    """Yield the parts that are named for a layer, with their kinds."""
    for kind in PARTS:
        for chosen in components[kind].values():  # type: ignore[index]
            if (kind, chosen.name) not in NO_PART:
                yield kind, chosen


class UnusedPart(NamedTuple):
    """A part that a recipe names for a mixer that has no use for it."""

    mixer: str
    table: str
    layers: Sequence[int]  # (): all

    def remedy(self) -> tuple[str, str]:
        """The key to set, and its value."""
        if self.table.startswith("memory."):
            return f"{self.prefix}{self.table}", "false"
        kind = self.table.partition(".")[0]
        return f"{self.prefix}{kind}.use", dict(NO_PART)[kind]

    @property
    def prefix(self) -> str:
        """What keys of these layers begin with."""
        return f'layers."{spell(self.layers)}".' if self.layers else ""

    def __str__(self) -> str:
        where = f" in layers {spell(self.layers)}" if self.layers else ""
        key, value = self.remedy()
        setting = f"{key} = {value if value == 'false' else repr(value)}".replace("'", '"')
        return f"mixer {self.mixer!r} has no use for [{self.table}]{where}: set {setting}"


def format_remedies(refused: Sequence[UnusedPart]) -> str:
    """The remedies of some parts together, as overrides and as a swap to the mixer."""
    words = ["=".join(part.remedy()) for part in refused]
    mixers = dict.fromkeys(f"{part.prefix}mixer={part.mixer}" for part in refused)
    return (
        f"\n  all as overrides: {shlex.join(words)}"
        f"\n  all as one swap: --swap {shlex.quote(','.join([*mixers, *words]))}"
    )


def check_carry(decoder: Decoder) -> None:
    """Raise Incompatible if a layer reads an entry that neither the decoder nor a layer below, or
    an earlier part of its own, writes.
    """
    written = {IDS, EMBEDDINGS}
    for number, block in enumerate(decoder.blocks):
        for layer in block.modules():
            if not isinstance(layer, Layer):
                continue
            missing = sorted(layer.reads - written - writes_in(block, before=layer))
            if missing:
                raise Incompatible(
                    f"{layer.name!r} in layer {number} reads {missing[0]!r}, which no layer below"
                    f" writes; there are {', '.join(map(repr, sorted(written)))}"
                )
        written |= writes_in(block)


def writes_in(block: object, before: Layer | None = None) -> set[str]:
    """What the parts of a block write, up to a part."""
    written: set[str] = set()
    for layer in block.modules():  # type: ignore[attr-defined]
        if layer is before:
            break
        if isinstance(layer, Layer):
            written |= layer.writes
    return written


def check_projections(decoder: Decoder, d_model: int) -> None:
    """Raise Incompatible if a mixer makes keys and values of what it reads of this forward pass's
    tokens, and a memory has them made again of earlier tokens.
    """
    for number, block in enumerate(decoder.blocks):
        for layer in block.modules():
            if not isinstance(layer, SoftmaxAttention) or not layer.reads:
                continue
            if type(layer).make_key_value is SoftmaxAttention.make_key_value:
                continue
            for name, memory in layer.memory.items():
                if projects_again(memory, layer, d_model):
                    read = " and ".join(map(repr, sorted(layer.reads)))
                    raise Incompatible(
                        f"mixer {layer.name!r} in layer {number} reads {read} where it makes keys"
                        f" and values, and memory.{name} ({memory.name}) projects earlier inputs"
                        f" again, of whose tokens {read} is not kept: use a memory that keeps keys"
                        " and values, e.g. xl-cache or window"
                    )


def projects_again(memory: nn.Module, layer: SoftmaxAttention, d_model: int) -> bool:
    """Whether a memory on the meta device projects more than the new tokens in a second segment."""
    sizes: list[int] = []

    def project(x: Tensor, positions: Tensor) -> list[KeyValue]:
        sizes.append(x.shape[1])
        k = x.new_empty(*x.shape[:2], layer.n_kv_heads, layer.d_head)
        return [KeyValue(k, k, positions)]

    x, positions = torch.empty(1, 2, d_model, device="meta"), torch.arange(2, device="meta")
    try:
        _, state = memory(x, positions, None, project)
        memory(x, positions, state, project)
    except Exception:  # its error will show when the memory itself is called
        return False
    return max(sizes, default=0) > x.shape[1]


def check_streams(decoder: Decoder, d_model: int) -> None:
    """Raise Incompatible if blocks of a model have residual streams of different shape."""
    first = decoder.first_block
    for number, block in enumerate(decoder.blocks):
        assert isinstance(block, Block)
        opens_alike = all(
            getattr(type(block), method) is getattr(type(first), method)
            for method in ("open_stream", "close_stream")
        )
        if not opens_alike or stream_width(block, d_model) != stream_width(first, d_model):
            raise Incompatible(
                f"block {block.name!r} of layer {number} has another residual stream than"
                f" {first.name!r} of layer 0: use the same block for all layers, with the same"
                " options of the stream"
            )


def stream_width(block: Block, d_model: int) -> int:
    """How many numbers of a token the residual stream of a block on the meta device has."""
    return block.open_stream(torch.empty(1, 1, d_model, device="meta")).numel()


def check_replay(decoder: Decoder, recipe: Recipe) -> None:
    """Raise Incompatible if checkpoints are to rebuild states that depend on all of the past."""
    if recipe.checkpoint.memory != "replay" or not decoder.is_recurrent:
        return
    name = next(layer.name for layer in decoder.layers() if layer.reach is None)
    raise Incompatible(
        f'checkpoint.memory = "replay" rebuilds states from the last tokens, but the state of'
        f' {name!r} depends on all of the past: set checkpoint.memory = "exact"'
    )
