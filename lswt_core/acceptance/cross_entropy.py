"""Checks of cross-entropy implementations on a device, against the dense formula in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.acceptance.attention import beyond, largest_share, relative_error
from lswt_core.acceptance.item import Unmet, require
from lswt_core.device import pick_device
from lswt_core.interfaces import IGNORE, CrossEntropy, Unsupported
from lswt_core.plugin_api.cross_entropy import dense_cross_entropy
from lswt_core.registry import Registry

# As of attention: twice the rounding of the formula in the same dtype, and a few units.
FACTOR, UNITS = 2.0, 2.0
SHAPES = {"cpu": (2, 48, 32, 512), "cuda": (2, 1200, 768, 50272)}  # B, T, d_vocab, V


def check_cross_entropy(use: str, dtype: str, compiled: bool) -> dict[str, Any]:
    """Compare loss and gradients; returns errors relative to the norm, with what is allowed.
    ``compiled``: as where blocks are.
    """
    device = pick_device(0)
    component = build(use, device)
    if compiled:
        component.compile_kernels()
    inputs = make_inputs(device, getattr(torch, dtype))
    exact = run(dense_cross_entropy, {k: v.double() for k, v in inputs.items()}, device)
    plain = run(dense_cross_entropy, inputs, device)
    found = run(component, inputs, device)
    units = UNITS * torch.finfo(getattr(torch, dtype)).eps
    errors = {
        key: (
            relative_error(found[key], exact[key]),
            FACTOR * relative_error(plain[key], exact[key]) + units,
        )
        for key in exact
    }
    wrong = list(beyond(errors))
    if wrong:
        raise Unmet("; ".join(wrong))
    pairs = {key: list(pair) for key, pair in errors.items()}
    return {"of_allowed": largest_share(errors), **pairs}


def build(use: str, device: torch.device) -> CrossEntropy:
    """A cross-entropy; raises SkipTest if it does not run on the device."""
    component: CrossEntropy = Registry().get("cross_entropy", use)()
    try:
        component.require(device.type)
    except Unsupported as reason:
        raise SkipTest(str(reason)) from reason
    return component


def make_inputs(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """States [B, T, d_vocab] and a table [V, d_vocab]."""
    rows, length, width, vocab = SHAPES.get(device.type, SHAPES["cuda"])
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, length, width, generator=generator)
    table = torch.randn(vocab, width, generator=generator) * width**-0.5
    return {"z": z.to(device, dtype), "table": table.to(device, dtype)}


def run(function: Any, inputs: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The mean loss and its gradients. A fifth of the labels is left out."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    z, table = leaves["z"], leaves["table"]
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(len(table), z.shape[:2], generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    out = function(z, table, labels.to(device))
    require(out.total.isfinite(), "the loss is not finite")
    gradients = torch.autograd.grad(out.total / labels.numel(), [z, table])
    return {
        "loss": out.total.detach(),
        "gradient of the states": gradients[0],
        "gradient of the table": gradients[1],
    }
