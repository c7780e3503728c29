"""The loss of one step: gradient accumulation over micro-batches and data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from itertools import compress
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor

from lswt_core.device import Precision, send
from lswt_core.distributed.sharding import deferred_all_reduce
from lswt_core.distributed.world import spaced_rows
from lswt_core.interfaces import Batch, LabelSampling
from lswt_core.model.parameters import trainable_parameters
from lswt_core.model.train_module import (
    CROSS_ENTROPY,
    SAMPLED,
    BatchLoss,
    count_labels,
)
from lswt_core.plugin_api.pytree import concatenate_rows, split_rows, tree_map
from lswt_core.plugin_api.seeding import derive_seed
from lswt_core.plugin_api.sharded_tensor import local_tensors
from lswt_core.train.finite import require_finite
from lswt_core.train.gradients import SampledGradient, SharedForward, finish_gradients
from lswt_core.train.hvp import exact_hvp, finite_difference_hvp, supports_double_backward
from lswt_core.train.idle_passes import IdlePasses, idle_passes, idle_results
from lswt_core.train.step_context import Interrupted, StepContext

FLOAT32 = Precision(torch.float32, "finite differences drown in the rounding of shorter types")


class Step:
    """The loss of one global batch, cut into micro-batches (implements
    ``update.UpdateObjective``).

    A micro-batch's loss sums are divided by counts of the whole global batch, so that accumulated
    gradients are exactly those of the mean. Memory states are read from ``memory``; the backward
    pass leaves the next ones in ``next_memory``.
    """

    def __init__(
        self,
        context: StepContext,
        batch: Batch,
        memory: Sequence[Any],
        number: int,
        scale: float = 1.0,
        rows: Sequence[int] | None = None,
        sampling: float = 0.0,
        idle: IdlePasses | None = None,
    ) -> None:
        """``memory``: one state a micro-batch. ``number``: seeds the random streams. ``scale``:
        loss scale, a power of two. ``rows``: rows of the global batch in ``batch``; None: all rows
        of this rank. ``sampling``: fraction of rows whose sampled gradient ``backward("data")``
        accumulates for ``sampled``. ``idle``: passes after those of the batch.
        """
        self.idle, self.is_subset = idle, rows is not None
        self.context, self.number, self.scale = context, number, scale
        self.rows: Sequence[int] = context.rows if rows is None else rows
        self.memory = list(memory)
        self.next_memory: list[Any] = []
        self.results: list[BatchLoss] = []  # of the micro-batches, after backward("data")
        self.parameters = trainable_parameters(context.loss)
        micro_batches = [batch.map(itemgetter(rows)) for rows in self.micro_batch_slices()]
        self.is_split = len(micro_batches) > 1 or context.world.size > 1
        self.sampling = sampling
        self.sampled_rows = self.row_masks(sampling) if sampling else []
        self.counts = self._count(micro_batches, batch)
        self.sampled_gradient: SampledGradient | None = None
        if sampling:
            count = self.counts.pop(SAMPLED)
            self.sampled_gradient = SampledGradient(context.world, self.parameters, count, scale)
        self.micro_batches = [micro.map(self._send) for micro in micro_batches]

    def _send(self, tensor: Tensor) -> Tensor:
        return send(tensor, self.context.world.device)

    def _count(self, micro_batches: list[Batch], batch: Batch) -> dict[str, Tensor]:
        """The denominator of every loss over the global batch. Counted before batches are copied
        to the device, so that only the all-reduce waits for it.
        """
        local = [self.context.loss.counts(micro) for micro in micro_batches or [batch]]
        for micro, rows, counts in zip(micro_batches, self.sampled_rows, local, strict=False):
            counts[SAMPLED] = count_labels(micro, rows)
        columns = zip(*(counts.values() for counts in local), strict=True)
        sums = torch.stack([sum_scalars(column) for column in columns])
        return dict(zip(local[0], self.context.world.sum(self._send(sums)), strict=True))

    @cached_property
    def tokens(self) -> int:
        """The number of predicted labels over all micro-batches and ranks. Synchronises with the
        device.
        """
        return int(self.counts[CROSS_ENTROPY])

    @property
    def sampled(self) -> SharedForward | None:
        """The step for an optimizer that shares the forward pass of ``backward("data")``; None if
        no sampled gradients were taken.
        """
        if self.sampled_gradient is None:
            return None
        return SharedForward(self, self.sampling, self.sampled_gradient)

    def micro_batch_slices(self) -> list[slice]:
        """The rows of every micro-batch within this rank's rows."""
        size = self.context.micro_batch_size
        return [slice(start, start + size) for start in range(0, len(self.rows), size)]

    def row_masks(self, fraction: float) -> list[Tensor]:
        """For every micro-batch, which rows belong to a fraction of the global batch, [B] bool.
        Independent of micro-batches and world size.
        """
        total = len(self.context.rows) * self.context.world.size
        chosen = set(spaced_rows(fraction, total))
        is_chosen = torch.tensor([row in chosen for row in self.rows], dtype=torch.bool)
        return [is_chosen[part] for part in self.micro_batch_slices()]

    def subset(self, fraction: float) -> Step:
        """The step over a fraction of its rows (see Objective), in new micro-batches. Rows and
        random streams do not depend on micro-batches or world size; a rank may have no rows.
        """
        self.context.placement.flush()
        selected: list[Any] = []
        rows: list[int] = []
        for i, mask in enumerate(self.row_masks(fraction)):
            inputs_and_memory = (tuple(self.micro_batches[i]), self.memory[i])
            index = self._send(mask.nonzero()[:, 0])  # found on the host, which waits for nothing
            selected.append(tree_map(itemgetter(index), inputs_and_memory))
            rows += compress(self.rows[self.micro_batch_slices()[i]], mask)
        fields, joined = concatenate_rows(selected)
        memory = split_rows(joined, len(rows), self.context.micro_batch_size)
        chosen = spaced_rows(fraction, len(self.context.rows) * self.context.world.size)
        first = self.micro_batches[0], self.context.placement.fetch(self.memory[:1], 0)
        idle = idle_passes(self.context, chosen, len(memory), *first)
        return Step(self.context, Batch(*fields), memory, self.number, self.scale, rows, idle=idle)

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """Add the gradient of the mean loss to every ``p.grad`` (see Objective). Raises Interrupted
        ("data") or NotFinite ("sampled").
        """
        if labels == "data":
            self.backward_data()
        else:
            self.backward_sampled()
        gradients = finish_gradients(self.parameters, self.scale)
        if labels == "sampled":
            require_finite(self.context.world, gradients)

    def backward_data(self) -> None:
        """Accumulate the gradient of the training loss, and the sampled gradient if wanted."""
        with self.context.shared_casts():
            results = [self.backward_micro_batch(i) for i in range(len(self.micro_batches))]
        self.results, self.next_memory = results, [result.state for result in results]
        for result in idle_results(self.idle, self.run):
            result.loss.backward()

    def sums_over_replicas(self, i: int) -> bool:
        """Whether gradients are summed over replicas of the model with those of micro-batch ``i``:
        once a step. Two gradients at a time cannot be deferred, nor those of a subset, of which
        ranks have unequal numbers of micro-batches.
        """
        is_last = i == len(self.micro_batches) - 1
        return is_last or bool(self.sampling) or self.is_subset

    def backward_micro_batch(self, i: int) -> BatchLoss:
        """Accumulate the gradient of micro-batch ``i``; the result is detached from its graph."""
        if self.context.stopping():
            raise Interrupted
        sampling = None
        if self.sampling and self.samples_labels(i):
            sampling = self.label_sampling(i, self.sampled_rows[i])
        result = self.forward(i, draws=sampling)
        if self.sampled_gradient is not None and result.sampled is not None:
            self.sampled_gradient.accumulate(result.sampled * self.scale)
        with deferred_all_reduce(self.context.loss, not self.sums_over_replicas(i)):
            (result.loss * self.scale).backward()
        state = self.context.placement.keep(result.state)
        return result._replace(loss=result.loss.detach(), state=state, sampled=None)

    def samples_labels(self, i: int) -> bool:
        """Whether any rank samples labels for its micro-batch ``i``: all take part then."""
        size, each = len(self.context.rows), self.context.micro_batch_size
        chosen = spaced_rows(self.sampling, size * self.context.world.size)
        return any(row % size // each == i for row in chosen)

    def backward_sampled(self) -> None:
        """Accumulate the gradient against sampled labels, with a forward pass of its own. Part of
        an update that is already applied, so stop requests are not polled.
        """
        for i in range(len(self.micro_batches)):
            loss = self.forward(i, draws=self.label_sampling(i), cross_entropy_only=True).sampled
            assert loss is not None
            (loss * self.scale).backward()
        for result in idle_results(self.idle, self.run, sample=True, cross_entropy_only=True):
            assert result.sampled is not None
            result.sampled.backward()

    def forward(self, i: int, precision: Precision | None = None, **options: Any) -> BatchLoss:
        """The loss of micro-batch ``i``, by default in the run's precision."""
        state = self.context.placement.fetch(self.memory, i)
        return self.run(self.micro_batches[i], state, precision, **options)

    def run(
        self, batch: Batch, state: Any, precision: Precision | None = None, **options: Any
    ) -> BatchLoss:
        """The loss of some rows. An unsplit batch is divided by its own counts."""
        counts = None
        if self.is_split:
            every_label = self.counts[CROSS_ENTROPY]
            sampled = self.sampled_gradient
            counts = self.counts | {SAMPLED: sampled.count if sampled else every_label}
        with self.context.autocast(precision):
            result: BatchLoss = self.context.loss(batch, state, counts, **options)
        return result

    def label_sampling(self, i: int, rows: Tensor | None = None) -> LabelSampling:
        """Uniform random numbers to sample labels of micro-batch ``i`` with; ``rows``: [B] bool,
        None: all.
        """
        if rows is not None:
            rows = None if rows.all() else self._send(rows)
        return LabelSampling(self.uniforms(i), rows)

    def uniforms(self, i: int) -> Tensor:
        """Random numbers in [0, 1), [B, T] float32, from one stream a global row, so that they do
        not depend on micro-batches.
        """
        length = self.micro_batches[i].inputs.shape[1]
        rows = self.rows[self.micro_batch_slices()[i]]
        drawn = [torch.rand(length, generator=self.random_stream("labels", row)) for row in rows]
        return self._send(torch.stack(drawn))

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator seeded by run seed, step and purpose."""
        return self.random_stream(purpose)

    def random_stream(self, *purpose: int | str) -> torch.Generator:
        """The random stream of this step for a purpose."""
        seed = derive_seed(self.context.seed, "step", self.number, *purpose)
        return torch.Generator().manual_seed(seed)

    def local_totals(self) -> list[Tensor]:
        """The rank's number of correct predictions, and its total of every loss in the order of
        ``counts``, [] float64 each.
        """
        columns = [[result.correct for result in self.results]]
        for name in self.counts:
            columns.append([result.terms[name].total for result in self.results])
        return [sum_scalars([value.detach().double() for value in column]) for column in columns]

    def check_counts(self) -> None:
        """Raise TypeError if a loss counted something else in forward than in ``count(batch)``: a
        split batch would then be averaged over a wrong denominator.
        """
        for name, announced in self.counts.items():
            local = sum_scalars([result.terms[name].count for result in self.results])
            counted = self.context.world.sum(local.clone())
            if int(counted) != int(announced):
                raise TypeError(
                    f"loss {name!r} averaged over {int(counted)} items, but its count(batch)"
                    f" returned {int(announced)}: override count(self, batch), of a layer"
                    " loss_count(self, name, batch), to return the count of forward from the batch"
                    " alone"
                )

    def hessian_vector_product(
        self, params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """The Hessian of the mean training loss times ``vectors``: exact where attention supports a
        double backward pass, else, and on several ranks, by finite differences. Raises NotFinite.
        """
        # float16 has the range neither for second derivatives nor for scaled ones
        dtype, world = self.context.precision.dtype, self.context.world
        exact = supports_double_backward(self.context.loss, world.device, dtype)
        # second derivatives do not reach sharded parameters
        if exact and dtype != torch.float16 and world.size == 1:
            product = exact_hvp(partial(self._losses, create_graph=True), params, vectors)
        else:
            product = finite_difference_hvp(partial(self._losses, FLOAT32), params, vectors)
        require_finite(world, local_tensors(product))
        return product

    def _losses(self, precision: Precision | None = None, **options: Any) -> Iterator[Tensor]:
        """The training loss of every micro-batch in turn."""
        for i in range(len(self.micro_batches)):
            yield self.forward(i, precision, **options).loss
        for result in idle_results(self.idle, self.run, precision=precision, **options):
            yield result.loss


def sum_scalars(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of scalar tensors."""
    return torch.stack(list(tensors)).sum()
