"""Whether a module is still what it was built as: then its weights may be used without calling it.

Adapters, quantisation and offloading take a module's place, replace its ``forward``, hook into its
calls or exchange its weights. What they add would be passed over in silence.
"""

from __future__ import annotations

from torch import nn


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer computes x @ weight.T + bias and nothing of its own happens at its calls."""
    before, after = layer._forward_pre_hooks, layer._forward_hooks
    hooked = before or after or layer._backward_pre_hooks or layer._backward_hooks
    return is_unwrapped(layer, nn.Linear) and not hooked


def is_plain_table(table: nn.Module) -> bool:
    """Whether a table's rows are those of its weight. Hooks after its calls do not count: they are
    about embedded tokens (noise, as NEFTune adds; gradients for adapters), not about the table.
    """
    return is_unwrapped(table, nn.Embedding) and not table._forward_pre_hooks


def is_unwrapped(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this kind, computes as it does, and holds ordinary weights."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    return all(is_ordinary(parameter) for parameter in module._parameters.values())


def is_ordinary(parameter: nn.Parameter | None) -> bool:
    """Whether a parameter, if there is one, is floating-point numbers: not quantised, nor a
    subclass of tensors that acts for others.
    """
    return parameter is None or (type(parameter) is nn.Parameter and parameter.is_floating_point())
