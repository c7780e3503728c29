"""Infini-attention: local attention beside a compressive memory that is read through a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn.functional import elu

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, LayerContext, LayerOutput, MixerParts, State
from lswt_core.plugin_api.recurrence import at_least_float32, first_seen, without_autocast
from lswt_core.plugin_api.softmax_attention import (
    QKVProjection,
    SoftmaxAttention,
    cast_for_autocast,
    split_heads,
)


class CompressiveMemory(NamedTuple):
    """The memory of one layer, in float32 or wider."""

    matrix: Tensor  # [B, G, D, D], the paper's M
    norm: Tensor  # [B, G, D], the paper's z

    def read(self, q: Tensor) -> Tensor:
        """What is stored under queries or keys [B, T, G, R, D]: -> [B, T, G, R, D]; 0 where
        nothing is.
        """
        sigma = elu(q) + 1
        weight = torch.einsum("btgrd,bgd->btgr", sigma, self.norm)[..., None]
        retrieved = torch.einsum("btgrd,bgde->btgre", sigma, self.matrix)
        return retrieved / weight.where(weight > 0, 1)

    def written(
        self, k: Tensor, v: Tensor, *, delta: bool, kept: Tensor | None
    ) -> CompressiveMemory:
        """The memory with keys and values [B, T, G, D] added, of which only those count that
        ``kept`` [B or 1, T] says. ``delta``: what the keys retrieve already is not added again.
        """
        if delta:
            v = v - self.read(k[..., None, :])[..., 0, :]
        sigma = elu(k) + 1
        if kept is not None:
            sigma = sigma * kept[..., None, None]
        matrix = self.matrix + torch.einsum("btgd,btge->bgde", sigma, v)
        return CompressiveMemory(matrix, self.norm + sigma.sum(1))

    def where(self, visible: Tensor) -> CompressiveMemory:
        """The memory in the rows where ``visible`` [B or 1], empty in the others."""
        visible = visible.to(self.matrix.dtype)
        return CompressiveMemory(
            self.matrix * visible[:, None, None, None], self.norm * visible[:, None, None]
        )


class Infini(SoftmaxAttention):
    """Infini-attention (Munkhdalai et al. 2024, arXiv 2404.07143): attention within chunks of
    ``chunk`` tokens, and a linear-attention memory of all chunks before.

    With s(x) = ELU(x) + 1, a query reads ``s(q) M / s(q) z`` (0 while nothing is stored); its
    output is ``sigmoid(g) read + (1 - sigmoid(g)) local``, with one g per head, 0 at first. A chunk
    that is complete is written, ``M += s(k)^T v`` and ``z += sum s(k)``; with ``update`` "delta"
    what its keys retrieve already is subtracted from v. Keys and queries of the memory carry no
    position.

    Chunks are the paper's segments. They are counted from the beginning of the row and not from
    that of the training segment, so that a text gives the same in whatever pieces it is read; the
    tokens of a chunk that is not complete are state beside M and z, without gradient. Documents see
    neither M nor tokens of others, but share the row's chunks. Within a segment, later chunks give
    a gradient to what earlier ones wrote.
    """

    name = "infini"
    uses = frozenset({"attention", "qk_norm", "positional"})
    citation = """@article{munkhdalai2024leave,
  title={Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention},
  author={Munkhdalai, Tsendsuren and Faruqui, Manaal and Gopal, Siddharth},
  journal={arXiv preprint arXiv:2404.07143}, year={2024}}"""

    def __init__(
        self,
        dims: Dims,
        parts: MixerParts,
        *,
        chunk: Annotated[int, Ge(1), Le(1_048_576)] = 512,
        update: Literal["linear", "delta"] = "delta",
    ) -> None:
        super().__init__(dims, parts)
        self.chunk, self.delta = chunk, update == "delta"
        self.reach = None
        self.position_dependent_from = chunk + 1
        self.gate = nn.Parameter(torch.empty(dims.n_heads))

    def reset_parameters(self) -> None:
        """Memory and local attention count alike."""
        nn.init.zeros_(self.gate)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]; the state is {"k", "v", "features"} of the incomplete chunk,
        "matrix" and "norm".
        """
        x = cast_for_autocast(x)
        project = QKVProjection(self, x, context)
        (new,) = project(x, context.positions)
        q = self.query_norm(split_heads(project.queries(), self.n_heads))
        memory = self.memory_of(state, new)
        tail = self.tail_of(state, new, context)
        outputs, start = [], 0
        while start < q.shape[1]:
            held = 0 if tail is None else tail.k.shape[1]
            piece = slice(start, start + self.chunk - held)
            own = tokens_of(new, piece)
            keys = [own] if tail is None else [tail, own]
            inner = cut(context, piece)
            memory, read = self.read(memory, q[:, piece], keys, inner)
            local = self.attend(q[:, piece], keys, inner)
            gate = self.gate.sigmoid()[:, None]
            outputs.append((gate * read + (1 - gate) * local).to(local.dtype))
            start = piece.stop
            tail = None
            if held + own.k.shape[1] == self.chunk:
                memory = self.write(memory, keys, inner)
            else:
                tail = joined(keys)
        out = self.output(torch.cat(outputs, dim=1).flatten(2))
        return LayerOutput(out, next_state(memory, tail, new))

    def memory_of(self, state: State, new: KeyValue) -> CompressiveMemory:
        """The memory of a state; empty at the start."""
        dtype = torch.promote_types(new.k.dtype, torch.float32)
        if state:
            return CompressiveMemory(state["matrix"].to(dtype), state["norm"].to(dtype))
        rows, width = new.k.shape[0], self.d_head
        shape = (rows, self.n_kv_heads, width)
        zeros = new.k.new_zeros(shape, dtype=dtype)
        return CompressiveMemory(zeros[..., None].expand(*shape, width), zeros)

    def tail_of(self, state: State, new: KeyValue, context: LayerContext) -> KeyValue | None:
        """The tokens of the incomplete chunk, None if there are none."""
        if not state or not state["k"].shape[1]:
            return None
        size = state["k"].shape[1]
        positions = torch.arange(-size, 0, device=new.k.device) + context.positions[0]
        features = state.get("features")
        if features is not None and new.features is not None:
            features = features.to(new.features.dtype)
        k, v = state["k"].to(new.k.dtype), state["v"].to(new.v.dtype)
        return KeyValue(k, v, positions, features=features)

    def read(
        self, memory: CompressiveMemory, q: Tensor, keys: Sequence[KeyValue], context: LayerContext
    ) -> tuple[CompressiveMemory, Tensor]:
        """What queries [B, T, H, D] of one chunk read of earlier ones, and the memory without what
        the chunk's last query does not see.
        """
        with without_autocast(q):
            grouped = at_least_float32(q).unflatten(2, (self.n_kv_heads, -1))
            retrieved = memory.read(grouped).flatten(2, 3)
            first = first_seen(context)
            if first is None:
                return memory, retrieved
            before = sum(one.k.shape[1] for one in keys[:-1])  # of the chunk, in earlier segments
            sees_memory = first < -before
            retrieved = retrieved * sees_memory[..., None, None]
            return memory.where(sees_memory[:, -1]), retrieved

    def write(
        self, memory: CompressiveMemory, keys: Sequence[KeyValue], context: LayerContext
    ) -> CompressiveMemory:
        """The memory with a complete chunk; of its tokens, those of the last one's document."""
        chunk, first = joined(keys), first_seen(context)
        kept = None
        if first is not None:
            before = sum(one.k.shape[1] for one in keys[:-1])
            place = torch.arange(self.chunk, device=first.device) - before
            kept = place >= first[:, -1:]
        with without_autocast(chunk.k):
            k, v = at_least_float32(chunk.k), at_least_float32(chunk.v)
            return memory.written(k, v, delta=self.delta, kept=kept)


def cut(context: LayerContext, piece: slice) -> LayerContext:
    """The context of some of a segment's tokens."""
    first = context.first_visible
    return context._replace(
        positions=context.positions[piece], first_visible=None if first is None else first[:, piece]
    )


def tokens_of(block: KeyValue, piece: slice) -> KeyValue:
    """Some of a block's tokens."""
    assert block.positions is not None
    features = None if block.features is None else block.features[:, piece]
    return KeyValue(block.k[:, piece], block.v[:, piece], block.positions[piece], features=features)


def joined(blocks: Sequence[KeyValue]) -> KeyValue:
    """Blocks of the same layer as one."""
    if len(blocks) == 1:
        return blocks[0]
    features = None
    if blocks[-1].features is not None:
        features = torch.cat([one.features for one in blocks if one.features is not None], 1)
    positions = torch.cat([one.positions for one in blocks if one.positions is not None])
    k, v = torch.cat([one.k for one in blocks], 1), torch.cat([one.v for one in blocks], 1)
    return KeyValue(k, v, positions, features=features)


def next_state(
    memory: CompressiveMemory, tail: KeyValue | None, new: KeyValue
) -> dict[str, Tensor]:
    """The state of a memory and an incomplete chunk."""
    kept = tokens_of(new, slice(0, 0)) if tail is None else tail
    state = {"matrix": memory.matrix, "norm": memory.norm, "k": kept.k.detach()}
    state["v"] = kept.v.detach()
    if kept.features is not None:
        state["features"] = kept.features.detach()
    return state


@hookimpl
def lswt_components() -> list[type]:
    """Offer Infini-attention."""
    return [Infini]
