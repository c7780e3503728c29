"""Feed-forward layers with a name of their own against the papers' formulas, number by number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import distance

from lswt_core import Registry
from lswt_core.interfaces import Dims

SIZES = Dims(d_model=6, n_heads=1, d_ffn=5, n_layers=1)


def gelu(x: float) -> float:
    """By the error function (Hendrycks and Gimpel 2016)."""
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "name, hidden",
    [
        ("geglu", lambda value, gate: value * gelu(gate)),
        ("reglu", lambda value, gate: value * max(gate, 0.0)),
        ("relu2", lambda value: max(value, 0.0) ** 2),
    ],
)
def test_a_layer_is_its_papers_formula(name: str, hidden: Callable[..., float], bias: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    layer: Any = Registry().get("ffn", name)(SIZES, bias=bias).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(2, 3, SIZES.d_model, generator=generator, dtype=torch.float64)
    # [B, T, d_ffn], twice as wide if gated
    first = x @ layer.fc1.weight.T + (layer.fc1.bias if bias else 0)
    inner = [
        [[hidden(*numbers) for numbers in zip(*halves(row), strict=True)] for row in text]
        for text in first.tolist()
    ]
    expected = torch.tensor(inner, dtype=torch.float64) @ layer.fc2.weight.T + (
        layer.fc2.bias if bias else 0
    )
    assert distance(layer(x), expected) < 1e-12


def halves(row: list[float]) -> list[list[float]]:
    """A token's hidden numbers, cut in runs of the layer's width."""
    return [row[start : start + SIZES.d_ffn] for start in range(0, len(row), SIZES.d_ffn)]


@pytest.mark.parametrize(
    "name, generic, activation",
    [("geglu", "glu", "gelu"), ("reglu", "glu", "relu"), ("relu2", "mlp", "relu2")],
)
def test_a_named_layer_is_the_generic_one_with_an_activation(
    name: str, generic: str, activation: str
) -> None:
    registry, x = (
        Registry(),
        torch.randn(2, 3, SIZES.d_model, generator=torch.Generator().manual_seed(1)),
    )
    named: Any = registry.get("ffn", name)(SIZES)
    other: Any = registry.get("ffn", generic)(SIZES, activation=activation)
    other.load_state_dict(named.state_dict())
    assert torch.equal(named(x), other(x))
