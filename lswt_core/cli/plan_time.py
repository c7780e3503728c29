"""Where a planned run lies, what of it fits, and how long it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lswt_core.errors import UsageError
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry, nearest

if TYPE_CHECKING:
    from lswt_core.budget import Budget
    from lswt_core.budget.memory import MemoryBudget
    from lswt_core.budget.speed import Accelerator
    from lswt_core.budget.step_time import StepTime
    from lswt_core.distributed.world import World

SHORT = 0.5  # seconds a micro-batch may be expected to take for it to be run


class PlannedRun(NamedTuple):
    """A run on machines of one kind."""

    taken: Budget
    registry: Registry
    world: World
    micro: int
    machine: Accelerator
    per_machine: int  # processes

    def step_time(self, rate: float | None = None) -> StepTime:
        """A step, as estimated; ``rate``: tokens per second of a process, as measured."""
        from lswt_core.budget.step_time import step_time

        return step_time(self.taken, self.world, self.micro, self.machine, self.per_machine, rate)

    def seconds_with(self, memory: MemoryBudget, micro: int) -> float:
        """A step's, with other settings."""
        if self.taken.flops is None:
            return 0.0
        taken = self.taken._replace(memory=memory)
        return self._replace(taken=taken, micro=micro).step_time().total


def machine_of(name: str | None, recipe: Recipe, device: Any, memory: int) -> Any:
    """The machine whose rates are used."""
    from lswt_core.budget.speed import ACCELERATORS, measure_machine

    if name is None:
        return measure_machine(recipe, device, memory)
    if name not in ACCELERATORS:
        guess = nearest(name, list(ACCELERATORS))
        raise UsageError(
            f"--on {name}: known are {', '.join(ACCELERATORS)}"
            + (f"; did you mean {guess}?" if guess else "")
        )
    return ACCELERATORS[name]


def placement_of(run: PlannedRun) -> dict[str, Any]:
    """Mesh, host memory and what would make the run fit, as plain data."""
    from lswt_core.budget.fitting import find_remedies

    memory, world = run.taken.memory, run.world
    shards = world.n_shards(memory.recipe.train.shard)
    host = memory.of_host(world)
    fits = sum(memory.needed(world, run.micro).values()) <= run.machine.memory
    remedies = []
    if not fits:
        remedies = find_remedies(memory, world, run.micro, run.machine.memory, run.seconds_with)
    return {
        "mesh": {"replicas": world.size // shards, "shards": shards},
        "host": {
            **host,
            "processes_per_machine": run.per_machine,
            "machine": host["total"] * run.per_machine,
        },
        "fits": fits,
        "remedies": [
            {"overrides": one.overrides, "total": one.total, "seconds_per_step": one.seconds}
            for one in remedies
        ],
    }


def time_of(run: PlannedRun) -> dict[str, Any]:
    """The estimated time of the run. A model whose micro-batch takes this machine about a second or
    less is run for a moment; for others work is divided by rates.
    """
    train, machine = run.taken.memory.recipe.train, run.machine
    rate = measured_rate(run)
    step = run.step_time(rate)
    return {
        "tokens_per_second": train.tokens_per_step / step.total,
        "seconds": train.total_steps * step.total,
        "machine": machine.name,
        "flops_per_second": machine.flops,
        "assumed_efficiency": machine.efficiency,
        "bytes_per_second": machine.bandwidth,
        "source": machine.source if rate is None else "a few micro-batches run just now",
        "communication": communication_of(run, step),
    }


def measured_rate(run: PlannedRun) -> float | None:
    """Tokens per second that this machine computes; None if it is another, or too slow to try."""
    from lswt_core.budget.speed import measured_tokens_per_second
    from lswt_core.budget.step_time import compute_rate

    memory, world, machine = run.taken.memory, run.world, run.machine
    if machine.name != str(world.device):
        return None
    alone = world._replace(size=1)
    fits = sum(memory.needed(alone, run.micro).values()) < machine.memory
    expected = run.micro * memory.recipe.train.seq_len / compute_rate(run.taken, world, machine)
    if not fits or expected >= SHORT:
        return None
    assert run.taken.flops is not None
    recipe = memory.recipe
    return measured_tokens_per_second(recipe, run.registry, world, run.taken.flops, run.micro)


def communication_of(run: PlannedRun, step: StepTime) -> dict[str, Any]:
    """What a device sends in a step, and how long that takes, as plain data."""
    from lswt_core.budget.step_time import bandwidths, traffic_of

    memory, world = run.taken.memory, run.world
    traffic = traffic_of(run.taken, world, run.micro)
    within, between = bandwidths(memory, world, run.machine, run.per_machine)
    return {
        "bytes_within_replicas": traffic.shards,
        "bytes_between_replicas": traffic.replicas,
        "bytes_to_host": traffic.host,
        "seconds_per_step": step.communication,
        "streaming_seconds_per_step": step.streaming,
        "computing_seconds_per_step": step.compute,
        "assumed_bytes_per_second": {
            "within_replicas": within,
            "between_replicas": between,
            "to_host": run.machine.host_link,
        },
    }
