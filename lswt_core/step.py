"""One update's work: the micro-batches of a step, differentiated as often as an optimizer asks, committed only as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from copy import copy
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.interfaces import Batch, Need, Unsupported
from lswt_core.loss import CROSS_ENTROPY, Loss, Result
from lswt_core.model import Attention
from lswt_core.parallel import Precision, World
from lswt_core.randomness import derive
from lswt_core.tree import tree_map


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
    ``scale`` is a power of two that keeps short numbers away from zero on their way back (see LossScale).
    """

    def __init__(self, setting: Setting, batch: Batch, memory: Sequence[Any], number: int, scale: float = 1.0) -> None:
        self.setting, self.number, self.scale = setting, number, scale
        self.memory = list(memory)
        self.staged: list[Any] = []
        self.results: list[Result] = []
        slices = [slice(start, start + setting.micro_rows) for start in range(0, len(batch.inputs), setting.micro_rows)]
        self.rows: list[Sequence[int]] = [setting.rows[part] for part in slices]  # global rows of every micro-batch
        micro = [batch.each(itemgetter(part)) for part in slices]
        self.count(micro)  # before moving: on the CPU nothing waits for the device
        self.micro = [part.each(lambda tensor: tensor.to(setting.world.device, non_blocking=True)) for part in micro]
        self.parted = len(micro) > 1 or setting.world.size > 1

    def count(self, micro: Sequence[Batch]) -> None:
        """Note what the losses will count over all micro-batches and processes."""
        counts = [self.setting.loss.counts(part) for part in micro]
        local = torch.stack([sum_of(column) for column in zip(*(c.values() for c in counts), strict=True)])
        self.counts = dict(zip(counts[0], self.setting.world.sum(local.to(self.setting.world.device)), strict=True))
        self.tokens = int(self.counts[CROSS_ENTROPY])

    def part(self, share: float) -> Step:
        """The same over a share of the rows (see Objective)."""
        total = len(self.setting.rows) * self.setting.world.size
        used = max(1, round(share * total))
        first = int(torch.randint(total, (), generator=self.stream("part")))
        # Of any `total` rows in a row exactly `used` pass, and they are as evenly spaced as can be: processes share the work.
        kept = [[i for i, row in enumerate(rows) if (row + first) * used % total < used] for rows in self.rows]
        micro = [batch.each(itemgetter(places)) for batch, places in zip(self.micro, kept, strict=True)]
        part, filled = copy(self), [i for i, places in enumerate(kept) if places]
        part.count(micro)
        part.micro = [micro[i] for i in filled]
        part.rows = [[self.rows[i][place] for place in kept[i]] for i in filled]
        part.memory = [tree_map(itemgetter(kept[i]), self.memory[i]) for i in filled]
        return part

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
            torch._foreach_div_(gradients, self.scale)
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
        length = self.micro[i].inputs.shape[1]
        drawn = [torch.rand(length, generator=self.stream("labels", row)) for row in self.rows[i]]  # float32 from the start: below 1
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
        product = self.exact if self.twice_differentiable() else self.differences
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
        """Differentiate the gradient's product with the vectors (Pearlmutter 1994). Not in float16, where it would underflow."""
        precision = FLOAT32 if self.setting.precision.dtype == torch.float16 else self.setting.precision
        total = [torch.zeros_like(p) for p in params]
        for i in range(len(self.micro)):
            loss = self.run(i, precision, twice=True).loss
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
