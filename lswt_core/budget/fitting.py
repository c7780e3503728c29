"""Which settings would make a run fit that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import NamedTuple

from lswt_core.budget.memory import MemoryBudget
from lswt_core.distributed.world import World


class Remedy(NamedTuple):
    """Settings with which a run fits."""

    train: dict[str, str | int]  # keys of [train]
    total: int  # bytes of a process
    seconds: float  # of a step, as estimated

    @property
    def overrides(self) -> list[str]:
        """As words of a command line."""
        return [f"train.{key}={value}" for key, value in self.train.items()]


def find_remedies(
    memory: MemoryBudget,
    world: World,
    micro: int,
    available: int,
    seconds: Callable[[MemoryBudget, int], float],
) -> list[Remedy]:
    """The fewest changes after which a process needs at most ``available`` bytes, the fastest
    first; [] if none suffices. ``seconds`` estimates a step with micro-batches of a size.
    """
    found: list[Remedy] = []
    for changes in combined(possible_changes(memory, world)):
        changed = memory.with_train(**changes)
        fitting = changed.largest_fitting(world, micro, available)
        if not fitting:
            continue
        train = changes if fitting == micro else changes | {"micro_batch_size": fitting}
        if any(other.train.keys() <= train.keys() for other in found):
            continue
        total = sum(changed.needed(world, fitting).values())
        found = [other for other in found if not train.keys() <= other.train.keys()]
        found.append(Remedy(train, total, seconds(changed, fitting)))
    return sorted(found, key=lambda remedy: (remedy.seconds, len(remedy.train)))


def possible_changes(memory: MemoryBudget, world: World) -> dict[str, str | int]:
    """Settings that take less memory than those of the recipe."""
    train, changes = memory.recipe.train, dict[str, str | int]()
    if world.n_shards(train.shard) < world.size:
        changes["shard"] = "all"
    if memory.has_host and not memory.streams and memory.parts.get("memories"):
        changes["memory_device"] = "host"
    if not memory.recomputes:
        changes["activation_checkpointing"] = "block"
    return changes


def combined(changes: dict[str, str | int]) -> Iterator[dict[str, str | int]]:
    """Every selection of changes, few before many."""
    for count in range(len(changes) + 1):
        for keys in combinations(changes, count):
            yield {key: changes[key] for key in keys}
