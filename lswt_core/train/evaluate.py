"""Evaluation: one pass over the validation set in order, memory states carried along from cold."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lswt_core.data.held_out import HeldOut
from lswt_core.device import Precision, send
from lswt_core.distributed.world import World
from lswt_core.errors import DataError
from lswt_core.model.train_module import CROSS_ENTROPY, TrainModule
from lswt_core.plugin_api.pytree import detach_state
from lswt_core.train.step_context import Interrupted


@torch.no_grad()
def evaluate(
    loss: TrainModule,
    held_out: HeldOut,
    world: World,
    precision: Precision,
    stopping: Callable[[], bool],
) -> dict[str, float]:
    """Evaluation metrics over all ranks. Ranks share the rows, and sums are all-reduced, so that
    the result does not depend on the world size; a rank may have no rows. Training's memory states
    and random streams are not touched. Raises Interrupted if a stop is requested.
    """
    device, state = world.device, None
    correct = torch.zeros((), dtype=torch.float64, device=device)
    sums = {  # [2] total and count of every loss but those of layers
        name: torch.zeros(2, dtype=torch.float64, device=device)
        for name in (CROSS_ENTROPY, *loss.auxiliary)
    }
    for _ in range(held_out.segments):
        if stopping():
            raise Interrupted
        batch = held_out.rows.segment().map(lambda tensor: send(tensor, device))
        held_out.rows.advance()
        with precision.autocast(device):
            result = loss(batch, state)
        state = detach_state(result.state)
        if held_out.is_idle:
            continue
        correct += result.correct
        for name, pair in sums.items():
            term = result.terms[name]
            pair += torch.stack((term.total.double(), term.count.double()))
        del result  # frees the tensors that its memory state is a view of
    reduced = {name: world.sum(pair).tolist() for name, pair in sums.items()}
    return evaluation_metrics(reduced, float(world.sum(correct)), held_out)


def evaluation_metrics(
    sums: dict[str, list[float]], correct: float, held_out: HeldOut
) -> dict[str, float]:
    """Metrics by their full names (perplexity, bits per byte, ...), from (total, count) of every
    loss and the number of correct predictions.
    """
    total, count = sums[CROSS_ENTROPY]
    if not count:
        raise DataError(
            "no token of the held-out text that is evaluated is scored\n"
            "  fix: raise evaluate.tokens, or score more of the text"
        )
    loss = total / count
    # of the whole validation set
    tokens_per_byte = len(held_out.tokens.ids) / held_out.tokens.n_bytes
    values = {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/accuracy": correct / count,
        "eval/bits_per_byte": loss / math.log(2) * tokens_per_byte,
        "eval/unigram_perplexity": held_out.unigram_perplexity,
        "eval/tokens": count,
    }
    for name, (total, count) in sums.items():
        if name != CROSS_ENTROPY:
            values[f"eval/{name}"] = total / max(count, 1)
    return values
