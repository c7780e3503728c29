"""The small problem that optimizers are checked on: a regression, and its objective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lswt_core.conformance.subject import Subject
from lswt_core.conformance.tensors import max_difference, random_normal
from lswt_core.interfaces import Objective, Optimizer
from lswt_core.train.update import apply_update, hessian_update_is_due

ROWS = 16


class Regression(nn.Module):
    """A small regression: two matrices and a stack of two matrices with weight decay; two biases
    and a scalar without.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        self.stack = nn.Parameter(torch.empty(2, 3, 4))
        self.gain = nn.Parameter(torch.empty(()))
        for i, parameter in enumerate(self.parameters()):
            parameter.data = random_normal(*parameter.shape, seed=i, dtype=torch.float32) * 0.5

    def loss(self, seed: int) -> Tensor:
        """The mean squared error on a batch drawn with a seed."""
        return self.errors(seed).square().mean()

    def errors(self, seed: int) -> Tensor:
        """Prediction minus target on a batch drawn with a seed, [16, 2]."""
        x = random_normal(ROWS, 4, seed=seed, dtype=self.gain.dtype)
        target = torch.stack((x.sum(-1), x[:, 0] * x[:, 1]), -1)
        hidden = self.first(x * (1 + self.stack.mean((0, 1)))).tanh()
        errors: Tensor = self.second(hidden) * (1 + self.gain) - target
        return errors

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups as the core builds them."""
        parameters = dict(self.named_parameters())
        weights = [name for name in parameters if name.endswith(("weight", "stack"))]
        others = [name for name in parameters if name not in weights]
        decayed = {
            "name": "decayed",
            "params": [parameters[name] for name in weights],
            "names": weights,
            "matrices": weights,
        }
        undecayed = {
            "name": "undecayed",
            "params": [parameters[name] for name in others],
            "names": others,
            "matrices": [],
            "weight_decay": 0.0,
        }
        return [decayed, undecayed]

    def values(self) -> list[Tensor]:
        """Copies of all parameters."""
        return [parameter.detach().clone() for parameter in self.parameters()]


class RegressionObjective:
    """A step's objective for second-order optimizers: gradients and Hessian-vector products of the
    regression.
    """

    tokens = ROWS

    def __init__(self, model: Regression, step: int) -> None:
        self.model, self.step = model, step

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """Add the gradient; another batch stands in for sampled labels."""
        seed = self.step if labels == "data" else self.step + 1000
        with torch.enable_grad():
            self.model.loss(seed).backward()

    @property
    def sampled(self) -> Objective:
        """Itself, for optimizers that share the forward pass."""
        return self

    def hessian_vector_product(
        self, params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """The Hessian times ``vectors``, by differentiating twice."""
        with torch.enable_grad():
            loss = self.model.loss(self.step)
            gradients = torch.autograd.grad(loss, list(params), create_graph=True)
            return list(torch.autograd.grad(gradients, list(params), list(vectors)))

    def generator(self, purpose: str) -> torch.Generator:
        """A generator that depends on the step."""
        return torch.Generator().manual_seed(self.step)

    def subset(self, fraction: float) -> Objective:
        """The whole batch: it is small."""
        return self


def build_optimizer(subject: Subject, model: Regression, **options: Any) -> Optimizer:
    """The optimizer over the model's parameter groups, with the options that it has; options of
    the subject come first.
    """
    return optimizer_of(subject, model.groups(), **options)


def optimizer_of(subject: Subject, groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    """``build_optimizer`` for parameter groups."""
    supported = {
        name: value for name, value in ({"lr": 0.02} | options).items() if subject.has_option(name)
    }
    subject.build([dict(group) for group in groups])  # skips if a required option is missing
    optimizer: Optimizer = subject.construct(groups, **supported)
    return optimizer


def train(model: Regression, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """Make updates as the trainer does, curvature updates included."""
    parameters = list(model.parameters())
    for step in steps:
        due = hessian_update_is_due(optimizer, step)
        optimizer.zero_grad()
        objective = RegressionObjective(model, step)
        apply_update(optimizer, objective, parameters, update_hessian=due)


def largest_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest absolute difference of two lists of parameters."""
    return max(map(max_difference, before, after))
