"""Training runs of the original authors' trainer, step by step
(tests/golden/lswt_train/manifest.json says how they were made).

The model has its original weights; trainer, step, losses, optimizers, schedule and clipping are
ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from helpers import GOLDEN
from original import rebuilt, translate
from safetensors.torch import load_file
from test_golden_model import loss_of
from torch import Tensor

from lswt_core import Registry
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.hf.original_weights import convert_layout
from lswt_core.interfaces import Batch, Horizon, Schedule
from lswt_core.model.parameters import build_parameter_groups
from lswt_core.model.train_module import CROSS_ENTROPY, TrainModule
from lswt_core.recipe.schema import Train
from lswt_core.reporting.console import Console
from lswt_core.train.step import Step
from lswt_core.train.step_context import StepContext
from lswt_core.train.trainer import Trainer, TrainerComponents

CASE = "rev_reg5"
MANIFEST = json.loads((GOLDEN / "lswt_train" / "manifest.json").read_text())[
    "trajectory.safetensors"
]
DATA = load_file(GOLDEN / "lswt_train" / "trajectory.safetensors")
STEPS, ROWS, LENGTH = DATA["xs"].shape
ADAPTIVE = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.1}
RUNS: dict[str, tuple[str, dict[str, float]]] = {
    "adamw_simctg": ("adamw", ADAPTIVE),
    "laprop_mle": ("laprop", ADAPTIVE),
    "minato_mle": ("sign-momentum", {"beta": 0.9, "weight_decay": 0.2}),
}


class GoldenBatches:
    """The golden batches, as a trainer reads them (implements ``data.BatchStream``)."""

    def __init__(self) -> None:
        self.position = 0

    def segment(self, ahead: int = 0) -> Batch:
        assert ahead == 0
        return Batch(DATA["xs"][self.position], DATA["ys"][self.position])

    def advance(self) -> None:
        self.position += 1


class MetricsLog(list[dict[str, float]]):
    """Logged metrics, kept in a list."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.append(dict(values))


class ShiftedSchedule(Schedule):
    """A schedule that is some steps ahead."""

    name = "shifted"

    def __init__(self, inner: Schedule, skip: int) -> None:
        super().__init__(inner.horizon)
        self.inner, self.skip = inner, skip

    def factor(self, step: int) -> float:
        return self.inner.factor(step + self.skip)


class Watched(Trainer):
    """A trainer that records the cross-entropy of every micro-batch."""

    def __init__(self, components: TrainerComponents) -> None:
        super().__init__(components)
        self.mle: list[Tensor] = []

    def commit(self, step: Step, batch: Batch) -> None:
        terms = [result.terms[CROSS_ENTROPY] for result in step.results]
        self.mle.append(torch.stack([(term.total / term.count).detach() for term in terms]))
        super().commit(step, batch)


def trained(
    run: str, *, clip: float = 1.0, skip: int = 0, **changes: float
) -> tuple[Watched, TrainModule, list[dict[str, float]]]:
    """A golden run, repeated by our trainer; or nearly, with another bound or option or a schedule
    that is ``skip`` steps ahead.
    """
    loss = loss_of(CASE, torch.float32, "eager", length=8)
    if not run.endswith("simctg"):
        loss = TrainModule(loss.decoder, {})
    registry, (name, options) = Registry(), RUNS[run]
    metrics = MetricsLog()
    schedule = registry.get("schedule", "cosine")(
        Horizon(8, ROWS * LENGTH), warmup_steps=3, floor=0.1
    )
    context = StepContext(
        loss,
        World(),
        Precision(torch.float32, "as the original"),
        seed=0,
        rows=range(ROWS),
        micro_batch_size=2,
    )
    optimizer = registry.get("optimizer", name)(
        build_parameter_groups(loss), **({"lr": 1e-2} | options | changes)
    )
    trainer = Watched(
        TrainerComponents(
            Train(batch_size=ROWS, seq_len=LENGTH, steps=STEPS, grad_clip=clip),
            context,
            optimizer,
            ShiftedSchedule(schedule, skip),
            GoldenBatches(),
            metrics,
            Console(silent=True),
        )
    )
    for _ in range(STEPS):
        trainer.advance()
    return trainer, loss, metrics


class Errors(NamedTuple):
    """How far a run is from the original's."""

    mle: Tensor  # [steps] the worse of both micro-batches
    grad_norm: Tensor  # [steps]
    lr: Tensor  # [steps]
    final: Tensor  # every coordinate of some parameters after the last step
    norms: Tensor  # [parameters] after the last step


def errors(run: str, **changes: Any) -> Errors:
    """The distance of a repeated run."""
    trainer, loss, metrics = trained(run, **changes)
    golden = {name.removeprefix(f"{run}/"): tensor for name, tensor in DATA.items()}
    parameters: dict[str, Any] = dict(loss.decoder.named_parameters())
    finals = {
        name.removeprefix("final/"): tensor
        for name, tensor in golden.items()
        if name.startswith("final/")
    }
    norms = torch.stack(
        [parameters[translate(name)].detach().norm() for name in MANIFEST["final_norms_names"]]
    )
    return Errors(
        mle=(torch.stack(trainer.mle) - golden["mle"]).abs().amax(dim=1),
        grad_norm=(
            torch.tensor([line["grad_norm"] for line in metrics]) - golden["grad_norm"]
        ).abs(),
        lr=(
            torch.tensor([line["lr"] for line in metrics], dtype=torch.float64) - golden["lr"]
        ).abs(),
        final=torch.cat(
            [
                (parameters[translate(name)].detach() - convert_layout(name, tensor))
                .abs()
                .flatten()
                for name, tensor in finals.items()
            ]
        ),
        norms=(norms - golden["final_norms"]).abs(),
    )


@pytest.mark.parametrize("run", ["adamw_simctg", "laprop_mle"])
def test_adaptive_runs_are_the_originals(run: str) -> None:
    gaps = errors(run)
    assert gaps.lr.max() <= 1e-12
    assert gaps.mle.max() <= 2e-5 and gaps.grad_norm.max() <= 2e-5
    assert gaps.final.max() <= 2e-5 and gaps.norms.max() <= 2e-5


def test_runs_of_signs_are_the_originals_up_to_a_few_coordinates() -> None:
    """Another order of summation may turn the sign of a momentum near zero, which moves a
    coordinate by twice the rate.
    """
    gaps = errors("minato_mle")
    assert gaps.lr.max() <= 1e-12
    assert gaps.mle[:2].max() <= 2e-5 and gaps.grad_norm[:2].max() <= 2e-5
    assert gaps.mle.max() <= 1e-2 and gaps.grad_norm.max() <= 1e-2
    assert (gaps.final > 1e-5).double().mean() <= 2e-3 and gaps.norms.max() <= 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 0.0},
        {"skip": 1},
        {"lr": 1.001e-2},
        {"weight_decay": 0.0},
        {"beta1": 0.91},
        {"beta2": 0.96},
        {"eps": 1e-4},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("run", ["adamw_simctg", "laprop_mle"])
def test_the_comparison_notices_another_setting(run: str, changes: dict[str, Any]) -> None:
    assert errors(run, **changes).final.max() > 2e-4


def test_what_decays_is_what_decays_in_the_rebuilt() -> None:
    """It goes by names: registers and the vocabulary's projections decay, its table does not."""
    decoder = rebuilt(CASE)
    groups = {group["name"]: group for group in build_parameter_groups(decoder)}
    exempt = {
        name
        for name in MANIFEST["final_norms_names"]
        if any(part in name for part in ("norm", "bias", "embedding.weight"))
    }
    assert set(groups["undecayed"]["names"]) == {translate(name) for name in exempt}
    assert set(groups["decayed"]["names"]) == {
        translate(name) for name in MANIFEST["final_norms_names"]
    } - {*map(translate, exempt)}
    assert groups["undecayed"]["weight_decay"] == 0.0 and "weight_decay" not in groups["decayed"]
    kept = {
        "vocabulary.input.weight",
        "vocabulary.output.weight",
        "blocks.0.attention.memory.registers.keys",
    }
    assert kept <= set(groups["decayed"]["names"])
