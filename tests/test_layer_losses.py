"""Loss terms that layers return: exact over micro-batches and processes, trained on, logged, and
left out of evaluation and of sampled gradients.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from helpers import VOCAB, distance, tiny, tokens
from lswt_blocks import HyperConnections
from lswt_moe import MixtureOfExperts
from runs import assert_same_bits, inside, lines, write_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor

from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import Incompatible
from lswt_core.interfaces import IGNORE, Batch
from lswt_core.model.train_module import CROSS_ENTROPY, TrainModule
from lswt_core.train.evaluate import evaluate
from lswt_core.train.step import Step, StepContext

ROWS, LENGTH = 4, 6
TERMS = {"router_balance", "router_z"}
PLAIN = Precision(torch.float32, "nothing is cast; the models themselves are float64")
EXPERTS = partial(MixtureOfExperts, n_experts=4, width=6, balance_weight=0.3, z_weight=0.1)


def loss_of(ffn: Any = EXPERTS, **parts: Any) -> TrainModule:
    return TrainModule(tiny(ffn=ffn, **parts), {})


def batch_of() -> Batch:
    """Labels are ignored unevenly, the last two rows' altogether."""
    labels = tokens(ROWS, LENGTH, 2)
    labels[0, :4] = IGNORE
    labels[2:] = IGNORE
    return Batch(tokens(ROWS, LENGTH, 1), labels)


def step_of(loss: TrainModule, micro: int, world: World | None = None) -> Step:
    world = world or World()
    rows = world.rows(ROWS)
    context = StepContext(loss, world, PLAIN, seed=1, rows=rows, micro_batch_size=micro)
    batch = batch_of().map(lambda t: t[rows.start : rows.stop])
    return Step(context, batch, [None] * (len(rows) // micro), 3)


def differentiated(loss: TrainModule, step: Step, labels: Any = "data") -> dict[str, Tensor]:
    """The gradients of a step, and its loss terms."""
    loss.zero_grad()
    step.backward(labels)
    gradients = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
    for name in step.results[0].terms if step.results else ():
        gradients[f"term {name}"] = torch.stack([r.terms[name].total for r in step.results]).sum()
    return gradients


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(distance(a[name], b[name]) for name in a)


@pytest.mark.parametrize("micro", [1, 2, ROWS])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_a_step_is_the_mean_over_labels_rows_and_tokens(micro: int, again: bool) -> None:
    loss, batch = loss_of(), batch_of()
    states, _ = loss.decoder(batch.inputs, losses=(terms := {}))
    ce = loss.score(states, batch.labels).total / (batch.labels != IGNORE).sum()
    # two layers: a mean over rows or tokens of both
    balance = 0.3 * terms["router_balance"].total / (2 * ROWS)
    z = 0.1 * terms["router_z"].total / (2 * ROWS * LENGTH)
    params = list(loss.parameters())
    expected = torch.autograd.grad(ce + balance + z, params)
    loss.decoder.activation_checkpointing = again
    step = step_of(loss, micro)
    step.backward("data")
    step.check_counts()
    total = torch.stack([result.loss for result in step.results]).sum()
    assert distance(total, ce + balance + z) < 1e-12
    assert all(distance(p.grad, g) < 1e-12 for p, g in zip(params, expected, strict=True))  # type: ignore[arg-type]
    assert float(balance.detach()) > 0.1 and float(z.detach()) > 0.01


def test_sampled_gradients_leave_them_out_and_hessian_products_do_not() -> None:
    heavy, light = (loss_of(partial(EXPERTS, balance_weight=w, z_weight=w)) for w in (0.3, 0.0))
    sampled = [differentiated(loss, step_of(loss, 2), "sampled") for loss in (heavy, light)]
    assert largest_gap(*sampled) == 0
    with torch.no_grad():
        result = heavy(batch_of(), cross_entropy_only=True)
    assert result.terms.keys() == {CROSS_ENTROPY}
    vectors = [torch.ones_like(p) for p in heavy.parameters()]
    products = [
        step_of(loss, micro).hessian_vector_product(list(loss.parameters()), vectors)
        for loss, micro in ((heavy, 1), (heavy, ROWS), (light, ROWS))
    ]
    gaps = [
        max(distance(*pair) for pair in zip(products[1], other, strict=True))
        for other in (products[0], products[2])
    ]
    assert gaps[0] < 1e-10 and gaps[1] > 1e-3


class Miscounting(MixtureOfExperts):
    """Announces labels, counts rows and tokens."""

    def loss_count(self, name: str, batch: Batch) -> Tensor:
        return (batch.labels != IGNORE).sum()


@pytest.mark.parametrize("micro", [2, ROWS])
def test_a_layer_that_counts_something_else_than_it_announced_is_told(micro: int) -> None:
    step = step_of(loss_of(Miscounting), micro)
    step.backward("data")
    with pytest.raises(TypeError, match=r"'router_balance' averaged over 8 items.*loss_count"):
        step.check_counts()


def test_layers_agree_on_a_weight() -> None:
    decoder = tiny(ffn=EXPERTS)
    decoder.blocks[1].ffn.loss_weights = {"router_z": 0.2}  # type: ignore[union-attr]
    with pytest.raises(Incompatible, match=r"'router_z' the weights 0.1 and 0.2"):
        TrainModule(decoder, {})


def test_the_held_out_loss_is_cross_entropy_alone() -> None:
    loss, batch = loss_of(), batch_of()
    held_out = MagicMock(segments=1, unigram_perplexity=1.0)
    held_out.tokens.ids, held_out.tokens.n_bytes = [0] * VOCAB, VOCAB
    held_out.rows.segment.return_value = batch
    metrics = evaluate(loss, held_out, World(), PLAIN, lambda: False)
    with torch.no_grad():
        result = loss(batch)
    term = result.terms[CROSS_ENTROPY]
    assert metrics["eval/loss"] == pytest.approx(float(term.total / term.count), abs=1e-12)
    assert not [name for name in metrics if "router" in name]
    assert result.loss > term.total / term.count + 0.1


MIXED = [
    "loss.simctg=false",
    "block.use=hyper-connections",
    "block.streams=2",
    "layers.0.ffn.use=token-shift",
    "layers.1.ffn.use=moe",
    "layers.1.ffn.n_experts=3",
    "train.steps=6",
]


def test_a_run_logs_them_by_name_and_resumes_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    assert inside(monkeypatch, recipe, *MIXED, "--out", "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "parted")
    shutil.rmtree(tmp_path / "parted" / "checkpoints" / "step-00000006")
    assert inside(monkeypatch, recipe, *MIXED, "--out", "parted", "--resume") == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "parted")
    logged = lines(tmp_path / "whole")
    trained = [line for line in logged if "loss" in line]
    assert all({f"loss/{name}" for name in TERMS} <= line.keys() for line in trained)
    # three of two experts a token: 1 if even, and no more than E / K
    assert all(0.9 < line["loss/router_balance"] < 1.5 for line in trained)
    held_out = [line for line in logged if "eval/loss" in line]
    assert held_out and not [n for line in held_out for n in line if "eval/router" in n]


# ---------- processes


def process(rank: int, directory: Path) -> None:
    """One of two processes: leaves what it found in a file."""
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    loss, world = loss_of(block=HyperConnections), World(rank, 2)
    gradients = differentiated(loss, step_of(loss, 1, world))
    for name in [name for name in gradients if name.startswith("term ")]:
        gradients[name] = world.sum(gradients[name])
    save_file(gradients, directory / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    loss = loss_of(block=HyperConnections)
    alone = differentiated(loss, step_of(loss, ROWS))
    for rank in range(2):
        assert largest_gap(load_file(tmp_path / f"{rank}.safetensors"), alone) < 1e-12
