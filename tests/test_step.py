"""One update's work: the same whatever the micro-batches and processes, second derivatives, and what is refused."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import DIMS, VOCAB, distance, tiny, tokens
from lswt_registers import Registers
from lswt_sdpa import Sdpa
from lswt_simctg import SimCtg
from lswt_xl_cache import XlCache
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lswt_core.interfaces import IGNORE, AuxiliaryLoss, Batch, Dims, Output, Term
from lswt_core.loss import CROSS_ENTROPY, Loss
from lswt_core.parallel import Precision, World
from lswt_core.step import Interrupted, NotFinite, Setting, Step
from lswt_core.tree import join_rows, split_rows, tensors, tree_map

ROWS, LENGTH = 8, 6
PLAIN = Precision(torch.float32, "nothing is cast; the models themselves are float64")
HALF = Precision(torch.bfloat16, "as on an accelerator")
SMALLEST = Dims(d_model=4, n_heads=1, d_ffn=3, n_layers=1)


def loss_of(**parts: Any) -> Loss:
    """A tiny decoder that remembers, with SimCTG."""
    parts = {"memories": {"xl": partial(XlCache, length=4), "registers": partial(Registers, count=2)}} | parts
    return Loss(tiny(**parts), {"simctg": (SimCtg(DIMS, margin=0.9), 0.7)})


def batch_of(rows: int = ROWS, length: int = LENGTH, size: int = VOCAB) -> Batch:
    """Random tokens with scattered padding and ignored labels, unevenly many a row."""
    generator = torch.Generator().manual_seed(9)
    share = torch.linspace(0.1, 0.8, rows)[:, None]
    valid = torch.rand(rows, length, generator=generator) > share
    ignored = torch.rand(rows, length, generator=generator) < share
    return Batch(tokens(rows, length, 1, size), tokens(rows, length, 2, size).masked_fill(ignored, IGNORE), valid)


def step_of(
    loss: Loss,
    micro_rows: int,
    *,
    world: World | None = None,
    batch: Batch | None = None,
    number: int = 3,
    precision: Precision = PLAIN,
    **more: Any,
) -> Step:
    """A step over this process's rows, whose memories are those an earlier segment left."""
    batch, world = batch or batch_of(), world or World()
    total = len(batch.inputs)
    own = world.rows(total)
    with torch.no_grad():
        _, warm = loss.decoder(tokens(total, 5, 7, loss.decoder.vocabulary.table.num_embeddings))
    setting = Setting(loss, world, precision, seed=1, rows=own, micro_rows=micro_rows, **more)
    mine = batch.each(lambda t: t[own.start : own.stop])
    return Step(setting, mine, split_rows(tree_map(lambda t: t[own.start : own.stop], warm), len(own), micro_rows), number)


def gradients(loss: nn.Module) -> dict[str, Tensor]:
    """Every gradient, by name."""
    return {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between tensors of the same names."""
    assert a.keys() == b.keys()
    return max(distance(a[name], b[name]) for name in a)


def differentiated(loss: Loss, step: Step, labels: Any) -> dict[str, Tensor]:
    """The gradients of a step."""
    loss.zero_grad()
    step.backward(labels)
    return {name: gradient.clone() for name, gradient in gradients(loss).items()}


# ------------------------------------------------------------------------------------------------------- micro-batches


def test_a_step_has_the_gradient_of_the_mean_loss() -> None:
    loss, batch = loss_of(), batch_of()
    step = step_of(loss, 2)
    found = differentiated(loss, step, "data")
    loss.zero_grad()
    result = loss(batch, join_rows(step.memory))
    result.loss.backward()
    assert largest_gap(found, gradients(loss)) < 1e-12
    assert distance(torch.stack([part.loss for part in step.results]).sum(), result.loss) < 1e-12
    assert step.tokens == int((batch.labels != IGNORE).sum())
    step.check_counts()


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_micro_batches_change_nothing(micro_rows: int) -> None:
    loss = loss_of()
    whole, parted = step_of(loss, ROWS), step_of(loss, micro_rows)
    for labels in ("data", "sampled"):
        assert largest_gap(differentiated(loss, whole, labels), differentiated(loss, parted, labels)) < 1e-12
    for name in whole.counts:
        assert int(whole.counts[name]) == int(parted.counts[name])
        sums = [torch.stack([result.terms[name].total for result in step.results]).sum() for step in (whole, parted)]
        assert distance(*sums) < 1e-12
    pairs = zip(tensors(join_rows(whole.staged)), tensors(join_rows(parted.staged)), strict=True)
    assert all(distance(a, b) < 1e-12 for a, b in pairs)


def test_the_originals_mean_of_micro_batch_means_is_another_number() -> None:
    loss = loss_of()
    step = step_of(loss, 4)
    step.backward("data")
    terms = [result.terms[CROSS_ENTROPY] for result in step.results]
    means = torch.stack([(term.total / term.count).detach() for term in terms])
    ours = torch.stack([term.total.detach() for term in terms]).sum() / step.tokens
    assert distance(means.mean(), ours) > 1e-3  # labels are ignored unevenly; with none ignored they are equal


def test_sampled_labels_leave_memory_and_results_alone() -> None:
    loss = loss_of()
    step = step_of(loss, 2)
    step.backward("data")
    staged, results, memory = step.staged, step.results, [t.clone() for t in tensors(step.memory)]
    first = differentiated(loss, step, "sampled")
    assert step.staged is staged and step.results is results
    assert all(torch.equal(a, b) for a, b in zip(memory, tensors(step.memory), strict=True))
    assert largest_gap(first, differentiated(loss, step, "sampled")) == 0
    assert largest_gap(first, differentiated(loss, step_of(loss, 2, number=4), "sampled")) > 1e-3


def test_sampled_gradients_estimate_the_gauss_newton_diagonal() -> None:
    """With labels from the model, tokens times the squared gradient of the mean has the Fisher information as its mean."""
    loss = Loss(tiny(dims=SMALLEST, vocab_size=5, d_vocab=3), {})
    batch = batch_of(2, 4, 5)
    kept = (batch.labels != IGNORE).flatten().nonzero()[:, 0].tolist()
    fisher = torch.zeros(())
    for token in kept:
        states, _ = loss.decoder(batch.inputs)
        log_p = loss.decoder.vocabulary.logits(states).flatten(0, 1)[token].log_softmax(-1)
        for one in log_p:
            slopes = torch.autograd.grad(one, list(loss.parameters()), retain_graph=True, allow_unused=True)
            fisher = fisher + one.detach().exp() * sum(g.square().sum() for g in slopes if g is not None) / len(kept)
    draws = 250
    means, squares = {name: torch.zeros_like(p) for name, p in loss.named_parameters()}, torch.zeros(())
    for number in range(draws):
        found = differentiated(loss, step_of(loss, 1, batch=batch, number=number), "sampled")
        squares = squares + len(kept) * sum(g.square().sum() for g in found.values()) / draws
        means = {name: means[name] + g / draws for name, g in found.items()}
    assert float(squares / fisher) == pytest.approx(1, abs=0.1)
    bias = sum(float(mean.square().sum()) for mean in means.values())  # the gradient itself has mean zero
    assert bias * len(kept) * draws / float(fisher) == pytest.approx(1, abs=0.9)


@pytest.mark.parametrize("micro_rows", [1, 2, ROWS])
@pytest.mark.parametrize("share, used", [(0.01, 1), (0.25, 2), (0.6, 5), (1.0, ROWS)])
def test_a_part_is_the_step_over_some_of_its_rows(micro_rows: int, share: float, used: int) -> None:
    loss, batch = loss_of(), batch_of()
    step = step_of(loss, micro_rows)
    part = step.part(share)
    rows = [row for micro in part.rows for row in micro]
    assert len(set(rows)) == len(rows) == used and sorted(rows) == rows
    chosen = batch.each(itemgetter(rows))
    assert part.tokens == int((chosen.labels != IGNORE).sum())
    found = differentiated(loss, part, "data")
    loss.zero_grad()
    loss(chosen, tree_map(itemgetter(rows), join_rows(step.memory))).loss.backward()
    assert largest_gap(found, gradients(loss)) < 1e-12
    assert [row for micro in step_of(loss, 4).part(share).rows for row in micro] == rows
    assert step.tokens == step_of(loss, ROWS).tokens


def test_a_part_draws_the_labels_its_rows_would_have_drawn_in_the_whole() -> None:
    step = step_of(loss_of(), 2)
    part = step.part(0.5)
    whole = torch.cat([step.uniforms(i) for i in range(len(step.micro))])
    drawn = torch.cat([part.uniforms(i) for i in range(len(part.micro))])
    assert torch.equal(drawn, whole[[row for micro in part.rows for row in micro]])


def test_parts_take_their_turn_among_all_rows() -> None:
    loss = loss_of()
    seen = [row for number in range(30) for micro in step_of(loss, 2, number=number).part(0.25).rows for row in micro]
    assert set(seen) == set(range(ROWS))


# -------------------------------------------------------------------------------------------------- second derivatives


def question() -> tuple[Loss, list[Tensor], list[Tensor]]:
    """A model small enough for its whole Hessian, its parameters and a direction."""
    loss = Loss(tiny(dims=SMALLEST, vocab_size=5, d_vocab=3), {"simctg": (SimCtg(SMALLEST, margin=0.9), 0.7)})
    params: list[Tensor] = list(loss.parameters())
    generator = torch.Generator().manual_seed(2)
    return loss, params, [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params]


@pytest.mark.parametrize("micro_rows", [1, 4])
def test_the_exact_hessian_product_is_that_of_the_whole_hessian(micro_rows: int) -> None:
    loss, params, vectors = question()
    batch = batch_of(4, 4, 5)
    names, sizes = [name for name, _ in loss.named_parameters()], [p.numel() for p in params]

    def mean_loss(flat: Tensor) -> Tensor:
        given = {name: part.view_as(p) for name, part, p in zip(names, flat.split(sizes), params, strict=True)}
        return torch.func.functional_call(loss, given, (batch,), {"twice": True}).loss

    def flattened(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.detach().flatten() for part in parts])

    hessian = torch.autograd.functional.hessian(mean_loss, flattened(params))
    found = step_of(loss, micro_rows, batch=batch).hessian_vector(params, vectors)
    assert distance(flattened(found), hessian @ flattened(vectors)) < 1e-10
    assert not gradients(loss)


@pytest.mark.parametrize("dtype, precision", [(torch.float64, PLAIN), (torch.float32, PLAIN), (torch.float32, HALF)])
def test_where_kernels_have_no_second_derivative_differences_come_close_and_weights_return(
    dtype: torch.dtype, precision: Precision
) -> None:
    exact, fused = (loss_of(std=0.1, dtype=dtype, **parts) for parts in ({}, {"attention": Sdpa}))
    params, generator = list(fused.parameters()), torch.Generator().manual_seed(2)
    vectors = [torch.randn(p.shape, generator=generator).to(dtype) for p in params]
    before = [p.detach().clone() for p in params]
    found = step_of(fused, 2, precision=precision).hessian_vector(params, vectors)
    wanted = step_of(exact, 2).hessian_vector(list(exact.parameters()), vectors)
    size = torch.cat([tensor.flatten() for tensor in wanted]).norm()
    gap = torch.cat([(a - b).flatten() for a, b in zip(found, wanted, strict=True)]).norm()
    assert gap / size < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert not gradients(fused)


# ------------------------------------------------------------------------------------------------------------- refusals


class Miscounted(AuxiliaryLoss):
    """Counts states, announces labels."""

    name = "miscounted"

    def forward(self, out: Output, batch: Batch) -> Term:
        return Term(out.states.square().sum(), torch.tensor(batch.inputs.numel()))


@pytest.mark.parametrize("micro_rows", [2, ROWS])
def test_a_loss_that_counts_something_else_than_it_announced_is_told(micro_rows: int) -> None:
    loss = Loss(tiny(), {"miscounted": (Miscounted(DIMS), 1.0)})
    step = step_of(loss, micro_rows)
    step.backward("data")
    with pytest.raises(TypeError, match=r"'miscounted' averaged over 48 items.*count\(batch\)"):
        step.check_counts()


def test_sampled_gradients_that_are_not_finite_are_refused() -> None:
    loss = loss_of()
    with torch.no_grad():
        loss.decoder.vocabulary.table.weight.fill_(torch.nan)
    with pytest.raises(NotFinite):
        step_of(loss, 2).backward("sampled")


def test_a_step_stops_between_micro_batches() -> None:
    loss, answers = loss_of(), iter([False, True])
    step = step_of(loss, 2, stopping=lambda: next(answers))
    with pytest.raises(Interrupted):
        step.backward("data")
    assert not step.staged and not step.results


# ------------------------------------------------------------------------------------------------------------ processes


def everything(world: World) -> dict[str, Tensor]:
    """Both gradients, a Hessian product and the counts of one step, as a process of ``world`` finds them."""
    loss = loss_of()
    step = step_of(loss, 2, world=world)
    found = {f"{labels}.{name}": g for labels in ("data", "sampled") for name, g in differentiated(loss, step, labels).items()}
    params = list(loss.parameters())
    products = step.hessian_vector(params, [torch.ones_like(p) for p in params])
    step.backward("data")
    step.check_counts()
    counts = {f"count.{name}": count.clone() for name, count in step.counts.items()}
    for share in (0.1, 0.6):  # the smaller leaves one process without a row
        part = step.part(share)
        found |= {f"part {share}.{name}": g for name, g in differentiated(loss, part, "sampled").items()}
        found |= {f"part {share}.hessian.{i}": p for i, p in enumerate(part.hessian_vector(params, [torch.ones_like(p) for p in params]))}
        counts[f"part {share}.tokens"] = torch.tensor(part.tokens)
    return found | {f"hessian.{i}": product for i, product in enumerate(products)} | counts


def process(rank: int, directory: Path) -> None:
    """One of two processes: leaves what it found in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    save_file(everything(World(rank, 2)), directory / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    alone = everything(World())
    assert int(alone[f"count.{CROSS_ENTROPY}"]) == int((batch_of().labels != IGNORE).sum())
    for rank in range(2):
        assert largest_gap(load_file(tmp_path / f"{rank}.safetensors"), alone) < 1e-12


def test_a_stop_waits_for_a_refresh_that_belongs_to_an_update_already_made() -> None:
    step = step_of(loss_of(), 2, stopping=lambda: True)
    step.backward("sampled")
    assert gradients(step.setting.loss)
    with pytest.raises(Interrupted):
        step.backward("data")
