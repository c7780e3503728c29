"""One update's work: the same whatever the micro-batches and processes, second derivatives, and
what is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import DIMS, VOCAB, distance, tiny, tokens
from lswt_adamw import AdamW
from lswt_compressed import Compressed
from lswt_eager import Eager
from lswt_registers import Registers
from lswt_sdpa import Sdpa
from lswt_simctg import SimCtg
from lswt_sinks import SinkLogit
from lswt_sophia import SophiaG, SophiaH
from lswt_xl_cache import SlidingWindow, XlCache, XlHidden
from ranks import shard_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lswt_core import Registry
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import Incompatible
from lswt_core.interfaces import IGNORE, AuxiliaryLoss, Batch, Dims, LossSum, Objective, Output
from lswt_core.model.parameters import build_parameter_groups
from lswt_core.model.train_module import CROSS_ENTROPY, TrainModule
from lswt_core.plugin_api.pytree import concatenate_rows, split_rows, tree_leaves, tree_map
from lswt_core.plugin_api.sharded_tensor import full_tensor
from lswt_core.train.finite import NotFinite
from lswt_core.train.step import Step
from lswt_core.train.step_context import Interrupted, StepContext
from lswt_core.train.update import clip_gradients, gradient_norm

ROWS, LENGTH = 8, 6
MEMORIES: dict[str, dict[str, Any]] = {
    "xl-cache": {"xl": partial(XlCache, length=4), "registers": partial(Registers, count=2)},
    "window": {"xl": partial(SlidingWindow, length=4)},
    "xl-hidden": {"xl": partial(XlHidden, length=4), "sink": SinkLogit},
    "compressed": {"xl": partial(Compressed, length=1, slots=2, rate=2)},
}
every_memory = pytest.mark.parametrize("memory", MEMORIES)
PLAIN = Precision(torch.float32, "nothing is cast; the models themselves are float64")
HALF = Precision(torch.bfloat16, "as on an accelerator")
SMALLEST = Dims(d_model=4, n_heads=1, d_ffn=3, n_layers=1)


def loss_of(**parts: Any) -> TrainModule:
    """A tiny decoder that remembers, with SimCTG."""
    parts = {"memories": MEMORIES["xl-cache"]} | parts
    return TrainModule(tiny(**parts), {"simctg": (SimCtg(DIMS, margin=0.9), 0.7)})


def batch_of(rows: int = ROWS, length: int = LENGTH, size: int = VOCAB) -> Batch:
    """Random tokens with scattered padding and ignored labels, unevenly many a row."""
    generator = torch.Generator().manual_seed(9)
    share = torch.linspace(0.1, 0.8, rows)[:, None]
    valid = torch.rand(rows, length, generator=generator) > share
    ignored = torch.rand(rows, length, generator=generator) < share
    return Batch(
        tokens(rows, length, 1, size),
        tokens(rows, length, 2, size).masked_fill(ignored, IGNORE),
        valid,
    )


def step_of(
    loss: TrainModule,
    micro_batch_size: int,
    *,
    world: World | None = None,
    batch: Batch | None = None,
    number: int = 3,
    precision: Precision = PLAIN,
    sampling: float = 0.0,
    scale: float = 1.0,
    **more: Any,
) -> Step:
    """A step over this process's rows, whose memories are those an earlier segment left."""
    batch, world = batch or batch_of(), world or World()
    total = len(batch.inputs)
    own = world.rows(total)
    with torch.no_grad():
        size = loss.decoder.vocabulary.table.num_embeddings
        _, warm = loss.hidden_states(tokens(total, 5, 7, size))
    context = StepContext(
        loss, world, precision, seed=1, rows=own, micro_batch_size=micro_batch_size, **more
    )
    mine = batch.map(lambda t: t[own.start : own.stop])
    memory = split_rows(
        tree_map(lambda t: t[own.start : own.stop], warm), len(own), micro_batch_size
    )
    return Step(context, mine, memory, number, scale, sampling=sampling)


def gradients(loss: nn.Module) -> dict[str, Tensor]:
    """Every gradient, by name."""
    return {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between tensors of the same names."""
    assert a.keys() == b.keys()
    return max(distance(a[name], b[name]) for name in a)


def differentiated(loss: TrainModule, step: Objective, labels: Any) -> dict[str, Tensor]:
    """The gradients of a step."""
    loss.zero_grad()
    step.backward(labels)
    return {name: gradient.clone() for name, gradient in gradients(loss).items()}


# ---------- micro-batches


@every_memory
def test_a_step_has_the_gradient_of_the_mean_loss(memory: str) -> None:
    loss, batch = loss_of(memories=MEMORIES[memory]), batch_of()
    step = step_of(loss, 2)
    grads = differentiated(loss, step, "data")
    loss.zero_grad()
    result = loss(batch, concatenate_rows(step.memory))
    result.loss.backward()
    assert largest_gap(grads, gradients(loss)) < 1e-12
    assert distance(torch.stack([part.loss for part in step.results]).sum(), result.loss) < 1e-12
    assert step.tokens == int((batch.labels != IGNORE).sum())
    step.check_counts()


@every_memory
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_change_nothing(micro_batch_size: int, memory: str) -> None:
    loss = loss_of(memories=MEMORIES[memory])
    whole, parted = step_of(loss, ROWS), step_of(loss, micro_batch_size)
    for labels in ("data", "sampled"):
        assert (
            largest_gap(differentiated(loss, whole, labels), differentiated(loss, parted, labels))
            < 1e-12
        )
    for name in whole.counts:
        assert int(whole.counts[name]) == int(parted.counts[name])
        sums = [
            torch.stack([result.terms[name].total for result in step.results]).sum()
            for step in (whole, parted)
        ]
        assert distance(*sums) < 1e-12
    pairs = zip(
        tree_leaves(concatenate_rows(whole.next_memory)),
        tree_leaves(concatenate_rows(parted.next_memory)),
        strict=True,
    )
    assert all(distance(a, b) < 1e-12 for a, b in pairs)


class Casts(TorchDispatchMode):
    """Counts how often each of some tensors is cast to bfloat16."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.counts = {tensor.data_ptr(): 0 for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += options.get("dtype") == torch.bfloat16
        return func(*args, **options)


def matrices(loss: TrainModule) -> list[Tensor]:
    """The weights that matrix products of blocks are taken with."""
    linear = (module for module in loss.decoder.blocks.modules() if isinstance(module, nn.Linear))
    return [module.weight for module in linear]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("sampling", [0.0, 0.5])
def test_weights_are_cast_once_for_all_micro_batches(
    sampling: float, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = loss_of().float()
    options: dict[str, Any] = {"precision": HALF, "sampling": sampling}
    with Casts(matrices(loss)) as casts:
        shared = differentiated(loss, step_of(loss, micro_batch_size, **options), "data")
    assert set(casts.counts.values()) == {1}
    monkeypatch.setattr(Precision, "shared_casts", lambda *_: nullcontext())
    with Casts(matrices(loss)) as casts:
        apart = differentiated(loss, step_of(loss, micro_batch_size, **options), "data")
    assert set(casts.counts.values()) == {ROWS // micro_batch_size}
    assert all(torch.equal(shared[name], gradient) for name, gradient in apart.items())


def test_activation_checkpointing_keeps_no_cast_weights() -> None:
    loss = loss_of().float()
    loss.decoder.activation_checkpointing = True
    with Casts(matrices(loss)) as casts:
        differentiated(loss, step_of(loss, 4, precision=HALF), "data")
    assert min(casts.counts.values()) > 1


@every_memory
@pytest.mark.parametrize("length", [2, 70])
def test_what_is_remembered_is_alone_in_its_memory(length: int, memory: str) -> None:
    step = step_of(loss_of(memories=MEMORIES[memory]), 4, batch=batch_of(length=length))
    step.backward("data")
    for tensor in tree_leaves(tuple(step.next_memory)):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        assert not tensor.requires_grad


def test_the_originals_mean_of_micro_batch_means_is_another_number() -> None:
    step = step_of(loss_of(), 4)
    step.backward("data")
    totals, counts = torch.tensor(
        [[float(part.detach()) for part in result.terms[CROSS_ENTROPY]] for result in step.results]
    ).T
    # labels are ignored unevenly
    assert distance((totals / counts).mean(), totals.sum() / counts.sum()) > 1e-3


def test_sampled_labels_leave_memory_and_results_alone() -> None:
    loss = loss_of()
    step = step_of(loss, 2)
    step.backward("data")
    next_memory, results, memory = (
        step.next_memory,
        step.results,
        [t.clone() for t in tree_leaves(step.memory)],
    )
    first = differentiated(loss, step, "sampled")
    assert step.next_memory is next_memory and step.results is results
    assert all(torch.equal(a, b) for a, b in zip(memory, tree_leaves(step.memory), strict=True))
    assert largest_gap(first, differentiated(loss, step, "sampled")) == 0
    assert largest_gap(first, differentiated(loss, step_of(loss, 2, number=4), "sampled")) > 1e-3


def test_sampled_gradients_estimate_the_gauss_newton_diagonal() -> None:
    """With labels from the model, tokens times the squared gradient of the mean has the Fisher
    information as its mean.
    """
    loss = TrainModule(tiny(dims=SMALLEST, vocab_size=5, d_vocab=3), {})
    batch = batch_of(2, 4, 5)
    kept = (batch.labels != IGNORE).flatten().nonzero()[:, 0].tolist()
    fisher = torch.zeros(())
    for token in kept:
        states, _ = loss.decoder(batch.inputs)
        log_p = loss.decoder.vocabulary.logits(states).flatten(0, 1)[token].log_softmax(-1)
        for one in log_p:
            slopes = torch.autograd.grad(
                one, list(loss.parameters()), retain_graph=True, allow_unused=True
            )
            fisher = fisher + one.detach().exp() * sum(
                g.square().sum() for g in slopes if g is not None
            ) / len(kept)
    draws = 250
    means, squares = (
        {name: torch.zeros_like(p) for name, p in loss.named_parameters()},
        torch.zeros(()),
    )
    for number in range(draws):
        grads = differentiated(loss, step_of(loss, 1, batch=batch, number=number), "sampled")
        squares = squares + len(kept) * sum(g.square().sum() for g in grads.values()) / draws
        means = {name: means[name] + g / draws for name, g in grads.items()}
    assert float(squares / fisher) == pytest.approx(1, abs=0.1)
    # the gradient itself has mean zero
    bias = sum(float(mean.square().sum()) for mean in means.values())
    assert bias * len(kept) * draws / float(fisher) == pytest.approx(1, abs=0.9)


# ---------- a share of the rows


@pytest.mark.parametrize(
    ("fraction", "rows"), [(1.0, [*range(8)]), (0.5, [0, 2, 4, 6]), (0.4, [0, 2, 5]), (0.1, [0])]
)
@pytest.mark.parametrize("micro_batch_size", [1, 2, ROWS])
def test_a_part_is_a_step_over_some_of_the_rows(
    fraction: float, rows: list[int], micro_batch_size: int
) -> None:
    loss, batch = loss_of(), batch_of()
    whole = step_of(loss, ROWS)
    memory, labels = tree_map(lambda t: t[rows], whole.memory[0]), batch.labels[rows]
    part = step_of(loss, micro_batch_size).subset(fraction)
    assert part.tokens == int((labels != IGNORE).sum())
    grads = differentiated(loss, part, "data")
    loss.zero_grad()
    loss(batch.map(lambda t: t[rows]), memory).loss.backward()
    assert largest_gap(grads, gradients(loss)) < 1e-12


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_do_not_change_a_part(micro_batch_size: int) -> None:
    loss = loss_of()
    params = list(loss.parameters())
    one, other = step_of(loss, ROWS).subset(0.4), step_of(loss, micro_batch_size).subset(0.4)
    assert (
        largest_gap(differentiated(loss, one, "sampled"), differentiated(loss, other, "sampled"))
        < 1e-12
    )
    ones = [torch.ones_like(p) for p in params]
    products = [
        {str(i): t for i, t in enumerate(part.hessian_vector_product(params, ones))}
        for part in (one, other)
    ]
    assert largest_gap(*products) < 1e-10


def test_a_row_draws_the_same_labels_in_a_part_as_in_the_whole() -> None:
    loss = loss_of()
    only = torch.zeros(ROWS, 1, dtype=torch.bool)
    only[[0, 4]] = True
    batch = batch_of()
    # the other rows say nothing
    batch = batch._replace(labels=batch.labels.masked_fill(~only, IGNORE))
    step = step_of(loss, 2, batch=batch)
    assert (
        largest_gap(
            differentiated(loss, step, "sampled"),
            differentiated(loss, step.subset(0.25), "sampled"),
        )
        < 1e-12
    )


def test_the_whole_as_a_part_is_the_whole_to_the_bit() -> None:
    loss = loss_of()
    step = step_of(loss, 2)
    for labels in ("data", "sampled"):
        assert (
            largest_gap(
                differentiated(loss, step, labels), differentiated(loss, step.subset(1.0), labels)
            )
            == 0
        )


def test_a_cold_memory_stays_cold_in_a_part() -> None:
    loss, batch = loss_of(), batch_of()
    step = Step(step_of(loss, 2).context, batch, [None] * 4, 3)
    grads = differentiated(loss, step.subset(0.5), "data")
    loss.zero_grad()
    loss(batch.map(lambda t: t[::2])).loss.backward()
    assert largest_gap(grads, gradients(loss)) < 1e-12


@pytest.mark.parametrize("fraction", [0.05, 1.2])
def test_a_part_without_rows_is_refused(fraction: float) -> None:
    with pytest.raises(
        Incompatible,
        match=rf"fraction = {fraction} .*0\.125 to 1",
    ):
        step_of(loss_of(), 2).subset(fraction)


@pytest.mark.parametrize("name", ["sophia-g", "sophia-h"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_curvature_of_a_fraction_is_that_of_its_rows(name: str, fraction: float) -> None:
    """The count that multiplies the square is the part's own."""
    loss = loss_of()
    params = list(loss.parameters())
    optimizer = Registry().get("optimizer", name)(params, beta2=0.0, fraction=fraction)
    optimizer.update_curvature(step_of(loss, 2))
    part = step_of(loss, ROWS).subset(fraction)
    if name == "sophia-g":
        expected = {
            key: part.tokens * g.square()
            for key, g in differentiated(loss, part, "sampled").items()
        }
    else:
        draws = part.generator("hutchinson")
        probes = [torch.randn(p.shape, generator=draws).double() for p in params]
        products = part.hessian_vector_product(params, probes)
        expected = {
            key: u * hu
            for (key, _), u, hu in zip(loss.named_parameters(), probes, products, strict=True)
        }
    actual = {
        key: optimizer.state[p]["curvature"]
        for key, p in loss.named_parameters()
        if key in expected
    }
    assert largest_gap(actual, expected) < 1e-10


# ---------- second derivatives


def curvature_problem() -> tuple[TrainModule, list[Tensor], list[Tensor]]:
    """A model small enough for its whole Hessian, its parameters and a direction."""
    loss = TrainModule(
        tiny(dims=SMALLEST, vocab_size=5, d_vocab=3),
        {"simctg": (SimCtg(SMALLEST, margin=0.9), 0.7)},
    )
    params: list[Tensor] = list(loss.parameters())
    generator = torch.Generator().manual_seed(2)
    return loss, params, [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_exact_hessian_product_is_that_of_the_whole_hessian(micro_batch_size: int) -> None:
    loss, params, vectors = curvature_problem()
    batch = batch_of(4, 4, 5)
    names, sizes = [name for name, _ in loss.named_parameters()], [p.numel() for p in params]

    def mean_loss(flat: Tensor) -> Tensor:
        values = {
            name: part.view_as(p)
            for name, part, p in zip(names, flat.split(sizes), params, strict=True)
        }
        return torch.func.functional_call(loss, values, (batch,), {"create_graph": True}).loss

    def flattened(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.detach().flatten() for part in parts])

    hessian = torch.autograd.functional.hessian(mean_loss, flattened(params))
    products = step_of(loss, micro_batch_size, batch=batch).hessian_vector_product(params, vectors)
    assert distance(flattened(products), hessian @ flattened(vectors)) < 1e-10
    assert not gradients(loss)


@pytest.mark.parametrize(
    "dtype, precision", [(torch.float64, PLAIN), (torch.float32, PLAIN), (torch.float32, HALF)]
)
def test_where_kernels_have_no_second_derivative_differences_come_close_and_weights_return(
    dtype: torch.dtype, precision: Precision
) -> None:
    exact, fused = (loss_of(std=0.1, dtype=dtype, **parts) for parts in ({}, {"attention": Sdpa}))
    params, generator = list(fused.parameters()), torch.Generator().manual_seed(2)
    vectors = [torch.randn(p.shape, generator=generator).to(dtype) for p in params]
    before = [p.detach().clone() for p in params]
    actual = step_of(fused, 2, precision=precision).hessian_vector_product(params, vectors)
    expected = step_of(exact, 2).hessian_vector_product(list(exact.parameters()), vectors)
    size = torch.cat([tensor.flatten() for tensor in expected]).norm()
    gap = torch.cat([(a - b).flatten() for a, b in zip(actual, expected, strict=True)]).norm()
    assert gap / size < 1e-4
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert not gradients(fused)


# ---------- refusals


class Miscounted(AuxiliaryLoss):
    """Counts states, announces labels."""

    name = "miscounted"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        return LossSum(out.states.square().sum(), torch.tensor(batch.inputs.numel()))


@pytest.mark.parametrize("micro_batch_size", [2, ROWS])
def test_a_loss_that_counts_something_else_than_it_announced_is_told(micro_batch_size: int) -> None:
    loss = TrainModule(tiny(), {"miscounted": (Miscounted(DIMS), 1.0)})
    step = step_of(loss, micro_batch_size)
    step.backward("data")
    with pytest.raises(TypeError, match=r"'miscounted' .*48 items"):
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
    assert not step.next_memory and not step.results


# ---------- processes


def everything(world: World) -> dict[str, Tensor]:
    """Both gradients, a Hessian product and the counts of one step, as a process of ``world`` finds
    them.
    """
    loss = loss_of()
    if world.mesh is not None:
        shard_model(loss, world)
    step = step_of(loss, 2, world=world)
    tensors = {
        f"{labels}.{name}": g
        for labels in ("data", "sampled")
        for name, g in differentiated(loss, step, labels).items()
    }
    params = list(loss.parameters())
    products = step.hessian_vector_product(params, [torch.ones_like(p) for p in params])
    for fraction in (0.4, 0.1):  # with a tenth, one of two processes has no row
        part = step.subset(fraction)
        tensors |= {
            f"{fraction}.{name}": g for name, g in differentiated(loss, part, "sampled").items()
        }
        tensors |= {
            f"{fraction}.hessian.{i}": t
            for i, t in enumerate(
                part.hessian_vector_product(params, [torch.ones_like(p) for p in params])
            )
        }
        tensors[f"{fraction}.tokens"] = torch.tensor(part.tokens)
        shared = step_of(loss, 2, world=world, sampling=fraction)
        differentiated(loss, shared, "data")
        assert shared.sampled is not None and shared.sampled.tokens == part.tokens
        tensors |= {
            f"{fraction}.shared.{name}": g
            for name, g in differentiated(loss, shared.sampled, "sampled").items()
        }
    step.backward("data")
    step.check_counts()
    counts = {f"count.{name}": count.clone() for name, count in step.counts.items()}
    return tensors | {f"hessian.{i}": product for i, product in enumerate(products)} | counts


def process(rank: int, size: int, shards: int, directory: Path) -> None:
    """One of several processes: leaves what it found in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size
    )
    found = everything(World(rank, size).with_mesh(shards))
    whole = {name: full_tensor(tensor) for name, tensor in found.items()}
    save_file(whole, directory / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shards"), [(4, 2)])
def test_processes_change_nothing(
    size: int, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.multiprocessing.spawn(process, (size, shards, tmp_path), nprocs=size)
    # as several processes do: by finite differences
    monkeypatch.setattr("lswt_core.train.step.supports_double_backward", lambda *_: False)
    alone = everything(World())
    assert int(alone[f"count.{CROSS_ENTROPY}"]) == int((batch_of().labels != IGNORE).sum())
    for rank in range(size):
        found = load_file(tmp_path / f"{rank}.safetensors")
        # differences of gradients are divided by 2e-3 of the weights' norm
        bounds = {name: 1e-10 if "hessian" in name else 1e-12 for name in alone}
        assert found.keys() == alone.keys()
        assert all(distance(found[name], alone[name]) < bounds[name] for name in alone)


def test_a_stop_waits_for_a_hessian_update_that_belongs_to_an_update_already_made() -> None:
    step = step_of(loss_of(), 2, stopping=lambda: True)
    step.backward("sampled")
    assert gradients(step.context.loss)
    with pytest.raises(Interrupted):
        step.backward("data")


# ---------- a forward pass that is shared


@every_memory
@pytest.mark.parametrize("micro_batch_size", [1, 2, ROWS])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("trained", [True, False], ids=["trained table", "frozen table"])
def test_gradients_of_one_forward_pass_are_those_of_two(
    memory: str, micro_batch_size: int, fraction: float, trained: bool
) -> None:
    loss = loss_of(memories=MEMORIES[memory])
    loss.decoder.vocabulary.table.requires_grad_(trained)
    apart, shared = (
        step_of(loss, micro_batch_size),
        step_of(loss, micro_batch_size, sampling=fraction),
    )
    data, drawn = (
        differentiated(loss, apart, "data"),
        differentiated(loss, apart.subset(fraction), "sampled"),
    )
    assert largest_gap(data, differentiated(loss, shared, "data")) == 0
    assert shared.sampled is not None
    assert shared.sampled.tokens == apart.subset(fraction).tokens and shared.tokens == apart.tokens
    loss.zero_grad()
    shared.sampled.subset(fraction).backward("sampled")
    assert largest_gap(drawn, gradients(loss)) < 1e-12


def test_an_objective_that_shares_its_forward_pass_is_a_whole_objective() -> None:
    loss = loss_of()
    step, part = step_of(loss, 2, sampling=0.5), step_of(loss, 2).subset(0.5)
    shared: Objective | None = step.sampled
    assert shared is not None
    params = list(loss.parameters())
    vectors = [torch.ones_like(p) for p in params]
    products = zip(
        shared.hessian_vector_product(params, vectors),
        part.hessian_vector_product(params, vectors),
        strict=True,
    )
    assert all(a.equal(b) for a, b in products)
    expected = differentiated(loss, part, "data")
    assert largest_gap(differentiated(loss, shared, "data"), expected) == 0
    draws = [torch.rand(3, generator=one.generator("probe")) for one in (shared, step)]
    assert draws[0].equal(draws[1])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_scale_changes_no_shared_gradient(fraction: float) -> None:
    loss = loss_of()
    pair = []
    for scale in (1.0, 1024.0):
        step = step_of(loss, 2, sampling=fraction, scale=scale)
        differentiated(loss, step, "data")
        assert step.sampled is not None
        loss.zero_grad()
        step.sampled.backward("sampled")
        pair.append(gradients(loss))
    assert largest_gap(*pair) < 1e-12


def test_activation_checkpointing_changes_no_shared_gradient() -> None:
    pair = []
    for again in (False, True):
        loss = loss_of()
        loss.decoder.activation_checkpointing = again
        step = step_of(loss, 2, sampling=0.5)
        data = differentiated(loss, step, "data")
        assert step.sampled is not None
        loss.zero_grad()
        step.sampled.backward("sampled")
        pair.append(data | {f"{name} sampled": g for name, g in gradients(loss).items()})
    assert largest_gap(*pair) < 1e-12


@pytest.mark.parametrize("size", [0.5, 0.99995, 1.0, 1.00005, 7.0])
@pytest.mark.parametrize("bound", [None, 0.0, 1.0])
def test_gradients_are_clipped_as_torch_clips_them(size: float, bound: float | None) -> None:
    actual, expected = (
        [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(1))]
        for _ in range(2)
    )
    for params in (actual, expected):
        for p in params[:2]:  # the last has none
            p.grad = size * torch.ones_like(p) / 7**0.5
    norm = gradient_norm(actual)
    clip_gradients(actual, norm, float(norm), bound)
    assert (
        float(torch.nn.utils.clip_grad_norm_(expected, bound or float("inf")))
        == float(norm)
        == pytest.approx(size)
    )
    for a, b in zip(actual[:2], expected[:2], strict=True):
        assert a.grad is not None and b.grad is not None and a.grad.equal(b.grad)


def test_a_curvature_that_is_not_finite_is_told() -> None:
    loss = loss_of()
    step = step_of(loss, 2, sampling=1.0)
    step.backward("data")
    assert step.sampled is not None and step.sampled.gradient.gradients[0] is not None
    step.sampled.gradient.gradients[0].fill_(torch.nan)
    with pytest.raises(NotFinite):
        step.sampled.backward("sampled")


# ---------- a frozen table


@pytest.mark.parametrize("attention", [Eager, Sdpa], ids=["exact products", "differenced products"])
@pytest.mark.parametrize("optimizer", [AdamW, SophiaG, SophiaH])
@pytest.mark.parametrize("precision", [PLAIN, HALF], ids=["float32", "bfloat16"])
def test_a_frozen_half_table_trains_as_its_rounded_numbers_do_and_stays(
    attention: Any, optimizer: Any, precision: Precision
) -> None:
    frozen, wide = (loss_of(dtype=torch.float32, attention=attention) for _ in range(2))
    frozen.decoder.vocabulary.freeze()
    wide.decoder.vocabulary.table.requires_grad_(False).weight.copy_(
        frozen.decoder.vocabulary.table.weight
    )
    before = frozen.decoder.vocabulary.table.weight.clone()
    ends = []
    for loss in (frozen, wide):
        start = {name: p.clone() for name, p in loss.named_parameters()}
        updates = optimizer(build_parameter_groups(loss), lr=1e-2)
        for number in range(2):
            step = step_of(loss, 4, precision=precision, number=number)
            step.backward("data")
            updates.step()
            updates.zero_grad()
            updates.update_curvature(step)
            updates.zero_grad()
        assert "decoder.vocabulary.table.weight" not in [
            name for group in updates.param_groups for name in group["names"]
        ]
        ends.append({name: p.detach().float() for name, p in loss.named_parameters()})
        moved = {name for name, p in loss.named_parameters() if not p.equal(start[name])}
        assert moved == set(start) - {"decoder.vocabulary.table.weight"}
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])
    assert frozen.decoder.vocabulary.table.weight.dtype == torch.float16
    assert frozen.decoder.vocabulary.table.weight.equal(before)
