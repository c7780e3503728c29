"""One update's work: the micro-batches of a step, differentiated as often as an optimizer asks,
committed only as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import compress
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lswt_core.device import Precision
from lswt_core.distributed.world import World, spaced_rows
from lswt_core.interfaces import (
    AttentionRequirements,
    Batch,
    LabelSampling,
    Objective,
    Optimizer,
    Unsupported,
)
from lswt_core.model.attention import Attention
from lswt_core.model.parameters import trainable_parameters
from lswt_core.model.train_module import (
    CROSS_ENTROPY,
    SAMPLED,
    BatchLoss,
    TrainModule,
    count_labels,
)
from lswt_core.plugin_api.pytree import concatenate_rows, detach_state, split_rows, tree_map
from lswt_core.plugin_api.seeding import derive_seed


class StepContext(NamedTuple):
    """What is the same for every step of a run."""

    loss: TrainModule
    world: World
    precision: Precision
    seed: int
    rows: range  # global rows of this process
    micro_batch_size: int
    stopping: Callable[[], bool] = lambda: False  # polled between micro-batches


FLOAT32 = Precision(
    torch.float32, "a difference of gradients drowns in the rounding of anything shorter"
)


class Sampled:
    """The gradient towards labels that the model draws itself, taken along with that of the data
    (implements ``interfaces.Objective`` for an optimizer that shares the forward pass).
    """

    def __init__(self, setting: StepContext, fraction: float, count: Tensor, scale: float) -> None:
        self.setting, self.fraction, self.count, self.scale = setting, fraction, count, scale
        self.parameters = trainable_parameters(setting.loss)
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)

    @cached_property
    def tokens(self) -> int:
        """Labels that were drawn, over all micro-batches and ranks; the device is waited for."""
        return int(self.count)

    def add(self, loss: Tensor) -> None:
        """Take a micro-batch's share, and leave its graph for the data's."""
        found = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        self.gradients = [
            a if b is None else b if a is None else a.add_(b)
            for a, b in zip(self.gradients, found, strict=True)
        ]

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """Hand over, as every ``p.grad``, what was taken."""
        assert labels == "sampled", "the data's gradient is the step's"
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        self.gradients = []
        require_finite(collected(self.setting, self.scale))

    def subset(self, fraction: float) -> Sampled:
        """Itself: it was taken of that part."""
        assert fraction == self.fraction
        return self

    def hessian_vector_product(
        self, params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """There is none."""
        raise Unsupported(
            "an optimizer that shares the forward pass (shares_forward) takes sampled gradients,"
            " not Hessian products"
        )

    def generator(self, purpose: str) -> torch.Generator:
        """There is none."""
        raise Unsupported(
            "an optimizer that shares the forward pass (shares_forward) draws nothing itself"
        )


def collected(setting: StepContext, scale: float) -> list[Tensor]:
    """Every gradient, summed over all processes and without the scale of the losses."""
    setting.world.sum_gradients(trainable_parameters(setting.loss))
    gradients = [p.grad for p in trainable_parameters(setting.loss) if p.grad is not None]
    if scale != 1:
        torch._foreach_mul_(gradients, 1 / scale)
    return gradients


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, []."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip(parameters: Sequence[Tensor], norm: Tensor, value: float, bound: float | None) -> None:
    """Scale gradients down to a bound on their ``norm``, whose ``value`` the host knows already:
    where it is small enough, which is most of the time, they are not touched.
    """
    if bound and value > bound * (1 - 1e-4):  # close to the bound torch decides
        torch.nn.utils.clip_grads_with_norm_(parameters, bound, norm)


def update_curvature(
    optimizer: Optimizer, objective: Objective, parameters: Sequence[Tensor]
) -> None:
    """Let an optimizer look at the curvature, the gradients that there are being put aside."""
    held = [p.grad for p in parameters]
    optimizer.zero_grad()
    try:
        optimizer.update_curvature(objective)
    finally:
        for p, gradient in zip(parameters, held, strict=True):
            p.grad = gradient


class Interrupted(Exception):
    """The run was asked to stop in the middle of a step; nothing of the step is kept."""


class NotFinite(Exception):
    """A loss or gradient is infinite or not a number; nothing of the step is kept."""


class Step:
    """The micro-batches of one update (implements ``interfaces.Objective``).

    Losses are shares of the whole: every micro-batch is divided by what the step counts over all
    micro-batches and processes, so gradients add up to the gradient of the mean exactly. Memories
    are read from ``memory`` and staged, never advanced here.
    """

    def __init__(
        self,
        setting: StepContext,
        batch: Batch,
        memory: Sequence[Any],
        number: int,
        scale: float = 1.0,
        rows: Sequence[int] | None = None,
        sampling: float = 0.0,
    ) -> None:
        """``scale`` multiplies losses while they are differentiated (float16), a power of two;
        ``rows`` are those of the global batch that ``batch`` holds (None: all of this process's).
        ``sampling`` is the share of rows of which ``backward("data")`` takes the gradient towards
        drawn labels along, from the same forward pass, into ``sampled``.
        """
        self.setting, self.number, self.scale = setting, number, scale
        self.rows: Sequence[int] = setting.rows if rows is None else rows
        self.memory = list(memory)
        self.staged: list[Any] = []
        self.results: list[BatchLoss] = []
        device = setting.world.device
        micro = [batch.map(itemgetter(part)) for part in self.slices()]
        # [B] bool: whose labels are drawn
        self.draws = [torch.tensor(mask) for mask in self.masks(sampling)] if sampling else []
        # before moving: on the CPU nothing waits for the device
        counts = [setting.loss.counts(part) for part in micro or [batch]]
        for part, drawn, count in zip(micro, self.draws, counts, strict=False):
            count[SAMPLED] = count_labels(part, drawn)
        whole = setting.world.sum(
            torch.stack(
                [sum_of(column) for column in zip(*(c.values() for c in counts), strict=True)]
            ).to(device)
        )
        self.counts = dict(zip(counts[0], whole, strict=True))
        self.sampled = (
            Sampled(setting, sampling, self.counts.pop(SAMPLED), scale) if sampling else None
        )
        self.micro = [
            part.map(lambda tensor: tensor.to(device, non_blocking=True)) for part in micro
        ]
        self.parted = len(micro) > 1 or setting.world.size > 1

    @cached_property
    def tokens(self) -> int:
        """Labels predicted, over all micro-batches and ranks; the device is waited for."""
        return int(self.counts[CROSS_ENTROPY])

    def slices(self) -> list[slice]:
        """Where every micro-batch stands in this process's rows."""
        return [
            slice(start, start + self.setting.micro_batch_size)
            for start in range(0, len(self.rows), self.setting.micro_batch_size)
        ]

    def subset(self, fraction: float) -> Step:
        """The same update over a share of its rows (see Objective), cut into micro-batches anew.
        Which rows, and what they say, does not depend on micro-batches or processes; a process may
        have none of them.
        """
        masks = self.masks(fraction)
        together = [
            (tuple(part), state) for part, state in zip(self.micro, self.memory, strict=True)
        ]
        detach_state = [
            tree_map(lambda t, m=mask: t[m], tree)
            for tree, mask in zip(together, masks, strict=True)
        ]  # type: ignore[misc]
        fields, memory = concatenate_rows(detach_state)
        rows = [
            row
            for part, mask in zip(self.slices(), masks, strict=True)
            for row in compress(self.rows[part], mask)
        ]
        memories = split_rows(memory, len(rows), self.setting.micro_batch_size)
        return Step(self.setting, Batch(*fields), memories, self.number, self.scale, rows)

    def masks(self, fraction: float) -> list[list[bool]]:
        """For every micro-batch, which of its rows are of a share of all, the same whatever
        micro-batches and processes.
        """
        chosen = set(spaced_rows(fraction, len(self.setting.rows) * self.setting.world.size))
        return [[row in chosen for row in self.rows[part]] for part in self.slices()]

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """Add the gradient of the mean loss to every ``p.grad`` (see Objective)."""
        self.backward_data() if labels == "data" else self.backward_sampled()
        gradients = collected(self.setting, self.scale)
        if labels == "sampled":
            require_finite(gradients)

    def backward_data(self) -> None:
        """The training loss, and what is sampled along with it."""
        results = [self.differentiate(i) for i in range(len(self.micro))]
        self.results, self.staged = results, [result.state for result in results]

    def differentiate(self, i: int) -> BatchLoss:
        """Add micro-batch ``i``'s gradient; what is left of it holds nothing of its graph."""
        if self.setting.stopping():
            raise Interrupted
        draws = self.drawing(i, self.draws[i]) if self.draws and self.draws[i].any() else None
        result = self.run(i, draws=draws)
        if self.sampled is not None and result.sampled is not None:
            self.sampled.add(result.sampled * self.scale)
        (result.loss * self.scale).backward()
        return result._replace(
            loss=result.loss.detach(), state=detach_state(result.state), sampled=None
        )

    def backward_sampled(self) -> None:
        """The cross-entropy of drawn labels alone, by a forward pass of its own. It belongs to an
        update that is already made, and so is finished whoever asks to stop.
        """
        for i in range(len(self.micro)):
            found = self.run(i, draws=self.drawing(i), cross_entropy_only=True).sampled
            assert found is not None
            (found * self.scale).backward()

    def run(self, i: int, precision: Precision | None = None, **options: Any) -> BatchLoss:
        """The loss of micro-batch ``i``, in the run's precision or another; whole batches divide by
        what they really counted.
        """
        sampled = self.counts[CROSS_ENTROPY] if self.sampled is None else self.sampled.count
        counts = self.counts | {SAMPLED: sampled} if self.parted else None
        with (precision or self.setting.precision).autocast(self.setting.world.device):
            return self.setting.loss(self.micro[i], self.memory[i], counts, **options)

    def drawing(self, i: int, rows: Tensor | None = None) -> LabelSampling:
        """How labels of micro-batch ``i`` are drawn, for some of its rows [B] or for all."""
        return LabelSampling(
            self.uniforms(i),
            None if rows is None or rows.all() else rows.to(self.setting.world.device),
        )

    def uniforms(self, i: int) -> Tensor:
        """Random numbers [B, T] for drawing labels, one stream a global row, whatever the
        micro-batches.
        """
        rows = self.rows[self.slices()[i]]
        length = self.micro[i].inputs.shape[1]
        # float32 from the start: below 1
        drawn = [torch.rand(length, generator=self.stream("labels", row)) for row in rows]
        return torch.stack(drawn).to(self.setting.world.device)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator that depends on run seed, step and purpose only."""
        return self.stream(purpose)

    def stream(self, *purpose: int | str) -> torch.Generator:
        """The random stream of this step for a purpose."""
        return torch.Generator().manual_seed(
            derive_seed(self.setting.seed, "step", self.number, *purpose)
        )

    def check_counts(self) -> None:
        """Losses must count what they announced, or a parted batch would be averaged over something
        else.
        """
        for name, announced in self.counts.items():
            counted = self.setting.world.sum(
                sum_of([result.terms[name].count for result in self.results]).clone()
            )
            if int(counted) != int(announced):
                raise TypeError(
                    f"loss {name!r} averaged over {int(counted)} items, but its count(batch)"
                    f" announced {int(announced)}: define count(self, batch) so that it tells, from"
                    " the batch alone, what forward will count"
                )

    # ---------- second derivatives

    def hessian_vector_product(
        self, params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """The Hessian of the mean training loss times ``vectors``: exact where attention has a
        second derivative, else by central differences of the gradient.
        """
        # whose range holds neither a second derivative nor a scaled one
        half = self.setting.precision.dtype == torch.float16
        product = self.exact if self.twice_differentiable() and not half else self.differences
        found = [self.setting.world.sum(tensor) for tensor in product(params, vectors)]
        require_finite(found)
        return found

    def twice_differentiable(self) -> bool:
        """Whether the attention backend can be differentiated twice."""
        attention = next(
            module for module in self.setting.loss.modules() if isinstance(module, Attention)
        )
        width = attention.query.out_features // attention.n_heads
        try:
            attention.backend.require(
                AttentionRequirements(
                    self.setting.world.device.type,
                    self.setting.precision.dtype,
                    width,
                    double_backward=True,
                )
            )
        except Unsupported:
            return False
        return True

    def exact(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Differentiate the gradient's product with the vectors (Pearlmutter 1994)."""
        total = [torch.zeros_like(p) for p in params]
        for i in range(len(self.micro)):
            loss = self.run(i, create_graph=True).loss
            gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
            along = sum_of([(g * v).sum() for g, v in zip(gradients, vectors, strict=True)])
            torch._foreach_add_(
                total, list(torch.autograd.grad(along, params, materialize_grads=True))
            )
        return total

    def differences(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """(g(w + e v) - g(w - e v)) / 2e with e = 1e-3 |w| / |v|: one order above float32's noise,
        one below curvature's change. Computed in float32 whatever the run's precision. Weights
        return to the very bits they had.
        """
        originals = [p.detach().clone() for p in params]
        size, length = (
            torch.stack(torch._foreach_norm(list(ts))).norm() for ts in (originals, vectors)
        )
        epsilon = float(1e-3 * size / length)

        def gradient(shift: float) -> list[Tensor]:
            with moved(params, originals, vectors, shift):
                total = [torch.zeros_like(p) for p in params]
                for i in range(len(self.micro)):
                    found = torch.autograd.grad(
                        self.run(i, FLOAT32).loss, params, materialize_grads=True
                    )
                    torch._foreach_add_(total, list(found))
                return total

        return [
            (a - b) / (2 * epsilon)
            for a, b in zip(gradient(epsilon), gradient(-epsilon), strict=True)
        ]


@contextmanager
def moved(
    params: Sequence[Tensor], originals: Sequence[Tensor], vectors: Sequence[Tensor], shift: float
) -> Any:
    """Parameters a little along the vectors, and back."""
    try:
        with torch.no_grad():
            for p, original, vector in zip(params, originals, vectors, strict=True):
                p.copy_(original + shift * vector)
        yield
    finally:
        with torch.no_grad():
            for p, original in zip(params, originals, strict=True):
                p.copy_(original)


def require_finite(tensors: Sequence[Tensor]) -> None:
    """Raise NotFinite if any number is not."""
    if not torch.isfinite(torch.stack(torch._foreach_norm(list(tensors)))).all():
        raise NotFinite


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of scalars."""
    return torch.stack(list(tensors)).sum()
