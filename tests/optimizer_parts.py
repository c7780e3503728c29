"""What the tests of optimizers share: a small golden problem, and objectives that are told what to
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from helpers import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from lswt_core.interfaces import Optimizer

NAMES = ("w1", "b1", "w2", "b2")
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}  # the manifests'


class Scripted:
    """An objective whose sampled gradients or Hessian-vector products are told beforehand."""

    def __init__(
        self,
        params: Sequence[Tensor] = (),
        sampled: Sequence[Tensor] = (),
        *,
        tokens: int = 1,
        product: Callable[[list[Tensor]], list[Tensor]] | None = None,
        seed: int = 0,
    ) -> None:
        self.params, self.sampled, self.tokens, self.product, self.seed = (
            params,
            sampled,
            tokens,
            product,
            seed,
        )

    def backward(self, labels: str) -> None:
        assert labels == "sampled"
        assert torch.is_grad_enabled()
        for p, gradient in zip(self.params, self.sampled, strict=True):
            p.grad = gradient.to(p.dtype) if p.grad is None else p.grad + gradient

    def hessian_vector_product(
        self, params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        assert torch.is_grad_enabled()
        assert self.product is not None
        return self.product(list(vectors))

    def generator(self, purpose: str) -> torch.Generator:
        assert purpose == "hutchinson"
        return torch.Generator().manual_seed(self.seed)


def load(path: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / path)


def golden_model(
    data: dict[str, Tensor], dtype: torch.dtype, *, decay: float, decay_all: bool = False
) -> tuple[list[Tensor], list[dict]]:
    params = [data[f"init/{name}"].to(dtype).requires_grad_() for name in NAMES]
    decayed = [p for p in params if p.dim() == 2 or decay_all]
    rest = [p for p in params if p.dim() == 1 and not decay_all]
    groups = [{"params": decayed, "weight_decay": decay, "name": "decayed"}]
    return params, groups + (
        [{"params": rest, "weight_decay": 0.0, "name": "rest"}] if rest else []
    )


def feed(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lr: float | None = None,
) -> None:
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.to(p.dtype)
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def at(data: dict[str, Tensor], key: str, index: int) -> list[Tensor]:
    return [data[f"{key}/{name}"][index] for name in NAMES]


def assert_all_close(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), b.to(a.dtype), rtol=0, atol=tolerance)


def scalar(value: float) -> Tensor:
    return torch.tensor([value], requires_grad=True)


def estimate(values: Sequence[Tensor]) -> Scripted:
    """An objective under which Hutchinson's estimate comes out as ``values``: Rademacher probes are
    their own inverses.
    """
    return Scripted(
        product=lambda probes: [u * value for u, value in zip(probes, values, strict=True)]
    )


def small_model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    draws = torch.Generator().manual_seed(2)
    return [
        torch.randn(size, generator=draws).to(device, dtype).requires_grad_()
        for size in ((3, 4), (5,))
    ]


def gradients_of(step: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(100 + step)
    return [torch.randn(size, generator=draws) for size in ((3, 4), (5,))]


def drive(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    steps: range,
    signs: Sequence[Tensor] | None = None,
) -> None:
    flips = signs or [torch.ones_like(p) for p in params]
    for step in steps:
        if optimizer.hessian_update_interval and step % optimizer.hessian_update_interval == 0:
            sampled = [g * s / 50 for g, s in zip(gradients_of(1000 + step), flips, strict=True)]
            diagonal = [g / 10 for g in gradients_of(2000 + step)]
            optimizer.update_curvature(
                Scripted(
                    params,
                    sampled,
                    tokens=64,
                    product=lambda us, d=diagonal: [u * c for u, c in zip(us, d, strict=True)],
                    seed=step,
                )
            )
        feed(optimizer, params, [g * s for g, s in zip(gradients_of(step), flips, strict=True)])
