"""Positional encodings against transformers' own functions and the papers' formulas."""

from __future__ import annotations

import cmath
import math
from functools import partial
from typing import Any

import pytest
import torch
from helpers import DIMS, distance
from lswt_alibi import Alibi
from lswt_rope import (
    HighFrequencyRope,
    InterpolatedRope,
    NtkRope,
    PartialRope,
    Rope,
    XPos,
    YarnRope,
)
from lswt_t5 import RelativeBuckets
from position_parts import drawn, filled, scores
from torch import Tensor
from transformers import LlamaConfig, T5Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from lswt_core.interfaces import DenseBias, Dims, SlopeBias, Unsupported
from lswt_core.model.build import build_model
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

# ---------- ALiBi


@pytest.mark.parametrize("n_heads", range(1, 41))
def test_alibi_slopes_are_those_of_bloom_and_mpt(n_heads: int) -> None:
    bias = Alibi(Dims(n_heads * 2, n_heads, 4, 1)).bias(
        torch.zeros(1, 1, n_heads, 2), torch.tensor([0]), torch.arange(-8, 1)
    )
    assert isinstance(bias, SlopeBias)
    dense = bias.dense()[:, 0]  # [H, 9]
    bloom = build_alibi_tensor(torch.ones(1, 9), n_heads, torch.float32)[:, 0]
    assert distance(dense, bloom - bloom[:, -1:]) < 1e-5
    assert distance(dense, build_mpt_alibi_tensor(n_heads, 9)[:, 0]) < 1e-5


# ---------- T5


@pytest.mark.parametrize(
    "buckets, max_distance", [(32, 128), (32, 800), (8, 64), (6, 9), (2, 2), (5, 7)]
)
def test_t5_biases_are_those_of_t5(buckets: int, max_distance: int) -> None:
    encoding = filled(RelativeBuckets, buckets=buckets, max_distance=max_distance)
    sizes = {
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": max_distance,
    }
    config = T5Config(d_model=DIMS.d_model, num_heads=DIMS.n_heads, is_decoder=True, **sizes)
    original = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double()
    original.relative_attention_bias.weight.data.copy_(encoding.biases.data)
    positions = torch.arange(1000)
    bias = encoding.bias(drawn(4, 1), positions[-4:], positions)
    assert isinstance(bias, DenseBias)
    expected = original.compute_bias(4, 1000, past_seen_tokens=996)[0]
    causal = positions[None, :] <= positions[-4:, None]
    assert distance(bias.dense() * causal, expected * causal) == 0


def test_t5_starts_as_t5_does_and_does_not_decay() -> None:
    encoding = RelativeBuckets(Dims(400, 100, 4, 1))
    encoding.reset_parameters()
    assert float(encoding.biases.detach().std()) == pytest.approx(400**-0.5, rel=0.05)
    assert "biases" in encoding.no_weight_decay


def test_t5_is_shared_by_the_layers_or_each_has_its_own() -> None:
    base = {
        "model": {"d_model": 8, "n_layers": 3, "n_heads": 2},
        "embedding": {"vocab_size": 9, "d_vocab": 4},
        "train": {"steps": 1},
    }
    apart = {"positional": {"use": "none"}, "layers": {"every 1": {"positional": {"use": "t5"}}}}
    for tables, count in (({"positional": {"use": "t5"}}, 1), (apart, 3)):
        built = build_model(
            Recipe.from_dict(base | tables),
            Registry(),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        assert (
            len(
                [
                    name
                    for name, _ in built.loss.named_parameters()
                    if name.endswith("positional.biases")
                ]
            )
            == count
        )


def test_t5_refuses_distances_that_its_exact_buckets_cover() -> None:
    with pytest.raises(Unsupported, match=r"16 .*32 buckets"):
        RelativeBuckets(DIMS, max_distance=16)


# ---------- xPos


def test_xpos_scores_are_turned_and_faded_products() -> None:
    width, encoding = 8, XPos(DIMS, base=100.0, scale_base=20.0)
    q, k, q_positions, k_positions = (
        drawn(3, 1),
        drawn(40, 2),
        torch.arange(3),
        torch.arange(-37, 3),
    )
    actual = scores(encoding, q, k, q_positions, k_positions)
    for i, j in ((0, 0), (2, 39), (1, 11), (2, 0)):
        apart, expected = (
            int(q_positions[i] - k_positions[j]),
            torch.zeros(2, 2, dtype=torch.float64),
        )
        for pair in range(width // 2):
            zeta, angle = (
                (2 * pair + 0.4 * width) / (1.4 * width),
                apart * 100.0 ** (-2 * pair / width),
            )
            a, b = (
                torch.complex(x[..., pair], x[..., pair + width // 2]) for x in (q[:, i], k[:, j])
            )
            expected += zeta ** (apart / 20.0) * (a * b.conj() * cmath.exp(1j * angle)).real
        assert distance(actual[:, :, i, j], expected) < 1e-12


@pytest.mark.parametrize(
    "dtype, longest", [(torch.float16, 4532), (torch.bfloat16, 36_259), (torch.float32, 36_260)]
)
def test_xpos_scales_never_overflow(dtype: torch.dtype, longest: int) -> None:
    encoding, positions = (
        XPos(DIMS),
        torch.arange(-1_000_000, longest, 20 if dtype is not torch.float16 else 10),
    )
    positions = torch.cat((positions, torch.tensor([longest - 1])))
    q, k = (
        torch.ones(1, longest, 1, 8, dtype=dtype),
        torch.ones(1, len(positions), 1, 8, dtype=dtype),
    )
    encoded = encoding.encode(q, k, torch.arange(longest), positions)
    assert all(x.isfinite().all() for x in encoded)
    assert all((x[0, -1].abs().max() > 0) for x in encoded)
    with pytest.raises(ValueError, match=f"{longest + 1} tokens .* {longest}:"):
        encoding.encode(
            q[:, :1].expand(-1, longest + 1, -1, -1), k, torch.arange(longest + 1), positions
        )


# ---------- parts of a rotation


@pytest.mark.parametrize(
    "fraction, width, base", [(0.25, 32, 10_000.0), (0.5, 16, 500_000.0), (1.0, 8, 10_000.0)]
)
def test_partial_rotation_is_that_of_gpt_neox(fraction: float, width: int, base: float) -> None:
    x, positions, turned = drawn(6, 1, width=width), torch.arange(6), int(width * fraction)
    expected = x.clone()
    for p, pair in torch.cartesian_prod(positions, torch.arange(turned // 2)).tolist():
        angle = p * base ** (-2 * pair / turned)
        a, b = x[:, p, :, pair], x[:, p, :, pair + turned // 2]
        expected[:, p, :, pair] = a * math.cos(angle) - b * math.sin(angle)
        expected[:, p, :, pair + turned // 2] = b * math.cos(angle) + a * math.sin(angle)
    assert (
        distance(
            PartialRope(Dims(2 * width, 2, 4, 1), fraction=fraction, base=base).rotate(
                x, positions
            ),
            expected,
        )
        < 1e-12
    )


def frequencies_of(encoding: Rope, width: int) -> Tensor:
    """Radians a token, from how the first dimension of a pair is rotated at position 1."""
    one = torch.cat((torch.ones(width // 2), torch.zeros(width // 2))).double()[None, None, None]
    turned = encoding.rotate(one, torch.tensor([1]))[0, 0, 0]
    return torch.atan2(turned[width // 2 :], turned[: width // 2])


def parameters_of(
    kind: str, width: int, length: int = 64, seen: int | None = None, **more: Any
) -> tuple[Tensor, float]:
    """Frequencies and attention factor of transformers' own function."""
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, max_position_embeddings=length
    )
    config.rope_parameters = {
        "rope_type": kind,
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": length,
    } | more
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=seen)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.6, 0.75, 1.0])
def test_p_rope_is_proportional_rotation(fraction: float) -> None:
    frequencies = frequencies_of(
        HighFrequencyRope(Dims(64, 2, 4, 1), fraction=fraction, base=10_000.0), 32
    )
    plain = frequencies_of(Rope(Dims(64, 2, 4, 1), base=10_000.0, reversed=False), 32)
    kept = int(fraction * 16)
    assert frequencies[:kept].equal(plain[:kept]) and not frequencies[kept:].any()
    if "proportional" in ROPE_INIT_FUNCTIONS:
        assert (
            distance(
                frequencies, parameters_of("proportional", 32, partial_rotary_factor=fraction)[0]
            )
            < 1e-6
        )


@pytest.mark.parametrize("factor", [1.5, 4.0, 32.0])
@pytest.mark.parametrize("width", [8, 64])
def test_interpolation_and_ntk_are_transformers(width: int, factor: float) -> None:
    dims, options = (
        Dims(2 * width, 2, 4, 1),
        {"factor": factor, "base": 10_000.0, "reversed": False},
    )
    linear = parameters_of("linear", width, factor=factor)[0]
    assert distance(frequencies_of(InterpolatedRope(dims, **options), width), linear) < 1e-6
    # stretched to this length
    dynamic = parameters_of("dynamic", width, factor=1.0, seen=int(64 * factor))[0]
    assert distance(frequencies_of(NtkRope(dims, **options), width), dynamic) < 1e-6
    slowest = [
        float(frequencies_of(cls(dims, **options), width)[-1])
        for cls in (NtkRope, InterpolatedRope)
    ]
    assert slowest[0] == pytest.approx(slowest[1])


@pytest.mark.parametrize(
    "factor, length, width",
    [(2.0, 4096, 64), (16.0, 4096, 128), (32.0, 2048, 64), (4.0, 64, 8), (4.0, 8, 16)],
)
@pytest.mark.parametrize(
    "betas", [{}, {"beta_fast": 20.0, "beta_slow": 2.0}], ids=["papers", "other"]
)
def test_yarn_is_transformers(
    factor: float, length: int, width: int, betas: dict[str, float]
) -> None:
    yarn = YarnRope(
        Dims(2 * width, 2, 4, 1),
        factor=factor,
        trained_length=length,
        base=10_000.0,
        reversed=False,
        **betas,
    )
    frequencies, attention_factor = parameters_of("yarn", width, length, factor=factor, **betas)
    assert distance(frequencies_of(yarn, width), frequencies) < 1e-6
    q, k, positions = drawn(1, 1, width=width), drawn(1, 2, width=width), torch.tensor([3])
    untempered = torch.einsum("bihd,bjhd->bhij", q, k)
    assert (
        distance(scores(yarn, q, k, positions, positions), untempered * attention_factor**2) < 1e-9
    )


@pytest.mark.parametrize(
    "cls, options", [(InterpolatedRope, {}), (NtkRope, {}), (YarnRope, {"trained_length": 4})]
)
@pytest.mark.parametrize(
    "common",
    [{}, {"reversed": False, "sink_frame": "reference", "base": 10_000.0}],
    ids=["reversed", "reference"],
)
def test_a_factor_of_one_is_the_trained_rotation(
    cls: Any, options: dict[str, Any], common: dict[str, Any]
) -> None:
    extended, plain = cls(DIMS, factor=1.0, **options, **common), Rope(DIMS, **common)
    q, k, q_positions, k_positions = drawn(3, 1), drawn(8, 2), torch.arange(3), torch.arange(-5, 3)
    assert scores(extended, q, k, q_positions, k_positions).equal(
        scores(plain, q, k, q_positions, k_positions)
    )
    pairs = [
        encoding.encode_sink(q, k, q_positions, torch.tensor(-5)) for encoding in (extended, plain)
    ]
    assert all(a.equal(b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("cls", [PartialRope, HighFrequencyRope])
def test_the_whole_fraction_is_the_whole_rotation(cls: Any) -> None:
    x, positions = drawn(5, 1), torch.arange(-2, 3)
    assert (
        cls(DIMS, fraction=1.0)
        .rotate(x, positions)
        .equal(Rope(DIMS, reversed=False).rotate(x, positions))
    )


@pytest.mark.parametrize(
    "build, reason",
    [
        (partial(PartialRope, fraction=0.4), "0.4 of the head width 8 is 3; .* for example 2 / 8"),
        (partial(PartialRope, fraction=0.1), "even number, for example 2 / 8"),
        (partial(HighFrequencyRope, fraction=0.2), "rotates no pair of the head width 8"),
        (partial(YarnRope, beta_fast=1.0), "beta_fast = 1.0 must be greater"),
    ],
)
def test_what_turns_nothing_or_half_a_pair_is_refused(build: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        build(DIMS)
