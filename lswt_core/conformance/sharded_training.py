"""A few updates of a tiny problem in float64, by one process or by several of which each holds a
piece of every parameter: the same numbers come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lswt_core.checkpoint.train_state import optimizer_state
from lswt_core.conformance.loss_checks import make_batch
from lswt_core.conformance.regression import (
    ROWS,
    Regression,
    RegressionObjective,
    optimizer_of,
)
from lswt_core.conformance.subject import Subject
from lswt_core.conformance.tensors import max_difference, random_tokens
from lswt_core.device import Precision
from lswt_core.distributed.sharding import Sharding
from lswt_core.distributed.whole_matrices import WholeMatrices
from lswt_core.distributed.world import World
from lswt_core.interfaces import Batch, Optimizer
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.sharded_tensor import full_tensor, is_sharded, local_tensor
from lswt_core.train.hvp import finite_difference_hvp
from lswt_core.train.step import Step
from lswt_core.train.step_context import StepContext
from lswt_core.train.update import apply_update, hessian_update_is_due

PROCESSES = 2
TEXTS, LENGTH, RATE = 4, 6, 0.05
STEPS = 2  # of a model
UPDATES = 3  # of an optimizer; some only prepare in their first
# float64, in which sums over ranks are taken in another order; what it is relative to is at least 1
TOLERANCE = 1e-9
LOSS = "the loss of step "
STALE = "; parameters were right until then: it reads a copy of one that was taken earlier"
AS_IT_IS = Precision(torch.float32, "nothing is cast: the model is in float64")


def shard(module: nn.Module, blocks: Iterable[nn.Module], world: World) -> None:
    """Cut a module's parameters over the ranks, if there are several."""
    if world.mesh is not None:
        sharding = Sharding(world.mesh)
        for part in (*blocks, module):
            sharding.shard(part)


def first_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What differs first between numbers of the same names, in words; "" if nothing does."""
    for name, tensor in found.items():
        scale = max(1.0, float(expected[name].abs().max())) if tensor.numel() else 1.0
        gap = max_difference(tensor, expected[name])
        if gap > TOLERANCE * scale:
            return f"on two processes {name} is off by {gap:.2g} from that of one"
    return ""


# ---------- components of the model


def training_module(subject: Subject) -> TrainModule:
    """The tiny model with the component, in float64."""
    auxiliary = {}
    if subject.kind == "loss":
        auxiliary = {subject.offer.name: (subject.module(), 0.5)}
    decoder = subject.decoder()
    return TrainModule(decoder, auxiliary)  # type: ignore[arg-type]


def train_model(subject: Subject, world: World) -> dict[str, Tensor]:
    """Losses, gradients and parameters of updates by gradient descent, memory carried along."""
    loss = training_module(subject)
    shard(loss, loss.decoder.blocks, world)
    batch = Batch(random_tokens(TEXTS, LENGTH), random_tokens(TEXTS, LENGTH, 1))
    if subject.kind == "loss":
        batch = make_batch(subject, TEXTS, LENGTH)
    rows = world.rows(TEXTS)
    own = batch.map(lambda tensor: tensor[rows.start : rows.stop])
    context = StepContext(loss, world, AS_IT_IS, seed=0, rows=rows, micro_batch_size=2)
    memory: list[Any] = [None] * (len(rows) // 2)
    found: dict[str, Tensor] = {}
    for number in range(STEPS):
        step = Step(context, own, memory, number)
        step.backward("data")
        memory = step.next_memory
        found[f"{LOSS}{number + 1}"] = world.sum(torch.stack(step.local_totals()))
        found |= descend(loss, number + 1)
    return found


@torch.no_grad()
def descend(model: nn.Module, number: int) -> dict[str, Tensor]:
    """Update parameters by gradient descent; their gradients and what they become."""
    gradients, parameters = {}, {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradients[f"the gradient of {name} in step {number}"] = full_tensor(p.grad)
            local_tensor(p).sub_(local_tensor(p.grad), alpha=RATE)
            p.grad = None
        parameters[f"{name} after step {number}"] = full_tensor(p.detach()).clone()
    return gradients | parameters


# ---------- optimizers


class ShardedRegression(Regression):
    """The regression in float64, with a gain that can be cut; a rank computes some rows' share."""

    forward_methods = ("share",)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(self.gain.detach()[None])
        self.double()

    def share(self, seed: int, rows: range) -> Tensor:
        """What some rows add to the mean squared error."""
        errors = self.errors(seed)
        return errors[rows.start : rows.stop].square().sum() / errors.numel()


class ShardedObjective(RegressionObjective):
    """The objective of a rank: gradients are those of its rows, summed over ranks. A process alone
    adds up the same terms in the same order, so that nothing differs that an optimizer could
    amplify, such as the sign of a sum that is nearly 0.
    """

    model: ShardedRegression

    def __init__(self, model: ShardedRegression, step: int, world: World) -> None:
        super().__init__(model, step)
        ranks = [world] if world.size > 1 else [World(rank, PROCESSES) for rank in range(PROCESSES)]
        self.rows = [rank.rows(ROWS) for rank in ranks]

    def shares(self, seed: int) -> list[Tensor]:
        """The loss of every rank that this process stands for."""
        return [self.model.share(seed, rows) for rows in self.rows]

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """Add the gradient; another batch stands in for sampled labels."""
        with torch.enable_grad():
            for share in self.shares(self.step if labels == "data" else self.step + 1000):
                share.backward()

    def hessian_vector_product(
        self, params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """The Hessian times ``vectors``, by finite differences as on several ranks."""
        with torch.enable_grad():
            return finite_difference_hvp(lambda: self.shares(self.step), params, vectors)


def train_optimizer(subject: Subject, world: World, unit: str) -> dict[str, Tensor]:
    """Parameters and state after every update; on several ranks the optimizer gets pieces, or with
    ``unit`` "matrix" whole matrices.
    """
    model = ShardedRegression()
    shard(model, (), world)
    build = partial(optimizer_of, subject)
    optimizer: Optimizer
    if unit == "matrix" and world.size > 1:
        optimizer = WholeMatrices(model.groups(), build)
    else:
        optimizer = build(model.groups())
    found: dict[str, Tensor] = {}
    for number in range(UPDATES):
        due = hessian_update_is_due(optimizer, number)
        objective = ShardedObjective(model, number, world)
        apply_update(optimizer, objective, list(model.parameters()), update_hessian=due)
        found |= values_of(model, optimizer, f" after update {number + 1}")
    return found


def values_of(model: nn.Module, optimizer: Optimizer, when: str) -> dict[str, Tensor]:
    """Parameters, also as they are evaluated, and the state that this rank knows of."""
    found = {name + when: full_tensor(p.detach()).clone() for name, p in model.named_parameters()}
    with optimizer.eval_parameters():
        for name, p in model.named_parameters():
            found[f"{name} as it is evaluated{when}"] = full_tensor(p.detach()).clone()
    for name, tensor in optimizer_state(optimizer)[0].items():
        found[f"the state {name}{when}"] = full_tensor(tensor).clone()
    return found


PARTIAL_NUMBER = (
    "; it takes float() of a norm or sum of a sharded tensor, which is that of this rank's piece"
    " alone: use global_norm, sum_over_pieces or full_tensor of lswt_core.plugin_api.sharded_tensor"
)
GRADIENT_CALL = (
    "; it calls torch.autograd.grad, which finds nothing where parameters are sharded: call"
    " objective.backward(...) and read p.grad"
)
WHOLE = '; with `unit = "matrix"`, which gathers matrices whole, it is right: declare that'
READS = (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__)


class Witness(TorchFunctionMode):
    """Sees calls that are wrong where parameters are sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.autograd.grad:
            self.seen[GRADIENT_CALL] = None
        if func in READS and is_sharded(args[0]) and has_partial(args[0]):
            self.seen[PARTIAL_NUMBER] = None
        return func(*args, **(kwargs or {}))


def has_partial(tensor: Any) -> bool:
    """Whether a DTensor is a sum (or a norm) whose terms are still on several ranks."""
    return any(placement.is_partial() for placement in tensor.placements)


def compare_optimizer(subject: Subject, world: World) -> str:
    """What differs on several ranks and why, in words; "" if nothing does."""
    unit = subject.component.unit  # type: ignore[attr-defined]
    expected = train_optimizer(subject, World(), unit)
    with Witness() as witness:
        try:
            difference = first_difference(train_optimizer(subject, world, unit), expected)
        except Exception as error:
            error.add_note("".join(witness.seen))
            raise
    if difference and not witness.seen and unit == "element":
        found = train_optimizer(subject, world, "matrix")
        return difference + ("" if first_difference(found, expected) else WHOLE)
    return difference + "".join(witness.seen if difference else ())


def compare_model(subject: Subject, world: World) -> str:
    """What differs on several ranks, in words; "" if nothing does."""
    expected = train_model(subject, World())
    difference = first_difference(train_model(subject, world), expected)
    return difference + (STALE if LOSS + "2" in difference else "")
