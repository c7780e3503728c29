"""Mistakes with sharded parameters that raise nothing and give other numbers. Each is planted where
the core takes care not to make it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from lswt_swiglu import SwiGlu
from torch import Tensor, nn

from lswt_core.distributed import sharding
from lswt_core.model import build
from lswt_core.train import gradients, hvp, step, update


class Mistake(NamedTuple):
    """A mistake, and the case whose numbers it changes."""

    case: str
    plant: Callable[[pytest.MonkeyPatch], None]


def differentiate_sampled(patch: pytest.MonkeyPatch) -> None:
    """torch.autograd.grad towards sharded parameters, for sampled gradients."""

    def accumulate(self: gradients.SampledGradient, loss: Tensor) -> None:
        found = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        for i, gradient in enumerate(found):
            if gradient is not None:
                before = self.gradients[i]
                self.gradients[i] = gradient if before is None else before + gradient

    patch.setattr(gradients.SampledGradient, "accumulate", accumulate)


def differentiate_products(patch: pytest.MonkeyPatch) -> None:
    """torch.autograd.grad towards sharded parameters, for Hessian-vector products."""

    def sum_gradients(losses: hvp.MicroBatchLosses, params: Sequence[Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in params]
        for loss in losses():
            found = torch.autograd.grad(loss, list(params), materialize_grads=True)
            total = [one + other for one, other in zip(total, found, strict=True)]
        return total

    patch.setattr(hvp, "sum_gradients", sum_gradients)


def keep_gathered(patch: pytest.MonkeyPatch) -> None:
    """The outermost module does not free what an evaluation gathered."""
    from torch.distributed import fsdp

    patch.setattr(fsdp, "fully_shard", partial(reshard_but_the_root, fsdp.fully_shard))


def reshard_but_the_root(fully_shard: Any, module: nn.Module, **options: Any) -> None:
    """``fully_shard``, where the root alone keeps its parameters after its forward pass."""
    options["reshard_after_forward"] = not hasattr(module, "decoder")
    fully_shard(module, **options)


def read_partial_norm(patch: pytest.MonkeyPatch) -> None:
    """The number of a DTensor's norm, which is that of a rank's own piece."""

    def gradient_norm(params: Iterable[Tensor]) -> Tensor:
        norms = [float(p.grad.norm()) for p in params if p.grad is not None]
        return torch.tensor(norms, dtype=torch.float64).norm()

    patch.setattr(update, "gradient_norm", gradient_norm)


def keep_a_reference(patch: pytest.MonkeyPatch) -> None:
    """Layers compute with the weight that they had before it was cut."""
    give_values = build.give_values

    def keep(loss: nn.Module, part: nn.Module, *rest: Any, **options: Any) -> None:
        give_values(loss, part, *rest, **options)  # type: ignore[arg-type]
        for module in part.modules():
            if isinstance(module, SwiGlu) and not hasattr(module, "kept"):
                module.kept = [module.fc1.weight]

    def forward(self: Any, x: Tensor) -> Tensor:
        value, gate = nn.functional.linear(x, self.kept[0], self.fc1.bias).chunk(2, -1)
        return self.fc2(value * nn.functional.silu(gate))  # type: ignore[no-any-return]

    patch.setattr(build, "give_values", keep)
    patch.setattr(SwiGlu, "forward", forward)
    patch.setattr(sharding, "check_shardable", lambda module: None)


def abandon(started: step.Step) -> None:
    """Leave a step after its first micro-batch, which is not summed over replicas yet."""
    started.backward_micro_batch(0)


MISTAKES = {
    "sampled by autograd.grad": Mistake("curvature", differentiate_sampled),
    "products by autograd.grad": Mistake("curvature", differentiate_products),
    "root keeps what it gathered": Mistake("plain", keep_gathered),
    "float of a partial norm": Mistake("plain", read_partial_norm),
    "abandoned accumulation": Mistake("abandoned", lambda patch: None),
    "kept reference": Mistake("plain", keep_a_reference),
}


def compile_without_code(patch: pytest.MonkeyPatch) -> None:
    """No mistake: blocks become graphs, for which no code is generated."""
    compile_module = nn.Module.compile

    def compile(self: nn.Module, **options: Any) -> None:
        options.pop("options", None)
        compile_module(self, **{**options, "backend": "eager"})

    patch.setattr(nn.Module, "compile", compile)


def count_calls(
    calls: Counter[str], names: Mapping[str, Sequence[str]], patch: pytest.MonkeyPatch
) -> None:
    """No mistake: calls of torch.distributed are counted by their kind."""

    def counting(kind: str, collective: Callable[..., Any], *given: Any, **options: Any) -> Any:
        calls[kind] += 1
        return collective(*given, **options)

    for kind, known in names.items():
        for name in known:
            if hasattr(dist, name):
                patch.setattr(dist, name, partial(counting, kind, getattr(dist, name)))
