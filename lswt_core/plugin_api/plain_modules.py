"""Whether a module is still the one it was built as, so that its weights may be used without
calling it.

Adapters, quantisation and offloading replace a module or its ``forward``, register hooks, or
exchange its weights; using the weights directly would silently skip what they add.
"""

from __future__ import annotations

from torch import nn


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer computes x @ weight.T + bias and has no hooks."""
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    hooked = before or after or layer._backward_pre_hooks or layer._backward_hooks
    return is_unwrapped(layer, nn.Linear) and not hooked


def is_plain_table(table: nn.Module) -> bool:
    """Whether a table's rows are those of its weight. Forward hooks do not count: they change
    embedded tokens (noise, as NEFTune adds; gradients for adapters), not the table.
    """
    return is_unwrapped(table, nn.Embedding) and not table._forward_pre_hooks


def is_unwrapped(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class, with its ``forward`` and ordinary weights."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    return all(is_ordinary(parameter) for parameter in module._parameters.values())


def is_ordinary(parameter: nn.Parameter | None) -> bool:
    """Whether a parameter is floating point, neither quantised nor a tensor subclass; None is."""
    return parameter is None or (type(parameter) is nn.Parameter and parameter.is_floating_point())
