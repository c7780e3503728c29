"""Recurrent memory tokens against the paper's formula, and what must hold however a text is cut."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import hf_parts
import pytest
import torch
from helpers import DIMS, context_of, distance, stream, tiny, tokens
from lswt_alibi import Alibi
from lswt_attention import Attention
from lswt_eager import Eager
from lswt_mamba2 import Mamba2
from lswt_moe import MixtureOfExperts
from lswt_nope import NoPosition
from lswt_norms import LayerNorm
from lswt_qk_norm import NoNorm
from lswt_recurrent_tokens import RecurrentTokens
from lswt_rope import Rope
from lswt_swiglu import SwiGlu
from lswt_token_shift import TokenShift
from lswt_value_residual import ValueResidual
from lswt_xl_cache import SlidingWindow, XlCache
from runs import assert_resumes_to_the_bit, write_recipe
from torch import Tensor

from lswt_core.budget import Budget, budget
from lswt_core.distributed.world import World
from lswt_core.interfaces import BlockParts, MixerParts, Unsupported
from lswt_core.model.initialise import initialise
from lswt_core.plugin_api.pytree import tree_leaves, tree_map
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

CACHE = {"xl": partial(XlCache, length=8)}
SMALL = partial(RecurrentTokens, tokens=3, chunk=4, depth=2)


def block(**options: Any) -> Any:
    parts = BlockParts(
        LayerNorm,
        lambda dims: Attention(dims, MixerParts(CACHE, Eager, NoNorm, Rope)),
        SwiGlu,
    )
    built = SMALL(DIMS, parts, **options).double()
    initialise(built, seed=0, std=0.4)
    return built


def inputs(length: int, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, length, DIMS.d_model, dtype=torch.float64, generator=generator)


def attend(layer: Any, x: Tensor) -> Tensor:
    """Causal attention with rotary positions, from the layer's projections."""
    q, k, v = (
        f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (layer.query, layer.key, layer.value)
    )
    place = torch.arange(x.shape[1])
    q, k = (Rope(DIMS).rotate(t.transpose(1, 2), place).transpose(1, 2) for t in (q, k))
    mask = torch.ones(len(place), len(place)).tril().log()
    out = (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v
    return layer.output(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("size", [1, 5, 14])
def test_a_chunk_reads_what_the_one_before_wrote_through_all_layers(size: int) -> None:
    """The paper's recurrence, chunk by chunk: [S, X, S + W] through all layers."""
    recurrent, x = block(), inputs(14)
    memory, found = x[:, :0], []
    for chunk in x.split(4, dim=1):
        last = recurrent.write.expand(2, -1, -1) + (memory if found else 0)
        h = torch.cat((memory, chunk, last), dim=1)
        for layer in recurrent.layers:
            h = h + attend(layer.attention, layer.attention_norm(h))
            h = h + layer.ffn(layer.ffn_norm(h))
        found.append(h[:, memory.shape[1] :][:, : chunk.shape[1]])
        memory = recurrent.memory_norm(h[:, -3:])
    outputs, state = [], None
    for piece in x.split(size, dim=1):
        out = recurrent(piece, state, context_of(piece.shape[1], Rope(DIMS)))
        outputs, state = [*outputs, out.x], out.state
    assert distance(torch.cat(outputs, 1), torch.cat(found, 1)) < 1e-12
    assert state["memory"].shape == (2, 3, 16) and state["text"].shape[1] == 14 % 4


PARTS: dict[str, dict[str, Any]] = {
    "cached": {"memories": CACHE, "ffn": TokenShift},
    "window": {"memories": {"xl": partial(SlidingWindow, length=3)}, "positional": Alibi},
    "read-again": {},
    "recurrent": {"mixer": Mamba2, "positional": NoPosition},
}
every_part = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)


@every_part
def test_a_text_gives_the_same_in_any_pieces(parts: dict[str, Any]) -> None:
    decoder, ids = tiny(block=SMALL, **parts), tokens(2, 17)
    whole, last = decoder(ids)
    assert decoder.is_recurrent
    for size in (1, 3, 5):
        assert distance(stream(decoder, ids, size), whole) < 1e-11
    assert distance(decoder(ids[1:])[0], whole[1:]) < 1e-12
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % 29
    difference = (decoder(changed)[0] - whole).abs().amax((0, 2))
    assert difference[:9].max() == 0 and difference[12:].min() > 0
    assert all(leaf.shape[0] == 2 for leaf in tree_leaves(last))


@every_part
def test_documents_are_what_they_are_alone_and_none_sees_another(parts: dict[str, Any]) -> None:
    decoder, ids = tiny(block=SMALL, **parts), tokens(2, 16)
    for starts, alone in (((8, 4), 16), ((5, 2), 4)):  # of the second document, by row
        first = torch.tensor(starts)[:, None]
        borders = torch.where(torch.arange(16) >= first, first, 0)
        changed = torch.where(borders > 0, ids, (ids + 1) % 29)
        for size in (1, 3, 16):
            found = stream(decoder, ids, size, borders)
            other = stream(decoder, changed, size, borders)
            for row, start in enumerate(starts):
                assert distance(other[row, start:], found[row, start:]) < 1e-12
                end = max(alone, start // 4 * 4 + 4)  # a shared chunk ends earlier than alone
                text, _ = decoder(ids[row : row + 1, start:end])
                assert distance(found[row, start:end], text[0]) < 1e-11
                kept = stream(decoder, ids[row : row + 1, :start], size)
                assert distance(found[row, :start], kept[0]) < 1e-11


def test_a_document_writes_with_what_it_alone_wrote_before() -> None:
    """The memory after a chunk in which a document begins is written from that document."""
    decoder, ids = tiny(block=SMALL, memories=CACHE), tokens(1, 16)
    borders = torch.where(torch.arange(16) >= 6, 6, 0)[None]
    changed = ids.clone()
    changed[:, :6] = (ids[:, :6] + 1) % 29
    _, state = decoder(ids[:, :8], None, borders[:, :8])
    _, other = decoder(changed[:, :8], None, borders[:, :8])
    assert distance(state[0]["memory"], other[0]["memory"]) == 0
    changed[:, 7] = (ids[:, 7] + 1) % 29
    _, other = decoder(changed[:, :8], None, borders[:, :8])
    assert distance(state[0]["memory"], other[0]["memory"]) > 1e-3


def test_a_chunk_longer_than_the_text_is_the_pre_norm_block() -> None:
    plain = tiny(memories=CACHE)
    decoder = tiny(block=partial(RecurrentTokens, tokens=1, chunk=8), memories=CACHE)
    weights = {
        name.replace(".layers.0.", "."): value
        for name, value in decoder.state_dict().items()
        if "write" not in name and "memory_norm" not in name
    }
    plain.load_state_dict(weights)
    assert torch.equal(decoder(tokens(2, 7))[0], plain(tokens(2, 7))[0])


def test_later_chunks_train_what_earlier_ones_wrote_within_a_segment() -> None:
    recurrent, x = block(), inputs(12).requires_grad_()
    context = context_of(12, Rope(DIMS))
    loss = recurrent(x, None, context).x[:, 8:].sum()
    gradient, learned = torch.autograd.grad(loss, (x, recurrent.write))
    assert gradient.abs().amax(-1).min() > 0 and learned.abs().min() > 0
    state = tree_map(Tensor.detach, recurrent(x[:, :8], None, context_of(8, Rope(DIMS))).state)
    (gradient,) = torch.autograd.grad(
        recurrent(x[:, 8:], state, context_of(4, Rope(DIMS))).x.sum(), x
    )
    assert gradient[:, :8].abs().max() == 0
    small = block(tokens=1, chunk=2)

    def function(x: Tensor) -> Tensor:
        out: Tensor = small(x, None, context_of(5, Rope(DIMS))).x
        return out

    assert torch.autograd.gradcheck(function, inputs(5, 1).requires_grad_(), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs(5, 1).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"memories": {"xl": partial(XlCache, length=5)}}, "keep 5 tokens.*6 before the last"),
        ({"mixer": ValueResidual}, "reads"),
        ({"ffn": partial(MixtureOfExperts, n_experts=4)}, "loss terms"),
    ],
)
def test_parts_that_memory_tokens_would_break_are_refused(
    parts: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unsupported, match=message):
        tiny(block=SMALL, **parts)


# ---------- in runs, exports and plans


@pytest.mark.slow
def test_resumed_runs_end_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks that end within segments, and micro-batches."""
    recipe = write_recipe(tmp_path)
    table = '\n[block]\nuse = "recurrent-tokens"\ntokens = 2\nchunk = 6\ndepth = 2\n'
    recipe.write_text(recipe.read_text().replace("n_layers = 2", "n_layers = 1") + table)
    few = ("train.steps=4", "checkpoint.every=2", "evaluate.every=4", "train.document_masking=true")
    assert_resumes_to_the_bit(monkeypatch, recipe, *few)


def exported(**block: Any) -> Any:
    """A model for transformers whose memory passes two layers."""
    changes = {
        "model": hf_parts.NANO["model"] | {"n_layers": 1},
        "block": {"use": "recurrent-tokens", "tokens": 2, "depth": 2, **block},
    }
    recipe = Recipe.from_dict(hf_parts.NANO | changes)
    config = hf_parts.LswtConfig(
        recipe=hf_parts.model_tables(recipe),
        components=hf_parts.describe_components(recipe),
        bos_token_id=2,
        eos_token_id=60,
        pad_token_id=1,
    )
    model = hf_parts.LswtForCausalLM(config).double().eval()
    initialise(model.model.decoder, seed=3, std=0.4)
    return model


def test_an_export_loads_with_the_same_bits_and_generates_over_chunks(tmp_path: Path) -> None:
    model, ids = exported(chunk=4), hf_parts.ids(2, 11)
    model.save_pretrained(tmp_path)
    loaded = hf_parts.LswtForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    found = hf_parts.generate(loaded, ids, max_new_tokens=9)
    for length in range(11, 20):
        logits = model(found[:, :length]).logits[:, -1]
        assert torch.equal(found[:, length], logits.argmax(-1))


@pytest.mark.slow
def test_a_plan_counts_memory_tokens() -> None:
    """Every chunk of 8 reads and writes them: 12 or 20 tokens pass the layers."""

    def planned(tokens: int) -> Budget:
        changes = {"block": {"use": "recurrent-tokens", "chunk": 8, "tokens": tokens}}
        tables = hf_parts.NANO | changes | {"train": {"steps": 1, "seq_len": 32}}
        return budget(Recipe.from_dict(tables), Registry(), World())

    few, many = planned(2), planned(6)
    for work in ("attention projections", "feed-forward"):
        assert many.flops.forward[work] * 12 == few.flops.forward[work] * 20
    counted = [plan.parameters["block.recurrent-tokens"] for plan in (few, many)]
    assert counted == [2 * 2 * 32, 2 * 6 * 32]
    written = 2 * 4 * 32 * 4  # bytes, of 2 blocks in float32
    assert many.memory.parts["memories"] - few.memory.parts["memories"] == written
