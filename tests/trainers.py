"""Our trainer over batches and parts given by a test, without recipe, files or console."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from lswt_core.interfaces import Batch, Optimizer, Schedule
from lswt_core.loss import Loss
from lswt_core.parallel import Precision, World
from lswt_core.step import Setting
from lswt_core.train import Plan, Trainer

PLAIN = Precision(torch.float32, "nothing is cast; the models themselves may be float64")


class GivenRows:
    """Batches, one after the other and again from the first."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches, self.cursor = batches, 0

    def segment(self) -> Batch:
        return self.batches[self.cursor % len(self.batches)]

    def advance(self) -> None:
        self.cursor += 1

    def state(self) -> dict[str, int]:
        return {"cursor": self.cursor}

    def restore(self, state: dict[str, int]) -> None:
        self.cursor = state["cursor"]


class Kept:
    """Metrics and warnings, kept in lists."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.warned: list[str] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged.append(values)

    def step(self, *_: Any) -> None:
        pass

    def warn(self, text: str) -> None:
        self.warned.append(text)


def trainer_of(
    loss: Loss,
    optimizer: Optimizer,
    schedule: Schedule,
    batches: Sequence[Batch],
    *,
    micro_rows: int,
    precision: Precision = PLAIN,
    steps: int = 1000,
) -> tuple[Trainer, Kept]:
    """A trainer at the beginning, and what it will log."""
    rows, length = batches[0].inputs.shape
    train = SimpleNamespace(clip=1.0, context=length, tokens_per_step=rows * length, total_steps=steps)
    kept, given = Kept(), GivenRows(batches)
    recipe = SimpleNamespace(train=train, checkpoint=SimpleNamespace(memory="exact"), resolved=dict)
    setting = Setting(loss, World(), precision, seed=0, rows=range(rows), micro_rows=micro_rows)
    parts: Any = (recipe, setting, optimizer, schedule, given, None, {}, None, kept, kept, lambda: False)
    return Trainer(Plan(*parts)), kept
