"""How long a step of several ranks takes: computing, and what they send each other meanwhile."""

from __future__ import annotations

from typing import NamedTuple

from lswt_core.budget import Budget
from lswt_core.budget.flops import VOCABULARY
from lswt_core.budget.memory import MemoryBudget
from lswt_core.budget.rank_model import FLOAT32_BYTES
from lswt_core.budget.speed import Accelerator, tokens_per_second
from lswt_core.distributed.world import World

DEVICES_PER_MACHINE = 8
NETWORK = 50e9  # bytes per second, direction and device between machines: 400 Gb/s


class Traffic(NamedTuple):
    """Bytes that a device sends in a step, and as many that it receives."""

    shards: float  # within a replica: parameters that are gathered, gradients that are scattered
    replicas: float  # sums of gradients
    host: float  # memories, each way


class StepTime(NamedTuple):
    """Seconds of a step. Communication overlaps with computing: the longest counts."""

    compute: float
    communication: float
    streaming: float  # memories, to the host and back

    @property
    def total(self) -> float:
        """The step's, as estimated."""
        return max(self)


def traffic_of(taken: Budget, world: World, micro: int) -> Traffic:
    """Count what a device sends. Every pass gathers all parameters forward and backward, and
    scatters float32 gradients; replicas sum theirs once.
    """
    assert taken.flops is not None
    memory, ranks, train = taken.memory, taken.memory.ranks, taken.memory.recipe.train
    shards, rows = world.n_shards(train.shard), len(world.rows(train.batch_size))
    replicas = world.size // shards
    gradients = FLOAT32_BYTES * sum(w.numel for w in ranks.trained)
    # of a second-order estimate, as a share of those of the gradient
    curvature = taken.flops.update_curvature / max(taken.flops.train, 1)
    passes = rows / micro * (1 + curvature)
    sent = passes * (2 * sum(map(ranks.in_gathered, ranks.weights)) + gradients)
    if ranks.updates_matrices:
        sent += 3 * gradients  # weights and gradients made whole, and weights handed out
    return Traffic(
        shards=sent * (shards - 1) / shards,
        replicas=2 * gradients / shards * (replicas - 1) / replicas,  # a ring's
        host=rows * memory.parts.get("memories", 0) if memory.streams else 0,
    )


def bandwidths(
    memory: MemoryBudget, world: World, machine: Accelerator, per_machine: int
) -> tuple[float, float]:
    """Bytes per second between the ranks of a replica, and between replicas."""
    shards = world.n_shards(memory.recipe.train.shard)
    return (
        machine.link if shards <= per_machine else NETWORK,
        machine.link if world.size <= per_machine else NETWORK,
    )


def step_time(
    taken: Budget,
    world: World,
    micro: int,
    machine: Accelerator,
    per_machine: int,
    rate: float | None = None,
) -> StepTime:
    """Estimate a step. ``rate``: tokens per second that a process was measured to compute."""
    train, traffic = taken.memory.recipe.train, traffic_of(taken, world, micro)
    within, between = bandwidths(taken.memory, world, machine, per_machine)
    return StepTime(
        compute=train.tokens_per_step / world.size / (rate or compute_rate(taken, world, machine)),
        communication=traffic.shards / within + traffic.replicas / between,
        streaming=traffic.host / machine.host_link,
    )


def compute_rate(taken: Budget, world: World, machine: Accelerator) -> float:
    """Tokens per second of a process that waits for no other."""
    assert taken.flops is not None and taken.flops_per_token is not None
    recipe, work = taken.memory.recipe, taken.flops_per_token
    if taken.memory.recomputes:
        work += sum(taken.flops.forward.values()) - taken.flops.forward[VOCABULARY]
    # it updates its piece once for the tokens that it reads in a step
    updated = taken.total // world.n_shards(recipe.train.shard) * world.size
    return tokens_per_second(recipe, work, updated, machine)
