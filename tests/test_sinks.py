"""Sinks without a value, against softmax1 written out and against gpt-oss's attention in
transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import flash_parts
import pytest
import torch
from helpers import DIMS, attention_layer, context_of, distance, stream, tiny, tokens
from lswt_attention import Attention
from lswt_blocked import Blocked
from lswt_eager import Eager
from lswt_flash import Flash
from lswt_flex import Flex
from lswt_registers import Registers
from lswt_rope import Rope
from lswt_sdpa import Sdpa
from lswt_sinks import SinkLogit, SoftmaxOffByOne
from lswt_xl_cache import XlCache, XlHidden
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from lswt_core.interfaces import AttentionBackend, Dims, Memory
from lswt_core.model.build import build_model
from lswt_core.model.initialise import initialise
from lswt_core.model.parameters import build_parameter_groups
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

BACKENDS: dict[str, Callable[[Dims], AttentionBackend]] = {
    "eager": Eager,
    "sdpa": Sdpa,
    "joint": partial(Sdpa, method="joint"),
    "blocked": Blocked,
    "flash": Flash,
}
LOGITS = torch.tensor([1.5, -0.7], dtype=torch.float64)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_sink = pytest.mark.parametrize("sink", [SoftmaxOffByOne, SinkLogit])


@pytest.fixture(autouse=True)
def flash_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the flash-attn package."""
    flash_parts.install(monkeypatch, 2)


def layer_of(
    *sinks: Callable[[Dims], Memory], backend: Callable[[Dims], AttentionBackend] = Eager
) -> Attention:
    """One layer that remembers, in float64, with sink logits that are not 0."""
    memories: dict[str, Callable[[Dims], Memory]] = {"xl": partial(XlCache, length=16)}
    memories |= {f"sink{i}": sink for i, sink in enumerate(sinks)}
    attention: Attention = attention_layer(memories, backend)
    for module in attention.modules():
        if isinstance(module, SinkLogit):
            module.logits = nn.Parameter(LOGITS.clone())
    return attention


def inputs() -> Tensor:
    return torch.randn(
        2, 9, DIMS.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def read(layer: Attention, x: Tensor, positional: Any = None) -> Tensor:
    """A text read in two segments: the output of both."""
    state: Any = {}
    outputs = []
    for part in x.split(5, 1):
        out, state, *_ = layer(part, state, context_of(part.shape[1], positional or Rope(DIMS)))
        outputs.append(out)
    return torch.cat(outputs, 1)


def heads(layer: Attention, x: Tensor) -> list[Tensor]:
    """Rotated queries and keys, and values, [B, H, T, D]."""
    q, k, v = (
        part(x).unflatten(-1, (DIMS.n_heads, -1)) for part in (layer.query, layer.key, layer.value)
    )
    rope, positions = Rope(DIMS), torch.arange(x.shape[1])
    return [
        part.transpose(1, 2) for part in (rope.rotate(q, positions), rope.rotate(k, positions), v)
    ]


def hidden(size: int) -> Tensor:
    """What the causal mask adds, [T, T]."""
    return torch.full((size, size), -torch.inf, dtype=torch.float64).triu(1)


def softmax1(layer: Attention, x: Tensor) -> Tensor:
    """Miller 2023: exp(s) / (1 + sum of exp(s))."""
    q, k, v = heads(layer, x)
    exponentials = (q @ k.mT / DIMS.d_head**0.5 + hidden(x.shape[1])).exp()
    return layer.output(
        (exponentials / (1 + exponentials.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)
    )


def gpt_oss(layer: Attention, x: Tensor) -> Tensor:
    """The attention of gpt-oss, by its authors' code in transformers."""
    (sink,) = (module for module in layer.modules() if isinstance(module, SinkLogit))
    module = SimpleNamespace(num_key_value_groups=1, sinks=sink.logits, training=False)
    out, _ = eager_attention_forward(
        module, *heads(layer, x), hidden(x.shape[1]), DIMS.d_head**-0.5
    )
    return layer.output(out.flatten(2))


def gradients(layer: Attention, out: Tensor) -> list[Tensor]:
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(7))
    return list(torch.autograd.grad((out * weights).sum(), list(layer.parameters())))


DEFINITIONS = {SoftmaxOffByOne: softmax1, SinkLogit: gpt_oss}


@every_backend
@every_sink
def test_it_is_its_definition(backend: str, sink: Any) -> None:
    x = inputs()
    assert (
        distance(
            read(layer_of(sink, backend=BACKENDS[backend]), x), DEFINITIONS[sink](layer_of(sink), x)
        )
        < 1e-12
    )
    layer = layer_of(sink, backend=BACKENDS[backend])
    actual, expected = (
        gradients(layer, layer(x, None, context_of(x.shape[1], Rope(DIMS)))[0]),
        gradients(layer, DEFINITIONS[sink](layer, x)),
    )
    assert len(actual) == 8 + (sink is SinkLogit)
    assert max(distance(a, b) for a, b in zip(actual, expected, strict=True)) < 1e-12
    assert all(gradient.any() for gradient in actual)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@every_sink
@torch.no_grad()
def test_it_is_its_definition_in_one_kernel_without_a_mask(sink: Any) -> None:
    report = read(layer_of(sink, backend=Flex), inputs())
    # its CPU kernel sums in float32
    assert distance(report, DEFINITIONS[sink](layer_of(sink), inputs())) < 1e-5


class Nothing(Registers, Memory):
    """A register whose key and value are zero."""

    def reset_parameters(self) -> None:
        for parameter in (self.keys, self.values):
            nn.init.zeros_(parameter)


def test_one_is_a_register_of_zeros_is_a_logit_of_zero() -> None:
    x, logit = inputs(), layer_of(SinkLogit)
    with torch.no_grad():
        logit.memory["sink0"].logits.zero_()
    expected = read(layer_of(SoftmaxOffByOne), x)
    assert distance(read(layer_of(partial(Nothing, count=1)), x), expected) < 1e-12
    assert distance(read(logit, x), expected) < 1e-12
    assert distance(read(layer_of(), x), expected) > 1e-2


def test_a_logit_far_below_the_scores_is_no_sink() -> None:
    layer = layer_of(SinkLogit)
    with torch.no_grad():
        layer.memory["sink0"].logits.fill_(-60.0)
    assert distance(read(layer, inputs()), read(layer_of(), inputs())) < 1e-12


def test_logits_start_at_zero_and_do_not_decay() -> None:
    recipe = Recipe.from_dict(
        {
            "model": {"d_model": 32, "n_heads": 2, "n_layers": 2},
            "embedding": {"vocab_size": 61, "d_vocab": 24},
            "memory": {"sink": {"use": "sink-logit"}, "xl": {"use": "xl-hidden", "length": 4}},
            "train": {"steps": 1},
        }
    )
    loss = build_model(recipe, Registry(), device=torch.device("cpu"), dtype=torch.float32).loss
    decoder = loss.decoder.to_empty(device="cpu")
    initialise(decoder, seed=0, std=0.02)
    logits = {
        name: parameter
        for name, parameter in decoder.named_parameters()
        if name.endswith("sink.logits")
    }
    assert len(logits) == 2
    assert all(parameter.shape == (2,) and not parameter.any() for parameter in logits.values())
    undecayed = {
        name
        for group in build_parameter_groups(decoder)
        if group["name"] == "undecayed"
        for name in group["names"]
    }
    assert logits.keys() <= undecayed


@every_backend
@pytest.mark.parametrize("keeper", [XlCache, XlHidden])
@pytest.mark.parametrize("order", ["sink-registers-xl", "xl-sink-registers", "registers-xl-sink"])
def test_sinks_stack_in_any_order(backend: str, keeper: Any, order: str) -> None:
    """Outside and inside of what keeps tokens, beside sinks that the layer's own queries meet."""
    parts = {
        "sink": SinkLogit,
        "registers": partial(Registers, count=3),
        "xl": partial(keeper, length=32),
    }
    memories, ids = {name: parts[name] for name in order.split("-")}, tokens(2, 17)
    decoder = tiny(memories=memories, attention=BACKENDS[backend])
    other = tiny(memories=parts)
    with torch.no_grad():
        for model in (decoder, other):
            for block in model.blocks:
                block.attention.memory["sink"].logits.copy_(LOGITS)
    whole = other(ids)[0]
    assert max(distance(stream(decoder, ids, size), whole) for size in (1, 7, 17)) < 1e-12


@every_sink
@pytest.mark.parametrize("reversed", [True, False])
def test_no_frame_of_positions_touches_it(sink: Any, reversed: bool) -> None:
    """Registers in the original's frame depend on where a text is cut; a key that is zero, or met
    by its own query, does not.
    """
    framed = Rope(DIMS, reversed=reversed, sink_frame="reference")
    assert (
        distance(
            read(layer_of(sink), inputs(), framed),
            read(layer_of(sink), inputs(), Rope(DIMS, reversed=reversed)),
        )
        < 1e-12
    )


@every_sink
def test_a_head_may_attend_to_nothing(sink: Any) -> None:
    """Where all values are ones, the output is the weight of all tokens: less than one, the first
    token's too, which sees itself alone.
    """
    layer = layer_of(sink)
    layer.output = nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        layer.value.weight.zero_()
        layer.value.bias.fill_(1)
    out = read(layer, inputs())
    assert ((out > 0) & (out < 1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("logit", [-60.0, 60.0])
def test_large_logits_stay_finite_in_half_precision(dtype: torch.dtype, logit: float) -> None:
    layer = layer_of(SinkLogit, backend=Sdpa)
    with torch.no_grad():
        layer.memory["sink0"].logits.fill_(logit)
    expected, actual = read(layer, inputs()), read(layer.to(dtype), inputs().to(dtype))
    assert actual.isfinite().all() and distance(actual.double(), expected) < 0.1


@every_sink
def test_gradients_are_right(sink: Any) -> None:
    layer = layer_of(sink)
    names, values = zip(*layer.named_parameters(), strict=True)

    def out(x: Tensor, *given: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        return torch.func.functional_call(
            layer,
            dict(zip(names, given, strict=True)),
            (x, None, context_of(len(positions), Rope(DIMS))),
        )[0]

    assert torch.autograd.gradcheck(
        out, (inputs()[:, :4].requires_grad_(), *values), fast_mode=True
    )


@pytest.mark.parametrize("sinks", [[], ["registers"], ["registers", "sink-logit"]])
def test_sinks_with_queries_of_their_own_make_no_head_wider(sinks: list[str]) -> None:
    recipe = Recipe.from_dict(
        {
            "model": {"d_model": 512, "n_heads": 2, "n_layers": 1},
            "embedding": {"vocab_size": 61, "d_vocab": 24},
            "memory": {"xl": {"use": "xl-cache"}} | {name: {"use": name} for name in sinks},
            "attention": {"use": "flash"},
            "train": {"steps": 1},
        }
    )
    built = build_model(recipe, Registry(), device=torch.device("cuda"), dtype=torch.bfloat16)
    assert "flash-attn version 2" in built.notes[1]
