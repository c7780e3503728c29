"""Variants of softmax attention in whole models: segments, documents, backends, second derivatives,
decoding, plans and runs.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DIMS, VOCAB, build, distance, stream, tiny, tokens
from lswt_blocked import Blocked
from lswt_compressed import Compressed
from lswt_registers import Registers
from lswt_rope import PartialRope, Rope
from lswt_sdpa import Sdpa
from lswt_sinks import SinkLogit
from lswt_sparse_xl import SparseXl
from lswt_xl_cache import SlidingWindow, XlCache, XlHidden
from runs import assert_same_bits, inside, write_recipe
from softmax_parts import MIXERS
from torch import Tensor

from lswt_core.budget import budget
from lswt_core.decode.rolling_kv_cache import inference_copy
from lswt_core.distributed.world import World
from lswt_core.errors import Incompatible
from lswt_core.interfaces import Dims, KeyValue, LayerContext, MixerParts
from lswt_core.model.attention_choice import attention_requirements
from lswt_core.model.build import build_model
from lswt_core.model.compatibility import check_projections
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.train.hvp import exact_hvp, perturbed, sum_gradients

REGISTERS = {"registers": partial(Registers, count=3)}
CACHE = REGISTERS | {"xl": partial(XlCache, length=64)}
TOKENS = 13
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def model(mixer: str, memories: Any = CACHE, **parts: Any) -> Decoder:
    return tiny(mixer=MIXERS[mixer], memories=memories, **parts)


@every_mixer
@pytest.mark.parametrize("memory", ["cache", "window", "hidden"])
def test_segments_give_what_one_call_gives(mixer: str, memory: str) -> None:
    if (mixer, memory) == ("value residual", "hidden"):
        pytest.skip("refused while the model is built")
    kept = {
        "cache": CACHE["xl"],
        "window": partial(SlidingWindow, length=5),
        "hidden": partial(XlHidden, length=64),
    }[memory]
    decoder = model(mixer, {"sink": SinkLogit, **REGISTERS, "xl": kept})
    ids = tokens(2, TOKENS)
    whole = decoder(ids)[0]
    for size in (1, 5):
        assert distance(stream(decoder, ids, size), whole) < 1e-12


@every_mixer
def test_documents_are_as_separate_texts(mixer: str) -> None:
    decoder, ids = model(mixer), tokens(2, TOKENS)
    borders = torch.tensor([[0] * 6 + [6] * 7, [0] * 2 + [2] * 11])
    together = stream(decoder, ids, 4, borders)
    for row, first in enumerate((6, 2)):
        alone = torch.cat(
            [decoder(part[None])[0][0] for part in ids[row].split((first, TOKENS - first))]
        )
        assert distance(together[row], alone) < 1e-12


@every_mixer
@pytest.mark.parametrize("backend", [Sdpa, Blocked])
def test_every_backend_gives_the_same(mixer: str, backend: Any) -> None:
    ids = tokens(2, TOKENS)
    expected = stream(model(mixer), ids, 5)
    assert distance(stream(model(mixer, attention=backend), ids, 5), expected) < 1e-12


@every_mixer
def test_second_derivatives_are_those_of_finite_differences(mixer: str) -> None:
    decoder, ids = model(mixer), tokens(2, 6)
    params = [p for p in decoder.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]

    with torch.no_grad():
        state = decoder(ids)[1]  # what is kept has no gradient

    def losses() -> list[torch.Tensor]:
        return [decoder(ids, state)[0].tanh().square().mean()]

    exact = torch.cat([p.flatten() for p in exact_hvp(losses, params, vectors)])
    weights, sides = [p.detach().clone() for p in params], []
    for step in (1e-5, -1e-5):
        with perturbed(params, weights, vectors, step):
            sides.append(torch.cat([g.flatten() for g in sum_gradients(losses, params)]))
    differences = (sides[0] - sides[1]) / 2e-5
    assert float((exact - differences).norm() / exact.norm()) < 1e-4


@every_mixer
def test_rings_of_keys_give_what_memories_give(mixer: str) -> None:
    """Or the model is decoded with its own memories, where other layers read keys or values, and
    where latents are projected.
    """
    has_ring = mixer in ("gated", "gated by head", "differential")
    # an encoding that knows how wide its heads are
    rotary = partial(PartialRope, fraction=0.5) if has_ring else Rope
    decoder, ids = model(mixer, positional=rotary), tokens(1, TOKENS)
    copied, cache = inference_copy(decoder, torch.float64)
    assert (cache is not None) == has_ring
    if cache is None:
        return
    state, states = None, []
    with torch.no_grad():
        for first, segment in enumerate(ids.split(1, dim=1)):
            out, state = copied(segment, state, first=first)
            cache.n_read += 1
            states.append(out)
    assert distance(torch.cat(states, 1), decoder(ids)[0]) < 1e-12


# ---------- recipes

NANO: dict[str, Any] = {
    "model": {"d_model": 32, "n_heads": 4, "n_layers": 4},
    "embedding": {"vocab_size": VOCAB, "d_vocab": 8},
    "memory": {"xl": {"use": "xl-cache", "length": 16}},
    "train": {"steps": 1, "batch_size": 4, "seq_len": 16, "precision": "float32"},
}
CROSS_LAYER = {
    "mixer": {"use": "cross-layer-attention"},
    "layers": {"every 2": {"mixer": {"keys": "below"}, "memory": {"xl": False}}},
}


def recipe_of(**tables: Any) -> Recipe:
    return Recipe.from_dict(NANO | tables)


def built(recipe: Recipe) -> Any:
    return build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float32)


def kept_bytes(**tables: Any) -> int:
    world = World(0, 1, torch.device("cpu"))
    return budget(recipe_of(**tables), Registry(), world).memory.parts["memories"]


def test_a_plan_counts_the_smaller_state() -> None:
    layers, length, width = 4, 16, 32
    assert kept_bytes(**CROSS_LAYER) == layers // 2 * length * 2 * width * 4
    latent = {"mixer": {"use": "latent-attention", "kv_rank": 10, "d_rope": 2}}
    hidden = {"memory": {"xl": {"use": "xl-hidden", "length": length}}}
    assert kept_bytes(**latent, **hidden) == layers * length * 12 * 4


@pytest.mark.parametrize(
    ("layers", "missing"),
    [
        ({"0": {"mixer": {"use": "attention"}}}, "'value-residual' in layer 1 reads"),
        ({"0,2": {"mixer": {"use": "attention"}}}, "'value-residual' in layer 1 reads"),
        ({"1,2": {"mixer": {"use": "attention"}}}, None),
    ],
)
def test_the_first_layer_must_be_a_value_residual(layers: Any, missing: str | None) -> None:
    recipe = recipe_of(mixer={"use": "value-residual"}, layers=layers)
    if missing is None:
        mixers = [block.attention.name for block in built(recipe).loss.decoder.blocks]
        assert mixers == ["value-residual", "attention", "attention", "value-residual"]
        return
    with pytest.raises(Incompatible, match=missing):
        built(recipe)


class ValueEmbeddings(SoftmaxAttention):
    """Adds an embedding of the token itself to every value."""

    name, reads = "value-embeddings", frozenset({"ids"})

    def __init__(self, dims: Dims, parts: MixerParts) -> None:
        super().__init__(dims, parts)
        self.table = torch.nn.Embedding(VOCAB, dims.n_kv_heads * dims.d_head)

    def make_key_value(
        self, x: Tensor, k: Tensor, v: Tensor, positions: Tensor, context: LayerContext
    ) -> KeyValue:
        v = v + self.table(context.carry["ids"]).unflatten(-1, v.shape[-2:])
        return super().make_key_value(x, k, v, positions, context)


@pytest.mark.parametrize("memory", [XlHidden, Compressed])
def test_what_is_read_of_new_tokens_is_not_made_again_of_earlier_ones(memory: Any) -> None:
    def with_memory(built: Any) -> Decoder:
        return build(mixer=ValueEmbeddings, memories={"m": partial(built, length=4)})

    for allowed in (XlCache, SparseXl):
        check_projections(with_memory(allowed), DIMS.d_model)
    with pytest.raises(Incompatible, match=r"reads 'ids' .* memory\.m \(.*use .*xl-cache"):
        check_projections(with_memory(memory), DIMS.d_model)


def test_a_value_residual_needs_kept_values() -> None:
    memory = {"xl": {"use": "xl-hidden", "length": 4}}
    with pytest.raises(Incompatible, match=r"in layer 1 .*'value-residual' is not"):
        built(recipe_of(mixer={"use": "value-residual"}, memory=memory))


def test_a_reader_needs_a_layer_below() -> None:
    mixer = {"use": "cross-layer-attention", "keys": "below"}
    with pytest.raises(Incompatible, match="'cross-layer-attention' in layer 0 reads"):
        built(recipe_of(mixer=mixer, memory={}))


@pytest.mark.parametrize(
    ("tables", "widths"),
    [
        ({}, [8]),
        ({"mixer": {"use": "differential-attention"}}, [4]),
        ({"layers": {"1": {"mixer": {"use": "differential-attention"}}}}, [8, 4]),
    ],
)
def test_backends_are_asked_for_the_head_widths_of_mixers(tables: Any, widths: list[int]) -> None:
    needs = attention_requirements(
        recipe_of(**tables), Registry(), torch.device("cpu"), torch.float32
    )
    assert [need.d_head for need in needs] == widths


RUNS: dict[str, list[str]] = {
    "gated-attention": [],
    "differential-attention": ["optimizer.use=sophia-h"],
    "latent-attention": ["memory.xl.use=xl-hidden", "mixer.kv_rank=8"],
    "value-residual": [],
    "cross-layer-attention": ['layers.1={mixer={keys="below"},memory={xl=false}}'],
}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", RUNS)
def test_a_resumed_run_ends_with_the_same_bits(
    mixer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    options = [f"mixer.use={mixer}", *RUNS[mixer], "evaluate.every=0", "checkpoint.every=3"]
    assert inside(monkeypatch, recipe, *options, "train.steps=6", "--out", whole) == 0
    shutil.copytree(whole, parted)
    shutil.rmtree(max(parted.joinpath("checkpoints").glob("step-????????")))
    assert inside(monkeypatch, recipe, *options, "train.steps=6", "--out", parted) == 0
    assert_same_bits(whole, parted)
