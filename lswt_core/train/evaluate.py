"""Evaluation: the held-out text read once, in order, with memory, from a cold start."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lswt_core.data.held_out import HeldOut
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.model.train_module import CROSS_ENTROPY, TrainModule
from lswt_core.plugin_api.pytree import detach_state
from lswt_core.train.step import Interrupted


@torch.no_grad()
def evaluate(
    loss: TrainModule,
    held_out: HeldOut,
    world: World,
    precision: Precision,
    stopping: Callable[[], bool],
) -> dict[str, float]:
    """Loss per token and what follows from it. Rows are shared by the processes; sums are added up
    over all of them, so the result is the same for any number, and a process without a row adds
    nothing. The training run's memories and random streams are not touched.
    """
    state, correct = None, torch.zeros((), dtype=torch.float64, device=world.device)
    totals = {
        name: torch.zeros(2, dtype=torch.float64, device=world.device)
        for name in (CROSS_ENTROPY, *loss.auxiliary)
    }
    for _ in range(held_out.segments if held_out.rows.rows else 0):
        if stopping():
            raise Interrupted
        batch = held_out.rows.segment().map(lambda tensor: tensor.to(world.device))
        held_out.rows.advance()
        with precision.autocast(world.device):
            result = loss(batch, state)
        state = detach_state(result.state)
        correct += result.correct
        for name, term in result.terms.items():
            totals[name] += torch.stack((term.total.double(), term.count.double()))
        del result  # and with it what its state is a view of
    sums = {name: world.sum(pair).tolist() for name, pair in totals.items()}
    return metrics(sums, float(world.sum(correct)), held_out)


def metrics(sums: dict[str, list[float]], correct: float, held_out: HeldOut) -> dict[str, float]:
    """Means over tokens (over pairs, for losses that count pairs), under their full names."""
    nll, count = sums[CROSS_ENTROPY]
    mean = nll / count
    # of the whole held-out text
    tokens_per_byte = len(held_out.tokens.ids) / held_out.tokens.n_bytes
    found = {
        "eval/loss": mean,
        "eval/perplexity": math.exp(min(mean, 700.0)),
        "eval/accuracy": correct / count,
        "eval/bits_per_byte": mean / math.log(2) * tokens_per_byte,
        "eval/unigram_perplexity": held_out.unigram_perplexity,
        "eval/tokens": count,
    }
    return found | {
        f"eval/{name}": total / max(number, 1)
        for name, (total, number) in sums.items()
        if name != CROSS_ENTROPY
    }
