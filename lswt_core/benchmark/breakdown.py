"""Breakdown of one of our training steps: a block, LM head with cross-entropy, each auxiliary loss
and the update, each timed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.benchmark.ceilings import Ceilings
from lswt_core.benchmark.interleave import time_call, time_per_call
from lswt_core.benchmark.ours import Ours
from lswt_core.budget import Budget
from lswt_core.interfaces import Batch, LayerContext, Output
from lswt_core.model.parameters import trainable_parameters
from lswt_core.train.update import clip_gradients, gradient_norm

REPEATS = 5
CALLS = 10  # between two synchronisations: within a step there are none
UPDATES = 3


class StepPart(NamedTuple):
    """Cost of a part of a step."""

    name: str
    times: int  # per step
    seconds: float  # of one
    flops: float | None = None  # of one, that the mathematics needs; None: not counted
    ceiling: float | None = None  # measured FLOP/s of its matrix products

    @property
    def of_ceiling(self) -> float | None:
        """Share of the ceiling that it reaches."""
        if self.flops is None or self.ceiling is None:
            return None
        return self.flops / self.seconds / self.ceiling


def measure_breakdown(ours: Ours, budget: Budget, ceilings: Ceilings) -> list[StepPart]:
    """Time all parts of a step with full memories."""
    work, loss = ours.work, ours.loss
    flops = head_flops(ours)
    x = torch.randn(work.batch_size, work.seq_len, work.d_model, device=work.device)
    x.requires_grad_()
    labels = torch.randint(work.vocab_size, (work.batch_size, work.seq_len), device=work.device)
    positions = torch.arange(work.seq_len, device=work.device)

    def run_block() -> Tensor:
        state = ours.state[0] if ours.state else {}
        decoder, block = loss.decoder, loss.decoder.first_block
        carry = decoder.initial_carry(labels, x)
        context = LayerContext(positions, None, decoder.positional_of(block), carry)
        output: Tensor = block(block.open_stream(x), state, context).x
        return output

    def run_head() -> Tensor:
        return loss.score(x, labels).total

    block_seconds, head_seconds = time_passes(ours, run_block), time_passes(ours, run_head)
    per_block = block_flops(ours, budget, flops)
    return [
        StepPart("block", work.n_layers, block_seconds, per_block, ceilings.block),
        StepPart("vocabulary and cross-entropy", 1, head_seconds, flops, ceilings.head),
        *auxiliary_parts(ours, x, labels),
        StepPart(f"update by {ours.optimizer.name}", 1, time_update(ours)),
    ]


def auxiliary_parts(ours: Ours, x: Tensor, labels: Tensor) -> Iterator[StepPart]:
    """Time each auxiliary loss on hidden states x [B, T, M]."""
    loss, batch = ours.loss, Batch(labels, labels)

    def run_loss(auxiliary: nn.Module, output: Output) -> Tensor:
        return auxiliary(output, batch).total

    for name, auxiliary in loss.auxiliary.items():
        logits = logsumexp = None
        if "logits" in loss.needs:
            logits = loss.decoder.vocabulary.logits(x).detach().requires_grad_()
        if "logsumexp" in loss.needs:
            logsumexp = x[..., 0].detach().requires_grad_()
        output = Output(x, logits, logsumexp, loss.score if "score" in loss.needs else None)
        seconds = time_passes(ours, partial(run_loss, auxiliary, output))
        yield StepPart(f"loss {name}", 1, seconds)


def block_flops(ours: Ours, budget: Budget, head: float) -> float | None:
    """Return a step's FLOPs in one block: the total without the ``head``'s; None: unknown."""
    if budget.flops is None:
        return None
    return (budget.flops.train * ours.work.tokens - head) / ours.work.n_layers


def head_flops(ours: Ours) -> float:
    """Return a step's FLOPs of output projection, logits and their gradients."""
    work = ours.work
    table, projection = 2.0 * work.d_vocab * work.vocab_size, 2.0 * work.d_vocab * work.d_model
    return work.tokens * ((3 if work.trainable_embedding else 2) * table + 3 * projection)


def time_passes(ours: Ours, function: Callable[[], Tensor]) -> float:
    """Return the seconds of a function's forward and backward pass, the fastest of REPEATS."""

    def run() -> None:
        with ours.work.precision.autocast(ours.work.device):
            out = function()
        out.sum().backward()

    run()
    fastest = min(time_per_call(run, ours.work.device, CALLS) for _ in range(REPEATS))
    ours.loss.zero_grad()
    return fastest


def time_update(ours: Ours) -> float:
    """Return the seconds of gradient clipping and optimizer step, with gradients of zero."""
    ours.steps = 0  # a Hessian estimate is due now, and for the timed updates it is not
    ours.train(*next(ours.work.batches()))
    parameters = trainable_parameters(ours.loss)

    def update() -> None:
        norm = gradient_norm(parameters)
        clip_gradients(parameters, norm, float(norm), 1.0)
        ours.optimizer.step()

    for p in parameters:
        p.grad = torch.zeros_like(p)
    repeats = min(ours.optimizer.hessian_update_interval or UPDATES, UPDATES)
    fastest = min(time_call(update, ours.work.device) for _ in range(repeats))
    ours.optimizer.zero_grad()
    return fastest
