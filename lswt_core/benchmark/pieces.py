"""Where a step of ours goes: a block, the vocabulary with its loss, each auxiliary loss and the
update, each measured by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lswt_core.benchmark.ceilings import Ceilings
from lswt_core.benchmark.interleave import seconds, seconds_of_one
from lswt_core.benchmark.ours import Ours
from lswt_core.budget import Budget
from lswt_core.interfaces import Batch, Output
from lswt_core.model.parameters import trainable
from lswt_core.train.update import clip_gradients, gradient_norm

REPEATS = 5
CALLS = 10  # between two waits for a device: a step's pieces follow each other without one
UPDATES = 3


class Piece(NamedTuple):
    """A part of a step."""

    name: str
    times: int  # how often a step does it
    seconds: float  # of once
    flops: float | None = None  # that it must do
    ceiling: float | None = None  # FLOP/s that its matrix products could reach

    @property
    def of_ceiling(self) -> float | None:
        """The share of the ceiling it reaches."""
        return (
            None
            if self.flops is None or self.ceiling is None
            else self.flops / self.seconds / self.ceiling
        )


def measure(ours: Ours, budget: Budget, ceilings: Ceilings) -> list[Piece]:
    """All pieces of a warm step."""
    work, loss = ours.work, ours.loss
    head = head_flops(ours, budget)
    states = torch.randn(work.rows, work.seq_len, work.d_model, device=work.device)
    labels = torch.randint(work.vocab_size, (work.rows, work.seq_len), device=work.device)
    batch = Batch(labels, labels)

    def block() -> Tensor:
        state = ours.state[0] if ours.state else {}
        return loss.decoder.blocks[0](x, at, state, None, loss.decoder.positional)[0]

    x, at = states.clone().requires_grad_(), torch.arange(work.seq_len, device=work.device)
    pieces = [
        Piece(
            "block",
            work.n_layers,
            timed(ours, block),
            block_flops(ours, budget, head),
            ceilings.block,
        ),
        Piece(
            "vocabulary and cross-entropy",
            1,
            timed(ours, lambda: loss.score(x, labels).total),
            head,
            ceilings.head,
        ),
    ]
    for name, auxiliary in loss.auxiliary.items():
        logits = (
            loss.decoder.vocabulary.logits(x).detach().requires_grad_()
            if "logits" in loss.needs
            else None
        )
        out = Output(
            x, logits, x[..., 0].detach().requires_grad_() if "logsumexp" in loss.needs else None
        )
        pieces.append(
            Piece(
                f"loss {name}",
                1,
                timed(ours, lambda term=auxiliary, out=out: term(out, batch).total),
            )
        )  # type: ignore[misc]
    return [*pieces, Piece(f"update by {ours.optimizer.name}", 1, update(ours))]


def block_flops(ours: Ours, budget: Budget, head: float) -> float | None:
    """FLOPs of a step in one block: what the ``head`` leaves; None: unknown."""
    return (
        None
        if budget.flops is None
        else (budget.flops.train * ours.work.tokens - head) / ours.work.n_layers
    )


def head_flops(ours: Ours, budget: Budget) -> float:
    """FLOPs of a step's output projection, logits and their gradients."""
    work = ours.work
    table, projection = 2.0 * work.d_vocab * work.vocab_size, 2.0 * work.d_vocab * work.d_model
    return work.tokens * ((3 if work.trained_table else 2) * table + 3 * projection)


def timed(ours: Ours, function: Callable[[], Tensor]) -> float:
    """Seconds of something's forward and backward pass; the best of some."""

    def both() -> None:
        with ours.work.precision.autocast(ours.work.device):
            out = function()
        out.sum().backward()

    both()
    best = min(seconds_of_one(both, ours.work.device, CALLS) for _ in range(REPEATS))
    ours.loss.zero_grad()
    return best


def update(ours: Ours) -> float:
    """Seconds of clipping and of the optimizer's step, on gradients of zero."""
    ours.steps = 0  # a curvature is due: the updates that follow need not ask for one
    ours.train(*next(ours.work.text()))
    parameters = trainable(ours.loss)

    def step() -> None:
        norm = gradient_norm(parameters)
        clip_gradients(parameters, norm, float(norm), 1.0)
        ours.optimizer.step()

    for p in parameters:
        p.grad = torch.zeros_like(p)
    best = min(
        seconds(step, ours.work.device)
        for _ in range(min(ours.optimizer.hessian_update_interval or UPDATES, UPDATES))
    )
    ours.optimizer.zero_grad()
    return best
