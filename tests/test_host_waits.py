"""The host waits for the device once a step. On the meta device, where tensors have no values, a
wait is an error: whatever reads a value raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lswt_core.device import Precision, send
from lswt_core.distributed.world import World
from lswt_core.interfaces import Batch
from lswt_core.model.build import build_model
from lswt_core.model.components import build_optimizer, build_schedule
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.train import finite, gradients, step
from lswt_core.train.evaluate import evaluate
from lswt_core.train.step import Step
from lswt_core.train.step_context import StepContext
from lswt_core.train.trainer import Trainer, TrainerComponents

META = torch.device("meta")
REGISTRY = Registry()
SMALL = (
    "model.d_model=8",
    "model.n_layers=2",
    "model.n_heads=2",
    "embedding.vocab_size=20",
    "embedding.d_vocab=8",
    "memory.xl.length=8",
    "train.seq_len=8",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.steps=100",
    "schedule.warmup_steps=2",
)


class BlockingCopies(TorchFunctionMode):
    """Notes every copy from the host to the meta device that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copies = func in (Tensor.to, Tensor.copy_, torch.tensor, torch.as_tensor)
        if copies and isinstance(result, Tensor) and result.device == META:
            source = args[0] if isinstance(args[0], Tensor) else None
            from_host = source is None or source.device != META
            if from_host and not (kwargs or {}).get("non_blocking"):
                self.seen.append(tuple(result.shape))
        return result


class Rows:
    """Segments of nothing (implements ``data.BatchStream`` and the rows of a held-out set)."""

    def __init__(self, rows: int) -> None:
        self.ids = torch.zeros(rows, 8, dtype=torch.int64)

    def segment(self, ahead: int = 0) -> Batch:
        return Batch(self.ids, self.ids)

    def advance(self) -> None:
        pass


class Logged(list[tuple[int, dict[str, float]]]):
    def log(self, step: int, values: Any) -> None:
        self.append((step, dict(values)))


def trainer_of(*overrides: str, logged: Any = None) -> Trainer:
    """A trainer of the quick start's features on the meta device."""
    recipe = Recipe.load("quickstart", [*SMALL, *overrides], registry=REGISTRY)
    loss = build_model(recipe, REGISTRY, device=META, dtype=torch.float32).loss
    context = StepContext(
        loss, World(device=META), Precision(torch.float32, "test"), 0, range(4), 2
    )
    components = TrainerComponents(
        recipe.train,
        context,
        build_optimizer(recipe, REGISTRY, loss),
        build_schedule(recipe, REGISTRY),
        Rows(4),  # type: ignore[arg-type]
        Logged() if logged is None else logged,
        Console(silent=True),
    )
    return Trainer(components)


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A step's one wait, in ``Trainer.measure``, and the one of an estimate of the curvature."""
    waits: list[int] = []

    def measure(self: Trainer, step: Step, norm: Tensor) -> dict[str, float]:
        waits.append(self.state.step)
        return {"loss": 1.0, "perplexity": 2.7, "accuracy": 0.0, "grad_norm": 5.0}

    monkeypatch.setattr(Trainer, "measure", measure)
    for module in (finite, gradients, step):
        monkeypatch.setattr(module, "require_finite", lambda world, tensors: None)
    monkeypatch.setattr(Step, "tokens", 32)
    monkeypatch.setattr(gradients.SharedForward, "tokens", 32)
    yield waits


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optimizer.shared_forward=true", "optimizer.fraction=0.5"),
        ("optimizer.fraction=0.5",),
        ("optimizer.use=adamw",),
        ("optimizer.use=lion",),
    ],
    ids=" ".join,
)
def test_a_step_waits_once(overrides: tuple[str, ...], measured_once: list[int]) -> None:
    trainer = trainer_of(*overrides)
    with BlockingCopies() as copies:
        for _ in range(3):
            assert trainer.advance()
    assert measured_once == [0, 1, 2] and not copies.seen


def test_an_evaluation_waits_at_its_end_alone() -> None:
    trainer = trainer_of()
    held_out: Any = type("HeldOut", (), {"segments": 3, "rows": Rows(2), "is_idle": False})
    context = trainer.context
    with BlockingCopies() as copies, pytest.raises(NotImplementedError, match="meta"):
        evaluate(context.loss, held_out, context.world, context.precision, lambda: False)
    assert not copies.seen


def test_metrics_are_written_when_statistics_can_be_had_without_a_wait(
    measured_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = Logged()
    trainer = trainer_of(logged=logged)
    for number in range(3):
        trainer.advance()
        assert trainer.unwritten is not None and trainer.unwritten.step == number + 1
        ready = {"optimizer/share": torch.tensor(number / 2)}
        trainer.unwritten = trainer.unwritten._replace(statistics=ready)
        trainer.write_metrics()  # as `measure` does, after the next synchronisation
        trainer.write_metrics()
    assert [(n, values["optimizer/share"]) for n, values in logged] == [(1, 0), (2, 0.5), (3, 1)]


def test_a_batch_of_the_host_is_copied_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class OnHost:
        device = torch.device("cpu")

        def pin_memory(self) -> OnHost:
            done.append("pinned")
            return self

        def to(self, device: torch.device, *, non_blocking: bool) -> OnHost:
            done.append(f"{device} {non_blocking}")
            return self

    send(OnHost(), torch.device("cuda"))  # type: ignore[arg-type]
    send(OnHost(), torch.device("cpu"))  # type: ignore[arg-type]
    assert done == ["pinned", "cuda True", "cpu True"]
