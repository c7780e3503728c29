"""Memories that reach far with few keys or none: every k-th token (sparse-xl), and a compressive
memory beside local attention (infini).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hf_parts
import pytest
import torch
from helpers import DIMS, attention_layer, context_of, distance, stream, tiny, tokens
from lswt_eager import Eager
from lswt_infini import Infini
from lswt_nope import NoPosition
from lswt_qk_norm import NoNorm
from lswt_rope import Rope
from lswt_sparse_xl import SparseXl
from lswt_xl_cache import XlCache
from runs import assert_resumes_to_the_bit, write_recipe
from torch import Tensor
from torch.nn.functional import elu

from lswt_core.interfaces import KVBlock, MixerParts
from lswt_core.model.initialise import initialise
from lswt_core.plugin_api.pytree import tree_leaves
from lswt_core.recipe import Recipe

SPARSE = partial(SparseXl, length=4, slots=2, stride=3)
SMALL = partial(Infini, chunk=4)


def inputs(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, length, DIMS.d_model, dtype=torch.float64, generator=generator)


def read(layer: Any, x: Tensor, size: int, positional: Any = None) -> tuple[Tensor, Any]:
    """Outputs for x [B, T, M] read in segments of ``size``, and the last state."""
    state, outputs = None, []
    for piece in x.split(size, dim=1):
        out = layer(piece, state, context_of(piece.shape[1], positional or Rope(DIMS)))
        state = out.state
        outputs.append(out.x)
    return torch.cat(outputs, 1), state


# ---------- sparse-xl


@pytest.mark.parametrize("size", [1, 2, 5])
def test_sparse_xl_sees_the_last_tokens_and_every_third_before(size: int) -> None:
    """One softmax over all tokens, with a mask that says what each segment sees."""
    layer, x = attention_layer({"xl": SPARSE}), inputs(21)
    visible = torch.zeros(21, 21, dtype=torch.bool)
    for start in range(0, 21, size):
        gone = max(0, start - 4) // 3 * 3  # tokens that left the dense part
        sparse = [*range(2, gone, 3)]
        cached = [*sparse[-2:], *range(gone, start)]
        for query in range(start, min(start + size, 21)):
            visible[query, [*cached, *range(start, query + 1)]] = True
    rope, place = Rope(DIMS), torch.arange(21)
    q, k, v = (f(x).unflatten(-1, (2, -1)) for f in (layer.query, layer.key, layer.value))
    q, k = rope.rotate(q, place), rope.rotate(k, place)
    scores = torch.einsum("bthd,bnhd->bhtn", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = layer.output(torch.einsum("bhtn,bnhd->bthd", weights, v).flatten(2))
    outputs, state = read(layer, x, size)
    assert distance(outputs, expected) < 1e-12
    assert state["xl"]["sparse"]["k"].shape[1] == 2 and not state["xl"]["dense"]["v"].requires_grad


def test_a_stride_of_one_is_an_xl_cache() -> None:
    sparse = attention_layer({"xl": partial(SparseXl, length=3, slots=4, stride=1)})
    dense = attention_layer({"xl": partial(XlCache, length=7)})
    for size in (1, 5):
        assert distance(read(sparse, inputs(21), size)[0], read(dense, inputs(21), size)[0]) < 1e-12


def test_sparse_xl_reaches_as_far_as_it_says() -> None:
    decoder = tiny(dims=DIMS._replace(n_layers=1), memories={"xl": SPARSE})
    assert decoder.memory_length == 4 + 2 + 3 * 2
    states = []
    for changed in (0, 1):
        ids, state = tokens(1, 32), None
        ids[:, :20] = (ids[:, :20] + changed) % 29
        for piece in ids.split(2, dim=1):
            _, state = decoder(piece, state)
        states.append(tree_leaves(state))
    assert all(map(torch.equal, *states))


# ---------- infini


class RepeatedHeads(Eager):
    """Grouped heads by repeating them."""

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        return super().forward(
            [
                one._replace(
                    k=one.k.repeat_interleave(one.q.shape[2] // one.k.shape[2], 2),
                    v=one.v.repeat_interleave(one.q.shape[2] // one.v.shape[2], 2),
                )
                for one in blocks
            ]
        )


def infini(**options: Any) -> Any:
    layer = Infini(DIMS, MixerParts({}, Eager, NoNorm, NoPosition), **options).double()
    initialise(layer, seed=0, std=0.4)
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([0.7, -0.4]))
    return layer


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_infini_is_the_papers_memory(update: str) -> None:
    """Equations 3 to 8, chunk by chunk."""
    layer, x = infini(chunk=4, update=update), inputs(14)
    memory, norm, by_paper = torch.zeros(2, 2, 8, 8).double(), torch.zeros(2, 2, 8, 1).double(), []
    for chunk in x.split(4, dim=1):
        q, k, v = (
            f(chunk).unflatten(-1, (2, -1)).transpose(1, 2)
            for f in (layer.query, layer.key, layer.value)
        )
        mask = torch.ones(chunk.shape[1], chunk.shape[1]).tril().log()
        local = (q @ k.mT / 8**0.5 + mask).softmax(-1) @ v
        retrieved = ((elu(q) + 1) @ memory / ((elu(q) + 1) @ norm)).nan_to_num(0)
        gate = layer.gate.sigmoid()[:, None, None]
        out = gate * retrieved + (1 - gate) * local
        by_paper.append(layer.output(out.transpose(1, 2).flatten(2)))
        stored = ((elu(k) + 1) @ memory / ((elu(k) + 1) @ norm)).nan_to_num(0)
        memory = memory + (elu(k) + 1).mT @ (v - stored if update == "delta" else v)
        norm = norm + (elu(k) + 1).sum(2)[..., None]
    for size in (1, 3, 5, 14):
        outputs, _ = read(layer, x, size, NoPosition(DIMS))
        assert distance(outputs, torch.cat(by_paper, 1)) < 1e-12


def test_infini_gives_the_same_in_any_pieces_with_positions_and_grouped_heads() -> None:
    dims = DIMS._replace(n_heads=4, queries_per_kv=2)
    decoder, ids = tiny(dims=dims, mixer=SMALL, attention=RepeatedHeads), tokens(2, 17)
    whole, state = decoder(ids)
    assert state[0]["matrix"].shape == (2, 2, 4, 4) and decoder.is_recurrent
    for size in (1, 3, 5):
        assert distance(stream(decoder, ids, size), whole) < 1e-11


def test_a_chunk_longer_than_the_text_is_plain_attention() -> None:
    plain, x = attention_layer({}), inputs(9)
    layer = Infini(DIMS, MixerParts({}, Eager, NoNorm, Rope), chunk=100).double()
    layer.load_state_dict({**plain.state_dict(), "gate": torch.full((2,), -torch.inf)})
    assert distance(read(layer, x, 9)[0], read(plain, x, 9)[0]) < 1e-14


def test_documents_of_whole_chunks_are_what_they_are_alone_and_none_sees_another() -> None:
    decoder, ids = tiny(mixer=SMALL), tokens(1, 16)
    aligned = torch.tensor([[0] * 8 + [8] * 8])
    for size in (1, 3, 16):
        hidden = stream(decoder, ids, size, aligned)
        assert distance(hidden[:, 8:], decoder(ids[:, 8:])[0]) < 1e-11
        shifted = torch.tensor([[0] * 6 + [6] * 10])
        before = stream(decoder, ids, size, shifted)
        changed = ids.clone()
        changed[:, :6] = (ids[:, :6] + 1) % 29
        assert distance(stream(decoder, changed, size, shifted)[:, 6:], before[:, 6:]) == 0


def test_later_chunks_train_what_earlier_ones_wrote() -> None:
    layer, x = infini(chunk=4), inputs(8).requires_grad_()
    outputs = layer(x, None, context_of(8, NoPosition(DIMS))).x
    (gradient,) = torch.autograd.grad(outputs[:, 4:].sum(), x)
    assert gradient[:, :4].abs().min() > 0
    small = inputs(5)[:1].requires_grad_()
    layer = infini(chunk=2)

    def function(x: Tensor) -> Tensor:
        out: Tensor = layer(x, None, context_of(5, NoPosition(DIMS))).x
        return out

    assert torch.autograd.gradcheck(function, (small,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (small,), fast_mode=True)


# ---------- both, in runs and exports


@pytest.mark.slow
def test_resumed_runs_end_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    text = recipe.read_text().replace("length = 24", "length = 20\nslots = 3\nstride = 4")
    layer = '\n[layers.0.mixer]\nuse = "infini"\nchunk = 6\n[layers.0]\nmemory.registers = false\n'
    recipe.write_text(text.replace("xl-cache", "sparse-xl") + layer + "memory.xl = false\n")
    few = ("train.steps=4", "checkpoint.every=2", "evaluate.every=4", "train.document_masking=true")
    assert_resumes_to_the_bit(monkeypatch, recipe, *few)


@pytest.mark.parametrize("mix", ["recurrent", "only-recurrent", "infini", "sparse"])
def test_padding_before_a_single_token_is_forgotten(mix: str) -> None:
    model, ids = hf_parts.model_of(mix), hf_parts.ids(2, 6)
    mask = torch.tensor([[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
    generated = hf_parts.generate(model, ids, attention_mask=mask)
    alone = hf_parts.generate(model, ids[:1, 5:])
    assert torch.equal(generated[0, 6:], alone[0, 1:])


def test_rows_that_would_share_chunks_are_refused() -> None:
    recipe = hf_parts.NANO | hf_parts.MIXES["infini"] | {"mixer": {"use": "infini", "chunk": 8}}
    config = hf_parts.LswtConfig(
        recipe=hf_parts.model_tables(Recipe.from_dict(recipe)),
        components=hf_parts.describe_components(Recipe.from_dict(recipe)),
        pad_token_id=1,
    )
    model, ids = hf_parts.LswtForCausalLM(config), hf_parts.ids(2, 8)
    initialise(model.model.decoder, seed=0, std=0.1)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, 0] = 0
    out = model(ids, attention_mask=mask, use_cache=True)
    with pytest.raises(ValueError, match="where the row begins"):
        model(ids[:, :1], past_key_values=hf_parts.cache_of(out))
    with pytest.raises(ValueError, match="where the row begins"):
        model(hf_parts.ids(2, 9), attention_mask=torch.cat((mask, mask[1:].T[:1].expand(2, 1)), 1))
