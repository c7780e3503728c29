"""Windows, Transformer-XL's hidden states and compressed memories, each against its definition
written out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from helpers import (
    DIMS,
    VOCAB,
    attention_layer,
    context_of,
    distance,
    slow_unless,
    stream,
    tiny,
    tokens,
)
from lswt_attention import Attention
from lswt_blocked import Blocked
from lswt_compressed import Compressed
from lswt_eager import Eager
from lswt_flex import Flex
from lswt_nope import NoPosition
from lswt_registers import Registers
from lswt_rope import Rope, XPos
from lswt_sdpa import Sdpa
from lswt_t5 import RelativeBuckets
from lswt_xl_cache import SlidingWindow, XlCache, XlHidden
from torch import Tensor

from lswt_core.budget import budget
from lswt_core.distributed.world import World
from lswt_core.errors import Incompatible
from lswt_core.interfaces import AttentionBackend, Dims, KVBlock
from lswt_core.model.build import build_model
from lswt_core.model.initialise import initialise
from lswt_core.plugin_api.pytree import tree_leaves
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

REGISTERS = {"registers": partial(Registers, count=3)}
BACKENDS: dict[str, Callable[[Dims], AttentionBackend]] = {
    "eager": Eager,
    "sdpa": Sdpa,
    "joint": partial(Sdpa, method="joint"),
    "blocked": Blocked,
}
POSITIONS: dict[str, Callable[[Dims], Any]] = {
    "reversed": Rope,
    "forward": partial(Rope, reversed=False),
    "none": NoPosition,
    "xpos": XPos,
    "t5": RelativeBuckets,
}
TOKENS = 23
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_backend_and_position = pytest.mark.parametrize(
    ("backend", "position"),
    # which refuses biases
    [pair for pair in product(BACKENDS, POSITIONS) if pair != ("blocked", "t5")],
)


# ---------- window


class Banded(AttentionBackend):
    """A whole text at once under a dense mask: query i sees tokens i - length + 1 to i, and every
    sink.
    """

    name = "banded"

    def __init__(self, dims: Dims, *, length: int) -> None:
        super().__init__(dims)
        self.length = length

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        size = parts[-1].k.shape[1]
        ahead = torch.arange(size)[:, None] - torch.arange(size)[None]
        scores = [
            torch.einsum("bihd,bjhd->bhij", part.q, part.k) / part.q.shape[-1] ** 0.5
            for part in parts
        ]
        scores[-1] = scores[-1] if parts[-1].bias is None else scores[-1] + parts[-1].bias.dense()
        scores[-1] = scores[-1].masked_fill((ahead < 0) | (ahead >= self.length), -torch.inf)
        return torch.einsum(
            "bhij,bjhd->bihd",
            torch.cat(scores, -1).softmax(-1),
            torch.cat([part.v for part in parts], 1),
        )


@pytest.mark.parametrize(
    ("backend", "position"),
    # which refuses biases
    [pair for pair in product(BACKENDS, POSITIONS) if pair != ("blocked", "t5")],
)
@pytest.mark.parametrize("sinks", [{}, REGISTERS], ids=["alone", "registers"])
@pytest.mark.parametrize("length", slow_unless([5], [2, 5, 40]))
def test_a_window_is_a_band_of_the_whole_text_however_it_is_cut(
    backend: str, position: str, sinks: dict[str, Any], length: int
) -> None:
    parts, ids = {"positional": POSITIONS[position]}, tokens(2, TOKENS)
    decoder = tiny(
        memories={"window": partial(SlidingWindow, length=length)} | sinks,
        attention=BACKENDS[backend],
        **parts,
    )
    expected = tiny(memories=sinks, attention=partial(Banded, length=length), **parts)(ids)[0]
    for size in (1, 7, TOKENS):
        assert distance(stream(decoder, ids, size), expected) < 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_window_in_one_kernel_without_a_mask() -> None:
    memories, ids = {"window": partial(SlidingWindow, length=5)} | REGISTERS, tokens(2, TOKENS)
    first_visible = torch.zeros(2, TOKENS, dtype=torch.int64).index_fill(
        1, torch.arange(11, TOKENS), 11
    )
    for borders in (None, first_visible):
        with torch.no_grad():
            states = stream(tiny(memories=memories, attention=Flex), ids, 6, borders)
            # its CPU kernel sums in float32
            assert distance(states, stream(tiny(memories=memories), ids, 6, borders)) < 1e-4


def test_layers_see_as_far_as_their_windows_together() -> None:
    ids, length = tokens(1, TOKENS), 4
    decoder = tiny(memories={"window": partial(SlidingWindow, length=length)})
    first = TOKENS - 1 - DIMS.n_layers * (length - 1)  # the oldest token that the last one knows of
    before = stream(decoder, ids, 6)[:, -1]
    for place, known in ((first - 1, False), (first, True)):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % VOCAB
        assert (distance(stream(decoder, changed, 6)[:, -1], before) > 1e-12) is known


def test_a_windows_cache_is_one_token_shorter_than_the_window() -> None:
    _, state = tiny(memories={"window": partial(SlidingWindow, length=6)})(tokens(2, TOKENS))
    assert {tensor.shape[1] for tensor in tree_leaves(state)} == {5}


@pytest.mark.parametrize("length", [3, 30])
def test_a_window_ends_at_the_document_too(length: int) -> None:
    decoder, ids = (
        tiny(memories=REGISTERS | {"window": partial(SlidingWindow, length=length)}),
        tokens(2, TOKENS),
    )
    first_visible = torch.zeros(2, TOKENS, dtype=torch.int64).index_fill(
        1, torch.arange(9, TOKENS), 9
    )
    states = stream(decoder, ids, 5, first_visible)
    assert distance(states, torch.cat((decoder(ids[:, :9])[0], decoder(ids[:, 9:])[0]), 1)) < 1e-12


def recipe_of(**tables: Any) -> Recipe:
    small = {
        "model": {"d_model": 32, "n_heads": 2, "n_layers": 2},
        "embedding": {"vocab_size": 61, "d_vocab": 24},
    }
    return Recipe.from_dict({**small, "train": {"steps": 1, "seq_len": 8}, **tables})


@pytest.mark.parametrize(
    ("attention", "device"),
    [({"use": "flash"}, "cuda"), ({"use": "sdpa", "method": "split"}, "cpu")],
)
def test_backends_that_cannot_hide_what_is_beyond_a_window_say_so(
    attention: dict[str, Any], device: str
) -> None:
    recipe = recipe_of(memory={"xl": {"use": "window"}}, attention=attention)
    with pytest.raises(Incompatible, match="window"):
        build_model(recipe, Registry(), device=torch.device(device), dtype=torch.bfloat16)


def test_windows_of_some_layers_only() -> None:
    recipe = recipe_of(
        memory={"xl": {"use": "xl-cache", "length": 64}},
        layers={"every 2": {"memory": {"xl": {"use": "window", "length": 4}}}},
    )
    loss = build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float64).loss
    assert [block.attention.window for block in loss.decoder.blocks] == [None, 4]  # type: ignore[union-attr]
    decoder, ids = loss.decoder.to_empty(device="cpu").double(), tokens(2, TOKENS)
    initialise(decoder, seed=0, std=0.4)
    assert distance(stream(decoder, ids, 5), decoder(ids)[0]) < 1e-12


def test_an_error_of_a_constructor_names_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    constructor = XlCache.__init__

    def refuse_layer_1(memory: XlCache, dims: Dims, *, length: int = 2048) -> None:
        if dims.layer == 1:
            raise ValueError("not in layer 1")
        constructor(memory, dims, length=length)

    monkeypatch.setattr(XlCache, "__init__", refuse_layer_1)
    recipe = recipe_of(memory={"xl": {"use": "xl-cache", "length": 64}})
    with pytest.raises(Incompatible, match=r"\[memory\.xl\] xl-cache"):
        build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float32)


KEEPERS: dict[str, Any] = {
    "xl-cache": XlCache,
    "window": SlidingWindow,
    "xl-hidden": XlHidden,
    "compressed": Compressed,
}


@pytest.mark.parametrize("name", KEEPERS)
def test_two_memories_that_keep_tokens_are_refused(name: str) -> None:
    recipe = recipe_of(memory={"xl": {"use": "xl-cache"}, "other": {"use": name}, "registers": {}})
    with pytest.raises(
        Incompatible,
        match=(rf"memory\.xl \(xl-cache\) and memory\.other \({name}\).*memory\.xl = false"),
    ):
        build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float32)


# ---------- one layer, its memory written out


def layer_of(memories: Mapping[str, Callable[[Dims], Any]], seed: int = 0) -> Attention:
    """One layer's attention in float64."""
    layer: Attention = attention_layer(memories, seed=seed)
    return layer


def inputs(length: int, seed: int = 1) -> Tensor:
    """Normed inputs of a layer, [2, length, M]."""
    return torch.randn(
        2, length, DIMS.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def attend(layer: Attention, memory: Tensor, places: Sequence[int], x: Tensor) -> Tensor:
    """The layer's attention of x [B, T, M] to ``memory`` [B, N, M], which stands at ``places``, and
    to itself, by the definition.
    """
    size, everything = x.shape[1], torch.cat((memory, x), 1)
    positions = torch.tensor([*places, *range(size)])
    rope, heads = Rope(DIMS), (DIMS.n_heads, -1)
    q = rope.rotate(layer.query(x).unflatten(-1, heads), torch.arange(size))
    k, v = (
        rope.rotate(layer.key(everything).unflatten(-1, heads), positions),
        layer.value(everything).unflatten(-1, heads),
    )
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / DIMS.d_head**0.5
    scores = scores.masked_fill(positions[None] > torch.arange(size)[:, None], -torch.inf)
    return layer.output(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))


def read(layer: Attention, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Any]:
    """Last output and state of x [B, T, M], read in segments of ``sizes``."""
    state: Any = {}
    for part in x.split(list(sizes), 1):
        out, state, *_ = layer(part, state, context_of(part.shape[1], Rope(DIMS)))
    return out, state


def gradients(layer: Attention, out: Tensor) -> list[Tensor]:
    """Of a number that depends on all of the output."""
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(7))
    return list(torch.autograd.grad((out * weights).sum(), list(layer.parameters())))


@pytest.mark.parametrize("sizes", [[9, 4], [3, 5, 1, 4], [13, 2]])
def test_hidden_states_are_projected_anew_and_weights_learn_through_them(sizes: list[int]) -> None:
    length, x = 6, inputs(sum(sizes)).requires_grad_()
    layer, other = (
        layer_of({"xl": partial(XlHidden, length=length)}),
        layer_of({"xl": partial(XlHidden, length=length)}, seed=5),
    )
    before = sum(sizes[:-1])
    _, state = read(other, x[:, :before], sizes[:-1])  # with the weights of another time
    new = x[:, before:]
    out = layer(new, state, context_of(sizes[-1], Rope(DIMS))).x
    kept = x[:, max(0, before - length) : before].detach()
    expected = attend(layer, kept, range(-kept.shape[1], 0), new)
    assert distance(out, expected) < 1e-12
    assert (
        max(
            distance(a, b)
            for a, b in zip(gradients(layer, out), gradients(layer, expected), strict=True)
        )
        < 1e-12
    )
    assert not torch.autograd.grad(layer(new, state, context_of(sizes[-1], Rope(DIMS))).x.sum(), x)[
        0
    ][:, :before].any()


def test_keys_and_values_that_are_kept_teach_nothing() -> None:
    """What tells xl-hidden from xl-cache while weights stand still: the gradient."""
    layers = [layer_of({"xl": partial(cls, length=8)}) for cls in (XlHidden, XlCache)]
    outs = [read(layer, inputs(12), [8, 4])[0] for layer in layers]
    assert distance(*outs) < 1e-12
    names = [name for name, _ in layers[0].named_parameters()]
    hidden, cached = (
        dict(zip(names, gradients(*pair), strict=True)) for pair in zip(layers, outs, strict=True)
    )
    for name in ("key.weight", "value.weight"):
        assert distance(hidden[name], cached[name]) > 1e-3
    assert distance(hidden["query.weight"], cached["query.weight"]) < 1e-12


def pooled(x: Tensor, length: int, slots: int, rate: int) -> tuple[Tensor, list[int]]:
    """What Compressed keeps of a text x [B, N, M], and where it stands: whole blocks older than
    ``length``, the rest one by one.
    """
    size = x.shape[1]
    firsts = [first for first in range(0, size, rate) if first + rate <= size - length]
    recent = range(firsts[-1] + rate if firsts else 0, size)
    firsts = firsts[-slots:]
    means = [x[:, first : first + rate].mean(1, keepdim=True) for first in firsts]
    return torch.cat([*means, x[:, recent.start :]], 1), [
        place - size for place in (*firsts, *recent)
    ]


CUTS = [[5, 3], [4, 6, 3], [1, 1, 9, 2, 1, 5], [17, 6, 4], [8, 8, 8, 8]]


@pytest.mark.parametrize("sizes", CUTS, ids=lambda sizes: "-".join(map(str, sizes)))
@pytest.mark.parametrize(("length", "slots", "rate"), [(4, 3, 3), (1, 2, 2), (3, 50, 4), (2, 1, 1)])
def test_old_tokens_are_kept_by_the_block(
    sizes: list[int], length: int, slots: int, rate: int
) -> None:
    layer, x = (
        layer_of({"c": partial(Compressed, length=length, slots=slots, rate=rate)}),
        inputs(sum(sizes)),
    )
    out, state = read(layer, x, sizes)
    before = sum(sizes[:-1])
    kept, places = pooled(x[:, :before], length, slots, rate)
    expected = attend(layer, kept, places, x[:, before:])
    assert distance(out, expected) < 1e-12
    assert (
        max(
            distance(a, b)
            for a, b in zip(gradients(layer, out), gradients(layer, expected), strict=True)
        )
        < 1e-12
    )
    assert distance(torch.cat(tree_leaves(state), 1), pooled(x, length, slots, rate)[0]) < 1e-12
    assert torch.cat(tree_leaves(state), 1).shape[1] <= length + rate - 1 + slots


def test_what_is_kept_depends_on_how_much_was_read_and_not_on_the_cuts() -> None:
    layer, x = layer_of({"c": partial(Compressed, length=4, slots=3, rate=3)}), inputs(22)
    states = [read(layer, x, sizes)[1] for sizes in ([22], [1] * 22, [7, 7, 7, 1], [3, 19])]
    assert all(
        distance(a, b) < 1e-12
        for state in states[1:]
        for a, b in zip(tree_leaves(state), tree_leaves(states[0]), strict=True)
    )


@pytest.mark.parametrize("size", [1, 5, 6])
def test_blocks_of_one_token_are_tokens(size: int) -> None:
    ids, parts = (
        tokens(2, TOKENS),
        {"memories": {"m": partial(Compressed, length=3, slots=4, rate=1)}},
    )
    assert (
        distance(
            stream(tiny(**parts), ids, size),
            stream(tiny(memories={"m": partial(XlHidden, length=7)}), ids, size),
        )
        < 1e-12
    )


def test_segments_of_whole_blocks_keep_the_memorys_shapes() -> None:
    decoder, state = tiny(memories={"m": partial(Compressed, length=4, slots=2, rate=3)}), None
    shapes = set()
    for number in range(6):
        _, state = decoder(tokens(2, 6, number), state)
        shapes |= (
            {tuple(tensor.shape[1] for tensor in tree_leaves(state[0]["m"]))}
            if number > 1
            else set()
        )
    assert shapes == {(2, 6)}  # two tokens over the recent four do not make a block
    assert decoder.memory_length == 4 + 2 + 2 * 3


def test_a_block_of_two_documents_is_seen_by_neither() -> None:
    decoder, ids = (
        tiny(memories={"m": partial(Compressed, length=2, slots=4, rate=4)}),
        tokens(2, 24),
    )
    first_visible = torch.zeros(2, 24, dtype=torch.int64).index_fill(
        1, torch.arange(6, 24), 6
    )  # the second block ends with its first tokens
    states = stream(decoder, ids, 4, first_visible)
    changed = torch.cat(((ids[:, :6] + 1) % VOCAB, ids[:, 6:]), 1)
    assert distance(states[:, 6:], stream(decoder, changed, 4, first_visible)[:, 6:]) == 0
    # of the third block, wholly of the second document, which is seen
    changed[:, 8] = (ids[:, 8] + 1) % VOCAB
    assert distance(states[:, 20:], stream(decoder, changed, 4, first_visible)[:, 20:]) > 1e-6


# ---------- all of them

SHORT: dict[str, Callable[[Dims], Any]] = {
    "window": partial(SlidingWindow, length=5),
    "xl-hidden": partial(XlHidden, length=5),
    "compressed": partial(Compressed, length=2, slots=2, rate=2),
}
LONG: dict[str, Callable[[Dims], Any]] = {
    "window": partial(SlidingWindow, length=5),
    "xl-hidden": partial(XlHidden, length=TOKENS),
    "compressed": partial(Compressed, length=TOKENS, slots=2, rate=2),
}


@every_backend_and_position
@pytest.mark.parametrize("memory", LONG)
@pytest.mark.parametrize("sinks", ["", "outside", "inside"])
def test_a_text_means_the_same_however_it_is_cut(
    backend: str, memory: str, position: str, sinks: str
) -> None:
    memories = {"m": LONG[memory]} | (REGISTERS if sinks else {})
    memories = dict(reversed(memories.items())) if sinks == "outside" else memories
    decoder, ids = (
        tiny(memories=memories, positional=POSITIONS[position], attention=BACKENDS[backend]),
        tokens(2, TOKENS),
    )
    whole = decoder(ids)[0]
    assert max(distance(stream(decoder, ids, size), whole) for size in (1, 7)) < 1e-12


@every_backend
@pytest.mark.parametrize("memory", SHORT)
def test_backends_agree(backend: str, memory: str) -> None:
    ids, memories = tokens(2, 24), {"m": SHORT[memory]} | REGISTERS
    expected = stream(tiny(memories=memories), ids, 6)
    assert (
        distance(stream(tiny(memories=memories, attention=BACKENDS[backend]), ids, 6), expected)
        < 1e-12
    )


@pytest.mark.parametrize("memory", SHORT)
def test_gradients_are_right(memory: str) -> None:
    layer, x = layer_of({"m": SHORT[memory]}), inputs(10)
    _, state = read(layer, x[:, :7], [4, 3])
    names, values = zip(*layer.named_parameters(), strict=True)

    def out(new: Tensor, *given: Tensor) -> Tensor:
        positions = torch.arange(3)
        return torch.func.functional_call(
            layer,
            dict(zip(names, given, strict=True)),
            (new, state, context_of(len(positions), Rope(DIMS))),
        )[0]

    assert torch.autograd.gradcheck(out, (x[:, 7:].requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("memory", SHORT)
def test_what_is_kept_is_as_narrow_as_keys_and_values_are(memory: str) -> None:
    decoder, ids = tiny(memories={"m": SHORT[memory]}, dtype=torch.float32), tokens(2, 12)
    expected = stream(decoder, ids, 6)
    state: Any = None
    with torch.autocast("cpu", torch.bfloat16):
        for part in ids.split(6, 1):
            actual, state = decoder(part, state)
            assert {tensor.dtype for tensor in tree_leaves(state)} == {torch.bfloat16}
    assert (actual.float() - expected[:, 6:]).norm() / expected.norm() < 0.05
    _, state = decoder(ids[:, :4], state)  # and may go on in another precision
    assert {tensor.dtype for tensor in tree_leaves(state)} == {torch.float32}


@pytest.mark.parametrize("memory", SHORT)
def test_no_more_is_kept_for_more_text(memory: str) -> None:
    decoder, sizes = tiny(memories={"m": SHORT[memory]}), []
    state: Any = None
    for number in range(40):
        _, state = decoder(tokens(1, 4, number), state)
        sizes.append(sum(tensor.shape[1] for tensor in tree_leaves(state[0])))
        assert all(tensor.grad_fn is None for tensor in tree_leaves(state))
    assert len(set(sizes[10:])) == 1


# ---------- planning


def test_a_plan_counts_the_pairs_within_a_window() -> None:
    seq_len, length = 8, 5
    work = {
        name: budget(recipe_of(memory=memory), Registry(), World()).flops
        for name, memory in {
            "window": {"w": {"use": "window", "length": length}},
            "none": {},
        }.items()
    }
    pairs = seq_len * length  # once warm, every query sees as many
    assert work["window"].forward["attention scores"] == 2 * 4 * 32 * pairs // seq_len
    assert (
        work["none"].forward["attention scores"]
        == 2 * 4 * 32 * (seq_len * (seq_len + 1) // 2) // seq_len
    )


@pytest.mark.parametrize(("length", "slots", "rate"), [(4, 3, 3), (5, 4, 2)])
def test_a_plan_of_a_memory_whose_size_goes_up_and_down_ends(
    length: int, slots: int, rate: int
) -> None:
    memory = {"m": {"use": "compressed", "length": length, "slots": slots, "rate": rate}}
    recipe = recipe_of(memory=memory, train={"steps": 1, "seq_len": 8, "precision": "float32"})
    # layers, width, bytes
    kept = budget(recipe, Registry(), World()).memory.parts["memories"] / (2 * 32 * 4)
    assert length + slots <= kept <= length + slots + rate - 1
