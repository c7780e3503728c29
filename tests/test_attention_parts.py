"""What a mixer may add to the key blocks of softmax attention: a transform of the scores, a
selection of keys per query.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flash_parts
import pytest
import torch
from helpers import DIMS, attention_layer, context_of, distance, stream, tiny, tokens
from lswt_attention import Attention
from lswt_blocked import Blocked
from lswt_eager import Eager
from lswt_flex import Flex
from lswt_registers import Registers
from lswt_rope import Rope
from lswt_sdpa import Sdpa
from lswt_sinks import SinkLogit
from lswt_xl_cache import XlCache
from torch import Tensor

from lswt_core.decode.cuda_graph import SingleQueryAttention
from lswt_core.decode.rolling_kv_cache import inference_copy
from lswt_core.errors import Incompatible
from lswt_core.interfaces import Dims, KVBlock, MixerParts, SoftCap, Unsupported
from lswt_core.model.build import build_model
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

MEMORIES: dict[str, Any] = {
    "registers": partial(Registers, count=2),
    "xl": partial(XlCache, length=64),
}
CAP = 0.4


class Capped(Attention):
    """Gemma 2's cap on the scores."""

    name, transforms_scores = "capped", SoftCap

    def __init__(self, dims: Dims, parts: MixerParts) -> None:
        super().__init__(dims, parts)
        self.transform = SoftCap(CAP)


class BlockSparse(Attention):
    """Every query sees its own four tokens' block and the one before, and all sinks."""

    name, selects_keys = "block-sparse", True

    def encode(self, *args: Any) -> list[KVBlock]:
        context = args[-1]
        return [self.select(block, context.positions) for block in super().encode(*args)]

    def select(self, block: KVBlock, positions: Tensor) -> KVBlock:
        if block.positions is None:
            return block
        own, theirs = (p.div(4, rounding_mode="floor") for p in (positions, block.positions))
        return block._replace(selected=own[:, None] - theirs < 2)


def by_definition(layer: Attention, x: Tensor, *, cap: float, sparse: bool) -> Tensor:
    """Attention of one segment with registers, written out."""
    positions, rope = torch.arange(x.shape[1]), Rope(DIMS)
    q, k, v = (
        part(x).unflatten(-1, (DIMS.n_heads, -1)) for part in (layer.query, layer.key, layer.value)
    )
    registers = layer.memory["registers"]
    turned = rope.rotate(q, positions)
    scores = torch.cat(
        [
            torch.einsum("bihd,jhd->bhij", q, registers.keys),
            torch.einsum("bihd,bjhd->bhij", turned, rope.rotate(k, positions)),
        ],
        -1,
    )
    scores = scores / DIMS.d_head**0.5
    if cap:
        scores = cap * torch.tanh(scores / cap)
    hidden = positions[:, None] < positions
    if sparse:
        hidden = hidden | (positions[:, None] // 4 - positions // 4 > 1)
    scores[..., len(registers.keys) :].masked_fill_(hidden, -torch.inf)
    values = torch.cat([registers.values.expand(len(x), -1, -1, -1), v], 1)
    return layer.output(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values).flatten(2))


MIXERS: dict[Any, dict[str, Any]] = {
    Capped: {"cap": CAP, "sparse": False},
    BlockSparse: {"cap": 0.0, "sparse": True},
}
every_mixer = pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.name)


@every_mixer
@pytest.mark.parametrize("backend", [Eager, Sdpa, Blocked, SingleQueryAttention])
def test_it_is_its_definition_or_is_refused(mixer: Any, backend: Callable[..., Any]) -> None:
    """At run time as well: nothing is ignored."""
    if backend is SingleQueryAttention:
        backend = lambda dims: SingleQueryAttention()  # noqa: E731
    layer = attention_layer(MEMORIES, backend, mixer=mixer)
    x = torch.randn(2, 13, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if mixer is Capped and backend in (Sdpa, Blocked):
        with pytest.raises(Unsupported, match="use attention 'eager'"):
            layer(x, None, context_of(13, Rope(DIMS)))
        return
    output = layer(x, None, context_of(13, Rope(DIMS))).x
    assert distance(output, by_definition(layer, x, **MIXERS[mixer])) < 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@every_mixer
@torch.no_grad()
def test_flex_takes_it_in_its_kernel(mixer: Any) -> None:
    layer = attention_layer(MEMORIES, Flex, mixer=mixer)
    x = torch.randn(2, 13, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    output = layer(x, None, context_of(13, Rope(DIMS))).x
    # its CPU kernel sums in float32
    assert distance(output, by_definition(layer, x, **MIXERS[mixer])) < 1e-5


@every_mixer
def test_a_text_means_the_same_however_it_is_cut(mixer: Any) -> None:
    """In segments of whole blocks, as the block-sparse mixer counts them from a segment's start."""
    memories = MEMORIES | {"sink": SinkLogit}
    decoder = tiny(mixer=mixer, memories=memories)
    ids = tokens(2, 24)
    assert distance(stream(decoder, ids, 8), decoder(ids)[0]) < 1e-12
    assert distance(tiny(memories=memories)(ids)[0], decoder(ids)[0]) > 1e-2


@torch.no_grad()
def test_a_cap_keeps_the_fast_path_of_decoding_and_a_selection_does_not() -> None:
    models = [tiny(mixer=mixer, memories=MEMORIES) for mixer in MIXERS]
    fast, cache = inference_copy(models[0], torch.float64)
    assert cache is not None and inference_copy(models[1], torch.float64)[1] is None
    ids, state = tokens(1, 9), None
    for i in range(9):
        logits, state = fast(ids[:, i : i + 1], state, first=cache.n_read)
        cache.n_read += 1
    assert distance(logits, models[0](ids)[0][:, -1:]) < 1e-12


PLUGIN = """
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import ScoreTransform, SoftCap
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention

class Squares(ScoreTransform):
    def __call__(self, scores):
        return scores.square()

class Capped(SoftmaxAttention):
    "With a cap."
    name, citation, transforms_scores = "capped", "", SoftCap

class Squared(SoftmaxAttention):
    "With squares."
    name, citation, transforms_scores = "squared", "", Squares

class Sparse(SoftmaxAttention):
    "With a selection."
    name, citation, selects_keys = "sparse", "", True

@hookimpl
def lswt_components():
    return [Capped, Squared, Sparse]
"""


@pytest.mark.parametrize(
    ("mixer", "attention", "device", "chosen"),
    [
        ("capped", "auto", "cpu", "eager"),
        ("capped", "auto", "cuda", "flash"),
        ("squared", "auto", "cuda", "eager"),
        ("sparse", "auto", "cpu", "blocked"),
        ("sparse", "auto", "cuda", "sdpa"),
        ("squared", "flex", "cuda", "flex"),
        ("squared", "flash", "cuda", "SoftCap alone"),
        ("capped", "sdpa", "cpu", "transform no scores"),
        ("capped", "blocked", "cpu", "transforms no scores"),
        ("sparse", "flash", "cuda", "per query"),
        ("sparse", "split", "cpu", "selection of keys"),
    ],
)
def test_a_backend_that_cannot_is_refused_while_the_model_is_built(
    mixer: str,
    attention: str,
    device: str,
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flash_parts.install(monkeypatch, 2)
    tmp_path.joinpath("parts.py").write_text(PLUGIN)
    registry = Registry(files=[tmp_path / "parts.py"])
    options = {"use": "sdpa", "method": "split"} if attention == "split" else {"use": attention}
    recipe = Recipe.from_dict(
        {
            "model": {"d_model": 16, "n_heads": 2, "n_layers": 1},
            "embedding": {"vocab_size": 61, "d_vocab": 24},
            "mixer": {"use": mixer},
            "attention": options,
            "train": {"steps": 1},
        },
        registry=registry,
    )
    dtype = torch.bfloat16

    def build() -> tuple[str, ...]:
        return build_model(recipe, registry, device=torch.device(device), dtype=dtype).backends

    if chosen in ("eager", "flash", "flex", "sdpa", "blocked"):
        assert build() == (chosen,)
        return
    with pytest.raises(Incompatible, match=chosen):
        build()
