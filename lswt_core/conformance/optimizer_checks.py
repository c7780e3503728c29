"""Checks of optimizers on a small regression."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import SkipTest

import torch

from lswt_core.checkpoint import Store, verify
from lswt_core.checkpoint.train_state import optimizer_state, restore_optimizer
from lswt_core.conformance.check import require, rule
from lswt_core.conformance.regression import (
    Regression,
    RegressionObjective,
    build_optimizer,
    largest_change,
    train,
)
from lswt_core.conformance.subject import Subject
from lswt_core.conformance.tensors import max_difference

FEW_STEPS = 3  # some optimizers only prepare in their first step


@rule(
    "determinism",
    ("optimizer",),
    why=(
        "the same run must give the same bits; the state of global generators differs between"
        " processes"
    ),
    fix="draw from objective.generator(purpose), which depends on seed and step alone",
    after=("interface",),
)
def is_deterministic(subject: Subject) -> None:
    """Two runs give the same bits, whatever the state of the global generator."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Regression()
        train(model, build_optimizer(subject, model), range(12))
        results.append(model.values())
    change = largest_change(*results)
    require(
        change == 0,
        f"the same steps differ by {change:.2g} with another state of the global generator",
    )


@rule(
    "resume",
    ("optimizer",),
    why="a run that is killed and resumed must end with the same bits",
    fix=(
        "keep everything in self.state[parameter] or in the parameter groups, nothing in"
        " attributes: tensors, numbers, strings, and lists, tuples and dicts of those"
    ),
    after=("determinism",),
)
def resumes_bitwise(subject: Subject) -> None:
    """Saved to a checkpoint after 6 of 14 steps and loaded again, it ends with the same bits."""
    uninterrupted = Regression()
    train(uninterrupted, build_optimizer(subject, uninterrupted), range(14))
    model = Regression()
    optimizer = build_optimizer(subject, model)
    train(model, optimizer, range(6))
    with optimizer.eval_parameters(), TemporaryDirectory() as directory:
        tensors, document = optimizer_state(optimizer)
        path = Store(Path(directory) / "checkpoints").save(
            6, {"optimizer": tensors}, {"optimizer": document}
        )
        saved = verify(path)
        tensors, document = saved.tensors("optimizer"), saved.document("optimizer")
        parameters = model.values()
    resumed = Regression()
    for parameter, value in zip(resumed.parameters(), parameters, strict=True):
        parameter.data.copy_(value)
    optimizer = build_optimizer(subject, resumed)
    restore_optimizer(optimizer, tensors, document)
    train(resumed, optimizer, range(6, 14))
    change = largest_change(uninterrupted.values(), resumed.values())
    require(change == 0, f"after saving and loading, parameters end {change:.2g} apart")


@rule(
    "learning rate",
    ("optimizer",),
    why='the schedule sets group["lr"] before every step',
    fix='multiply updates by group["lr"]',
    after=("determinism", "curvature update"),
)
def uses_the_learning_rate(subject: Subject) -> None:
    """With a learning rate of 0 no parameter changes."""
    model = Regression()
    optimizer = build_optimizer(subject, model)
    before = model.values()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(FEW_STEPS))
    change = largest_change(before, model.values())
    require(change == 0, f"with lr = 0 parameters change by {change:.2g}")


@rule(
    "weight decay",
    ("optimizer",),
    why="biases, norms and embeddings do not decay: their group has weight_decay = 0",
    fix='take the decay from the parameter group: group["weight_decay"]',
    after=("learning rate",),
)
def uses_the_weight_decay(subject: Subject) -> None:
    """With zero gradients, parameters of a group without decay stay, and those of one with decay
    shrink if the optimizer has weight decay at all.
    """
    model = Regression()
    optimizer = build_optimizer(subject, model, weight_decay=0.5)
    names = [name for name, _ in model.named_parameters()]
    before = dict(zip(names, model.values(), strict=True))
    for _ in range(FEW_STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    decayed = {name for group in model.groups()[:1] for name in group["names"]}
    for name, parameter in model.named_parameters():
        if name not in decayed:
            change = max_difference(parameter, before[name])
            require(
                change == 0, f"{name}, whose group has no weight decay, changes by {change:.2g}"
            )
        elif subject.has_option("weight_decay"):
            require(
                float(parameter.detach().norm()) < float(before[name].norm()),
                f"{name} does not shrink although weight_decay is 0.5",
            )


@rule(
    "all parameters",
    ("optimizer",),
    why="a parameter that the optimizer leaves out stays at its random initial value",
    fix=(
        "update every parameter of every group that has a gradient: matrices, kernels of three"
        " dimensions, vectors, scalars; those without weight decay too"
    ),
    after=("determinism",),
)
def updates_every_parameter(subject: Subject) -> None:
    """A dozen steps change every parameter, whatever its shape and group."""
    model = Regression()
    optimizer = build_optimizer(subject, model)
    before = model.values()
    train(model, optimizer, range(12))
    named = zip(before, model.named_parameters(), strict=True)
    left = [name for old, (name, parameter) in named if max_difference(old, parameter) == 0]
    require(not left, f"{', '.join(left)} stay as they were")


@rule(
    "descent",
    ("optimizer",),
    why="an optimizer that does not lower the loss of a small problem will not train a model",
    fix="check signs, bias corrections and the scale of updates",
    after=("learning rate", "resume", "all parameters"),
)
def lowers_the_loss(subject: Subject) -> None:
    """Sixty steps lower the loss of a small regression by a third."""
    model = Regression()
    optimizer = build_optimizer(subject, model, weight_decay=0.0)
    before = float(model.loss(5000).detach())
    train(model, optimizer, range(60))
    with optimizer.eval_parameters():
        after = float(model.loss(5000).detach())
    require(after < before * 2 / 3, f"sixty steps take the loss from {before:.3g} to {after:.3g}")


@rule(
    "curvature update",
    ("optimizer",),
    why="the trainer updates the curvature between steps: it must not change parameters",
    fix="in update_curvature read gradients and change only the optimizer's own state",
    after=("determinism",),
)
def curvature_update_changes_state_only(subject: Subject) -> None:
    """A curvature update changes no parameter, and changes the optimizer's state."""
    model = Regression()
    optimizer = build_optimizer(subject, model)
    if not optimizer.hessian_update_interval:
        raise SkipTest("it estimates no curvature (hessian_update_interval is 0)")
    step_without_update = optimizer.hessian_update_interval + 1
    train(model, optimizer, [step_without_update])
    parameters = model.values()
    before = [tensor.clone() for tensor in optimizer_state(optimizer)[0].values()]
    optimizer.update_curvature(RegressionObjective(model, 0))
    change = largest_change(parameters, model.values())
    require(change == 0, f"update_curvature changes parameters by {change:.2g}")
    after = list(optimizer_state(optimizer)[0].values())
    changed = len(before) != len(after) or not all(map(torch.equal, before, after))
    require(changed, "update_curvature changes no state")
