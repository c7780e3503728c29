"""Wirings of a layer against the papers' formulas, and what holds for all of them: segments,
documents, activation checkpointing, selectors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import DIMS, build, context_of, distance, stream, tiny, tokens
from lswt_blocks import HyperConnections, LayerScale, Parallel, PostNorm, Sandwich
from lswt_moe import MixtureOfExperts
from lswt_norms import RmsNorm
from lswt_pre_norm import PreNorm
from lswt_token_shift import TokenShift
from lswt_xl_cache import XlCache
from torch import Tensor
from torch.nn.functional import layer_norm

from lswt_core.errors import Incompatible
from lswt_core.interfaces import Unsupported
from lswt_core.model.build import build_model
from lswt_core.model.decoder import Decoder
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

BLOCKS: dict[str, Any] = {
    "sandwich": Sandwich,
    "parallel": Parallel,
    "parallel-two-norms": partial(Parallel, shared_norm=False),
    "layer-scale": LayerScale,
    "post-norm": PostNorm,
    "hyper-connections": HyperConnections,
    "hyper-static": partial(HyperConnections, streams=2, dynamic=False),
}
every_block = pytest.mark.parametrize("name", BLOCKS)


def shaken(decoder: Decoder) -> Decoder:
    """The decoder with parameters away from values that hide a mistake, such as gains of one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(noise, alpha=0.1)
    return decoder


def norm(layer: Any, x: Tensor) -> Tensor:
    """LayerNorm, by torch."""
    return layer_norm(x, x.shape[-1:], layer.norm.weight, layer.norm.bias)


def ffn(layer: Any, x: Tensor) -> Tensor:
    """SwiGLU, from its weights."""
    hidden = x @ layer.fc1.weight.T + layer.fc1.bias
    value, gate = hidden[..., : DIMS.d_ffn], hidden[..., DIMS.d_ffn :]
    return (value * gate * gate.sigmoid()) @ layer.fc2.weight.T + layer.fc2.bias


def sandwich(b: Any, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + norm(b.attention_post_norm, attend(norm(b.attention_norm, x)))
    return x + norm(b.ffn_post_norm, ffn(b.ffn, norm(b.ffn_norm, x)))


def parallel(b: Any, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    second = b.attention_norm if b.ffn_norm is None else b.ffn_norm
    return x + attend(norm(b.attention_norm, x)) + ffn(b.ffn, norm(second, x))


def layer_scale(b: Any, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    x = x + attend(norm(b.attention_norm, x)) @ b.attention_scale.diag()
    return x + ffn(b.ffn, norm(b.ffn_norm, x)) @ b.ffn_scale.diag()


def post_norm(b: Any, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    x = norm(b.attention_norm, x * 4**0.25 + attend(x))  # of two layers
    return norm(b.ffn_norm, x * 4**0.25 + ffn(b.ffn, x))


def hyper(b: Any, h: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """The code in the paper's appendix, sublayer by sublayer: h [B, T, n, M]."""
    sublayers = (
        (b.attention_connection, lambda x: attend(norm(b.attention_norm, x))),
        (b.ffn_connection, lambda x: ffn(b.ffn, norm(b.ffn_norm, x))),
    )
    for c, sublayer in sublayers:
        alpha, beta = c.static_alpha[None, None], c.static_beta[None, None]
        if c.norm is not None:
            normed = norm(c.norm, h)
            alpha = alpha + torch.tanh(normed @ c.dynamic_alpha) * c.dynamic_alpha_scale
            beta = beta + torch.tanh(normed @ c.dynamic_beta) * c.dynamic_beta_scale
        mixed = alpha.transpose(-1, -2) @ h
        depth = torch.einsum("blh,bln->blnh", sublayer(mixed[..., 0, :]), beta.expand(h.shape[:-1]))
        h = depth + mixed[..., 1:, :]
    return h


FORMULAS = {
    "sandwich": sandwich,
    "parallel": parallel,
    "parallel-two-norms": parallel,
    "layer-scale": layer_scale,
    "post-norm": post_norm,
    "hyper-connections": hyper,
    "hyper-static": hyper,
}


@every_block
def test_a_block_is_its_papers_formula(name: str) -> None:
    decoder = shaken(tiny(block=BLOCKS[name]))
    block: Any = decoder.blocks[1]
    x = torch.randn(2, 5, DIMS.d_model, generator=torch.Generator().manual_seed(0)).double()
    x = block.open_stream(x)
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    context = context_of(5, decoder.positional)

    def attend(normed: Tensor) -> Tensor:
        mixed: Tensor = block.attention(normed, None, context).x
        return mixed

    assert distance(block(x, None, context).x, FORMULAS[name](block, x, attend)) < 1e-12


@every_block
def test_segments_documents_and_recomputation_change_nothing(name: str) -> None:
    parts = {"memories": {"xl": partial(XlCache, length=16)}, "ffn": TokenShift}
    decoder = shaken(tiny(block=BLOCKS[name], **parts))
    ids = tokens(2, 10)
    whole = decoder(ids)[0]
    for size in (1, 5):
        assert distance(stream(decoder, ids, size), whole) < 1e-12
    borders = torch.tensor([[0] * 4 + [4] * 6, [0] * 7 + [7] * 3])
    packed = stream(decoder, ids, 5, borders)
    for row, start in enumerate((4, 7)):
        alone = decoder(ids[row : row + 1, start:])[0]
        assert distance(packed[row : row + 1, start:], alone) < 1e-12
    slopes = []
    for again in (False, True):
        decoder.activation_checkpointing = again
        slopes.append(
            torch.autograd.grad(decoder(ids)[0].square().sum(), [*decoder.blocks.parameters()])
        )
    assert all(torch.equal(*pair) for pair in zip(*slopes, strict=True))
    visited: list[Tensor] = []
    decoder.trunk(decoder.vocabulary.embed(ids), visit=visited.append)
    assert [list(x.shape) for x in visited] == [[2, 10, DIMS.d_model]] * (DIMS.n_layers + 2)


# ---------- what a wiring is where its own part does nothing


@pytest.mark.parametrize(
    "block",
    [
        partial(LayerScale, init=1.0),
        *(partial(HyperConnections, streams=n) for n in (1, 2, 3, 4)),
        partial(HyperConnections, dynamic=False),
    ],
)
def test_it_starts_as_pre_norm(block: Any) -> None:
    ids = tokens(2, 7)
    assert distance(tiny(block=block)(ids)[0], tiny(block=PreNorm)(ids)[0]) < 1e-12


def test_streams_part_once_they_are_mixed_differently() -> None:
    decoder = tiny(block=HyperConnections)
    static = decoder.blocks[0].attention_connection.static_beta  # type: ignore[union-attr]
    before = decoder(tokens(1, 4))[0]
    with torch.no_grad():
        static[2] = 3.0
    assert distance(decoder(tokens(1, 4))[0], before) > 1e-3


def test_deep_norm_starts_with_small_values_outputs_and_feed_forward_layers() -> None:
    ours, plain = (dict(tiny(block=block).named_parameters()) for block in (PostNorm, PreNorm))
    assert ours.keys() == plain.keys()
    beta = 16**-0.25  # (8 N)^(-1/4) of two layers
    for name, parameter in ours.items():
        is_scaled = name.endswith((".value.weight", "attention.output.weight", "fc1.weight"))
        is_scaled |= name.endswith("fc2.weight")
        assert distance(parameter, plain[name] * (beta if is_scaled else 1)) < 1e-15
    block: Any = tiny(block=PostNorm, dims=DIMS._replace(n_layers=3)).blocks[0]
    assert (block.alpha, block.beta) == (6**0.25, 24**-0.25)
    plain_block: Any = build(block=partial(PostNorm, alpha=1.0, beta=1.0)).blocks[0]
    assert (plain_block.alpha, plain_block.beta) == (1, 1)


def test_deep_norm_scales_experts_too() -> None:
    parts = {"ffn": partial(MixtureOfExperts, n_experts=3), "norm": RmsNorm}
    ours, plain = (
        dict(tiny(block=block, **parts).named_parameters()) for block in (PostNorm, PreNorm)
    )
    name = "blocks.1.ffn.experts.fc2"
    assert distance(ours[name], plain[name] * 16**-0.25) < 1e-15 and plain[name].std() > 0.3


class NoProjections(torch.nn.Module):
    """A mixer without projections."""

    name = "none-such"

    def __init__(self, dims: Any, parts: Any) -> None:
        super().__init__()


def test_deep_norm_refuses_a_mixer_whose_projections_it_does_not_find() -> None:
    with pytest.raises(Unsupported, match=r"'none-such' has none.*block\.beta = 1"):
        build(block=PostNorm, mixer=NoProjections)
    build(block=partial(PostNorm, beta=1.0), mixer=NoProjections)


# ---------- single layers


def assembled(**tables: Any) -> Any:
    model = {"d_model": 16, "n_layers": 4, "n_heads": 2}
    embedding = {"vocab_size": 29, "d_vocab": 8}
    recipe = Recipe.from_dict(
        {"model": model, "embedding": embedding, "train": {"steps": 1}, **tables}
    )
    return build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float32)


def test_blocks_of_one_stream_may_differ_layer_by_layer() -> None:
    names = ("sandwich", "parallel", "layer-scale", "post-norm")
    layers = {str(i): {"block": {"use": name}} for i, name in enumerate(names)}
    assert [b.name for b in assembled(layers=layers).loss.decoder.blocks] == list(names)


@pytest.mark.parametrize(
    "tables",
    [
        {"layers": {"2": {"block": {"use": "hyper-connections"}}}},
        {
            "block": {"use": "hyper-connections"},
            "layers": {"2": {"block": {"use": "hyper-connections", "streams": 2}}},
        },
    ],
)
def test_streams_of_another_shape_are_refused(tables: Any) -> None:
    with pytest.raises(Incompatible, match=r"'hyper-connections' of layer 2 has another residual"):
        assembled(**tables)
