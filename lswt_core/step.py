"""One update's work: the micro-batches of a step, differentiated as often as an optimizer asks, committed only as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.interfaces import Batch, Need, Unsupported
from lswt_core.loss import CROSS_ENTROPY, Loss, Result
from lswt_core.model import Attention
from lswt_core.parallel import Precision, World, spread_rows
from lswt_core.randomness import derive
from lswt_core.tree import join_rows, split_rows, tree_map


class Setting(NamedTuple):
    """What is the same for every step of a run."""

    loss: Loss
    world: World
    precision: Precision
    seed: int
    rows: range  # global rows of this process
    micro_rows: int
    stopping: Callable[[], bool] = lambda: False  # polled between micro-batches


FLOAT32 = Precision(torch.float32, "a difference of gradients drowns in the rounding of anything shorter")


class Interrupted(Exception):
    """The run was asked to stop in the middle of a step; nothing of the step is kept."""


class NotFinite(Exception):
    """A loss or gradient is infinite or not a number; nothing of the step is kept."""


class Step:
    """The micro-batches of one update (implements ``interfaces.Objective``).

    Losses are shares of the whole: every micro-batch is divided by what the step counts over all micro-batches and processes,
    so gradients add up to the gradient of the mean exactly. Memories are read from ``memory`` and staged, never advanced here.
    """

    def __init__(
        self,
        setting: Setting,
        batch: Batch,
        memory: Sequence[Any],
        number: int,
        scale: float = 1.0,
        rows: Sequence[int] | None = None,
    ) -> None:
        """``scale`` multiplies losses while they are differentiated (float16), a power of two; ``rows`` are those of the global
        batch that ``batch`` holds (None: all of this process's).
        """
        self.setting, self.number, self.scale = setting, number, scale
        self.rows: Sequence[int] = setting.rows if rows is None else rows
        self.memory = list(memory)
        self.staged: list[Any] = []
        self.results: list[Result] = []
        device = setting.world.device
        micro = [batch.each(itemgetter(part)) for part in self.slices()]
        counts = [setting.loss.counts(part) for part in micro or [batch]]  # before moving: on the CPU nothing waits for the device
        whole = setting.world.sum(torch.stack([sum_of(column) for column in zip(*(c.values() for c in counts), strict=True)]).to(device))
        self.counts = dict(zip(counts[0], whole, strict=True))
        self.tokens = int(self.counts[CROSS_ENTROPY])
        self.micro = [part.each(lambda tensor: tensor.to(device, non_blocking=True)) for part in micro]
        self.parted = len(micro) > 1 or setting.world.size > 1

    def slices(self) -> list[slice]:
        """Where every micro-batch stands in this process's rows."""
        return [slice(start, start + self.setting.micro_rows) for start in range(0, len(self.rows), self.setting.micro_rows)]

    def part(self, fraction: float) -> Step:
        """The same update over a share of its rows (see Objective), cut into micro-batches anew. Which rows, and what they say, does
        not depend on micro-batches or processes; a process may have none of them.
        """
        chosen = set(spread_rows(fraction, len(self.setting.rows) * self.setting.world.size))
        masks = [[row in chosen for row in self.rows[part]] for part in self.slices()]
        together = [(tuple(part), state) for part, state in zip(self.micro, self.memory, strict=True)]
        kept = [tree_map(lambda t, m=mask: t[m], tree) for tree, mask in zip(together, masks, strict=True)]  # type: ignore[misc]
        fields, memory = join_rows(kept)
        rows = [row for row in self.rows if row in chosen]
        memories = split_rows(memory, len(rows), self.setting.micro_rows)
        return Step(self.setting, Batch(*fields), memories, self.number, self.scale, rows)

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """Add the gradient of the mean loss to every ``p.grad`` (see Objective)."""
        sampled = labels == "sampled"
        results = []
        for i in range(len(self.micro)):
            if not sampled and self.setting.stopping():  # a refresh belongs to an update that is already made: it is finished
                raise Interrupted
            result = self.run(i, uniforms=self.uniforms(i) if sampled else None)
            (result.loss * self.scale).backward()
            results.append(result._replace(loss=result.loss.detach(), state=tree_map(Tensor.detach, result.state)))
        self.setting.world.sum_gradients(p for p in self.setting.loss.parameters() if p.requires_grad)
        gradients = [p.grad for p in self.setting.loss.parameters() if p.grad is not None]
        if self.scale != 1:
            torch._foreach_mul_(gradients, 1 / self.scale)
        if sampled:
            require_finite(gradients)
        else:
            self.results, self.staged = results, [result.state for result in results]

    def run(self, i: int, precision: Precision | None = None, **options: Any) -> Result:
        """The loss of micro-batch ``i``, in the run's precision or another; whole batches divide by what they really counted."""
        with (precision or self.setting.precision).autocast(self.setting.world.device):
            return self.setting.loss(self.micro[i], self.memory[i], self.counts if self.parted else None, **options)

    def uniforms(self, i: int) -> Tensor:
        """Random numbers [B, T] for drawing labels, one stream a global row, whatever the micro-batches."""
        rows = self.rows[self.slices()[i]]
        length = self.micro[i].inputs.shape[1]
        drawn = [torch.rand(length, generator=self.stream("labels", row)) for row in rows]  # float32 from the start: below 1
        return torch.stack(drawn).to(self.setting.world.device)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator that depends on run seed, step and purpose only."""
        return self.stream(purpose)

    def stream(self, *purpose: int | str) -> torch.Generator:
        """The random stream of this step for a purpose."""
        return torch.Generator().manual_seed(derive(self.setting.seed, "step", self.number, *purpose))

    def check_counts(self) -> None:
        """Losses must count what they announced, or a parted batch would be averaged over something else."""
        for name, announced in self.counts.items():
            counted = self.setting.world.sum(sum_of([result.terms[name].count for result in self.results]).clone())
            if int(counted) != int(announced):
                raise TypeError(
                    f"loss {name!r} averaged over {int(counted)} items, but its count(batch) announced {int(announced)}: "
                    "define count(self, batch) so that it tells, from the batch alone, what forward will count"
                )

    # -------------------------------------------------------------------------------------------- second derivatives

    def hessian_vector(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the mean training loss times ``vectors``: exact where attention has a second derivative, else by central
        differences of the gradient.
        """
        half = self.setting.precision.dtype == torch.float16  # whose range holds neither a second derivative nor a scaled one
        product = self.exact if self.twice_differentiable() and not half else self.differences
        found = [self.setting.world.sum(tensor) for tensor in product(params, vectors)]
        require_finite(found)
        return found

    def twice_differentiable(self) -> bool:
        """Whether the attention backend can be differentiated twice."""
        attention = next(module for module in self.setting.loss.modules() if isinstance(module, Attention))
        width = attention.query.out_features // attention.n_heads
        try:
            attention.backend.require(Need(self.setting.world.device.type, self.setting.precision.dtype, width, twice=True))
        except Unsupported:
            return False
        return True

    def exact(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Differentiate the gradient's product with the vectors (Pearlmutter 1994)."""
        total = [torch.zeros_like(p) for p in params]
        for i in range(len(self.micro)):
            loss = self.run(i, twice=True).loss
            gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
            along = sum_of([(g * v).sum() for g, v in zip(gradients, vectors, strict=True)])
            torch._foreach_add_(total, list(torch.autograd.grad(along, params, materialize_grads=True)))
        return total

    def differences(self, params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """(g(w + e v) - g(w - e v)) / 2e with e = 1e-3 |w| / |v|: one order above float32's noise, one below curvature's change.
        Computed in float32 whatever the run's precision. Weights return to the very bits they had.
        """
        originals = [p.detach().clone() for p in params]
        size, length = (torch.stack(torch._foreach_norm(list(ts))).norm() for ts in (originals, vectors))
        epsilon = float(1e-3 * size / length)

        def gradient(shift: float) -> list[Tensor]:
            with moved(params, originals, vectors, shift):
                total = [torch.zeros_like(p) for p in params]
                for i in range(len(self.micro)):
                    found = torch.autograd.grad(self.run(i, FLOAT32).loss, params, materialize_grads=True)
                    torch._foreach_add_(total, list(found))
                return total

        return [(a - b) / (2 * epsilon) for a, b in zip(gradient(epsilon), gradient(-epsilon), strict=True)]


@contextmanager
def moved(params: Sequence[Tensor], originals: Sequence[Tensor], vectors: Sequence[Tensor], shift: float) -> Any:
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


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that learn."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
