"""Variants of softmax attention, each against its definition written out, head by head."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers import DIMS, context_of, distance
from lswt_attention import Attention
from lswt_cross_layer_attention import CrossLayerAttention
from lswt_differential_attention import DifferentialAttention
from lswt_gated_attention import GatedAttention
from lswt_latent_attention import LatentAttention
from lswt_nope import NoPosition
from lswt_registers import Registers
from lswt_rope import PartialRope, Rope, YarnRope
from lswt_t5 import RelativeBuckets
from lswt_value_residual import FIRST_VALUES, ValueResidual
from lswt_xl_cache import SlidingWindow, XlCache, XlHidden
from softmax_parts import heads, inputs, layer_of, weights
from torch import Tensor

from lswt_core.interfaces import Dims, MixerParts, Unsupported
from lswt_core.plugin_api.pytree import tree_leaves

H, D = DIMS.n_heads, DIMS.d_head
GROUPED = Dims(d_model=32, n_heads=4, d_ffn=24, n_layers=2, layer=1, queries_per_kv=2)


def rope(x: Tensor) -> Tensor:
    """Rotate one head [B, T, D] by the default encoding, at positions from 0 on."""
    return Rope(DIMS).rotate(x[:, :, None], torch.arange(x.shape[1]))[:, :, 0]


def plain_heads(layer: Any, x: Tensor) -> list[Tensor]:
    """What the heads of plain attention return, each [B, T, D]."""
    projections = [heads(part(x), H) for part in (layer.query, layer.key, layer.value)]
    return [weights(rope(q), rope(k)) @ v for q, k, v in zip(*projections, strict=True)]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


# ---------- gate


@pytest.mark.parametrize("granularity", ["elementwise", "headwise"])
def test_a_gate_scales_what_heads_return(granularity: str) -> None:
    layer, x = layer_of(partial(GatedAttention, granularity=granularity)), inputs()
    gates = heads(1 / (1 + torch.exp(-x @ layer.gate.weight.T)), H)
    assert gates[0].shape[-1] == (D if granularity == "elementwise" else 1)
    gated = [gate * head for gate, head in zip(gates, plain_heads(layer, x), strict=True)]
    expected = layer.output(torch.cat(gated, -1))
    assert distance(layer(x, None, context_of(5, Rope(DIMS))).x, expected) < 1e-12


def test_a_gate_of_zeros_halves_attention() -> None:
    layer, plain, x = layer_of(GatedAttention), layer_of(Attention), inputs()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.nn.init.zeros_(layer.gate.weight)
    torch.nn.init.zeros_(layer.output.bias)
    torch.nn.init.zeros_(plain.output.bias)
    context = context_of(5, Rope(DIMS))
    assert distance(2 * layer(x, None, context).x, plain(x, None, context).x) < 1e-12


# ---------- two softmaxes


@pytest.mark.parametrize(
    ("dims", "rotary"),
    [(DIMS, Rope), (DIMS._replace(layer=3), partial(PartialRope, fraction=0.5)), (GROUPED, Rope)],
    ids=["first", "deep", "grouped"],
)
def test_differential_attention_subtracts_two_softmaxes(dims: Dims, rotary: Any) -> None:
    def mixer(dims: Dims, parts: MixerParts) -> DifferentialAttention:
        return DifferentialAttention(dims, parts._replace(positional=rotary))

    def rotate(x: Tensor) -> Tensor:
        narrow = rotary(Dims(D // 2, 1, 0, 1))
        return narrow.rotate(x[:, :, None], torch.arange(x.shape[1]))[:, :, 0]

    layer, x = layer_of(mixer, dims), inputs(width=dims.d_model)
    groups, size = dims.n_kv_heads, dims.queries_per_kv
    q, k = heads(layer.query(x), 2 * dims.n_heads), heads(layer.key(x), 2 * groups)
    v = heads(layer.value(x), groups)
    start = 0.8 - 0.6 * math.exp(-0.3 * dims.layer)
    scales = [(layer.lambda_q1 @ layer.lambda_k1).exp(), (layer.lambda_q2 @ layer.lambda_k2).exp()]
    mixing = scales[0] - scales[1] + start
    outputs = []
    for h in range(dims.n_heads):
        g, j = divmod(h, size)
        first, second = (
            weights(rotate(q[(2 * g + s) * size + j]), rotate(k[2 * g + s])) for s in (0, 1)
        )
        head = (first - mixing * second) @ v[g]
        outputs.append((1 - start) * rms(head, layer.head_norm.weight, 1e-5))
    expected = layer.output(torch.cat(outputs, -1))
    assert distance(layer(x, None, context_of(5, NoPosition(dims))).x, expected) < 1e-12


def test_differential_attention_has_the_parameters_of_attention_and_lambdas() -> None:
    plain, layer = layer_of(Attention), layer_of(DifferentialAttention)
    more = {name: p.shape for name, p in layer.named_parameters()} | {"head_norm.weight": (D,)}
    for name, parameter in plain.named_parameters():
        assert more.pop(name) == parameter.shape
    assert more.pop("head_norm.weight") == (D,) and set(more.values()) == {(D // 2,)}


# ---------- latents


def latents_of(layer: Any, x: Tensor) -> Tensor:
    c, k_r = layer.compress(x).split((5, 2), -1)
    return torch.cat((rms(c, layer.latent_norm.weight, 1e-6), k_r), -1)


def latent_attention(layer: Any, x: Tensor, latents: Tensor, rotary: Any = Rope) -> Tensor:
    """Of the last tokens x [B, T, M] to the latents [B, N, 7] of all N."""
    size, total = x.shape[1], latents.shape[1]
    down = rms(layer.query.down(x), layer.query.norm.weight, 1e-6)
    c, k_r = latents.split((5, 2), -1)
    positions, outputs = torch.arange(total), []
    rotary = rotary(Dims(2 * H, H, 0, 1))
    for q, k, v in zip(
        heads(layer.query.up(down), H),
        heads(layer.key(c), H),
        heads(layer.value(c), H),
        strict=True,
    ):
        (q_own, q_r), padding = q.split((D - 2, 2), -1), total - size
        q_r, k_rotated = rotary.encode(
            q_r[:, :, None], k_r[:, :, None], positions[padding:], positions
        )
        scores = q_own @ k.mT + q_r[:, :, 0] @ k_rotated[:, :, 0].mT
        ahead = torch.ones(size, total).triu(1 + padding).bool()
        outputs.append((scores / D**0.5).masked_fill(ahead, -torch.inf).softmax(-1) @ v)
    return layer.output(torch.cat(outputs, -1))


def latent(dims: Dims, parts: MixerParts, **options: Any) -> LatentAttention:
    return LatentAttention(dims, parts, kv_rank=5, q_rank=7, d_rope=2, **options)


@pytest.mark.parametrize(
    "rotary", [Rope, partial(YarnRope, factor=4.0, trained_length=16)], ids=["rope", "yarn"]
)
def test_latent_attention_is_its_definition(rotary: Any) -> None:
    def mixer(dims: Dims, parts: MixerParts) -> LatentAttention:
        return latent(dims, parts._replace(positional=rotary))

    layer, x = layer_of(mixer), inputs()
    expected = latent_attention(layer, x, latents_of(layer, x), rotary)
    assert distance(layer(x, None, context_of(5, NoPosition(DIMS))).x, expected) < 1e-12


def test_a_memory_keeps_latents_and_their_expansion_gets_gradients() -> None:
    layer, x = layer_of(latent, xl=partial(XlHidden, length=8)), inputs(size=9)
    old, new = x.split((4, 5), dim=1)
    state = layer(old, None, context_of(4, Rope(DIMS))).state
    assert [leaf.shape for leaf in tree_leaves(state)] == [(2, 4, 7)], "kv_rank + d_rope"
    outputs = (
        layer(new, state, context_of(5, Rope(DIMS))).x,
        latent_attention(
            layer, new, torch.cat((latents_of(layer, old).detach(), latents_of(layer, new)), 1)
        ),
    )
    assert distance(*outputs) < 1e-12
    gradients, expected = (
        torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in outputs
    )
    for one, other in zip(gradients, expected, strict=True):
        assert distance(one, other) < 1e-10


# ---------- the first layer's values


def test_values_are_mixed_with_those_of_the_first_layer() -> None:
    x, first = inputs(), inputs(seed=3).unflatten(-1, (H, D))
    layer = layer_of(ValueResidual, DIMS._replace(layer=1))
    q, k, v = (heads(part(x), H) for part in (layer.query, layer.key, layer.value))
    ours, theirs = layer.lambdas[1], layer.lambdas[0]
    outputs = [
        weights(rope(q[h]), rope(k[h])) @ (ours * v[h] + theirs * first[:, :, h]) for h in range(H)
    ]
    out = layer(x, None, context_of(5, Rope(DIMS), **{FIRST_VALUES: first}))
    assert distance(out.x, layer.output(torch.cat(outputs, -1))) < 1e-12 and not out.carry


def test_the_first_layer_is_plain_attention_and_hands_its_values_up() -> None:
    x, context = inputs(), context_of(5, Rope(DIMS))
    memories = {"xl": partial(XlHidden, length=8)}  # allowed where nothing is mixed
    layer, plain = layer_of(ValueResidual, **memories), layer_of(Attention, **memories)
    state = layer(inputs(seed=1), None, context).state
    out = layer(x, state, context)
    assert distance(out.x, plain(x, state, context).x) == 0
    assert distance(out.carry[FIRST_VALUES].flatten(2), layer.value(x)) < 1e-12


def test_a_cache_keeps_mixed_values() -> None:
    x, first = inputs(), inputs(seed=3).unflatten(-1, (H, D))
    layer = layer_of(ValueResidual, DIMS._replace(layer=1), xl=partial(XlCache, length=8))
    state = layer(x, None, context_of(5, Rope(DIMS), **{FIRST_VALUES: first})).state
    own = layer.value(x).unflatten(-1, (H, D))
    mixed = layer.lambdas[0] * first + layer.lambdas[1] * own
    assert distance(state["xl"]["v"], mixed) < 1e-12


# ---------- another layer's keys and values


@pytest.mark.parametrize("memory", [XlCache, SlidingWindow, XlHidden])
def test_a_reader_attends_to_what_the_layer_below_attends_to(memory: Any) -> None:
    """With the keys and values of the layer below, but for its sinks, plain attention does the
    same.
    """
    memories = {"sinks": Registers, "xl": partial(memory, length=4)}
    below = layer_of(CrossLayerAttention, **memories)
    reader = layer_of(partial(CrossLayerAttention, keys="below"), DIMS._replace(layer=1))
    plain = layer_of(Attention, xl=partial(memory, length=4))
    given = below.state_dict() | reader.state_dict()  # query and output are the reader's
    plain.load_state_dict(given, strict=False)
    state, context = None, context_of(5, Rope(DIMS))
    for seed in range(3):
        x = inputs(seed=seed)
        handed = below(x, state, context)
        out = reader(x, None, context._replace(carry=handed.carry))
        assert distance(out.x, plain(x, state, context).x) < 1e-12
        assert not out.state and not out.carry
        state = handed.state
    assert not {"key.weight", "value.weight"} & reader.state_dict().keys()


# ---------- what is refused


@pytest.mark.parametrize(
    ("mixer", "changes", "parts", "message"),
    [
        (DifferentialAttention, {"d_model": 18}, {}, "which is odd"),
        (DifferentialAttention, {}, {"positional": RelativeBuckets}, "it has parameters"),
        (latent, {}, {"positional": RelativeBuckets}, "it has parameters"),
        (partial(LatentAttention, d_rope=D), {}, {}, "between 1 and 7"),
        (partial(LatentAttention, d_rope=3), {}, {}, "is odd"),
        (
            partial(CrossLayerAttention, keys="below"),
            {"layer": 1},
            {"memories": {"xl": XlCache}},
            r"set memory\.xl = false",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    mixer: Any, changes: dict[str, int], parts: dict[str, Any], message: str
) -> None:
    given = MixerParts({}, lambda dims: torch.nn.Identity(), lambda dims: torch.nn.Identity(), Rope)  # type: ignore[arg-type,return-value]
    with pytest.raises(Unsupported, match=message):
        mixer(DIMS._replace(**changes), given._replace(**parts))
