"""Checks of losses and optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest import SkipTest

import torch
from torch import Tensor, nn

from lswt_core.checkpoint import Store, verify
from lswt_core.checkpoint.train_state import optimizer_state, restore_optimizer
from lswt_core.conformance.attention_checks import numbers
from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, VOCAB, Subject, distance, tokens
from lswt_core.interfaces import IGNORE, Batch, LossSum, Objective, Optimizer, Output
from lswt_core.train.update import SampledObjective, apply_update, hessian_update_is_due

# ---------- losses


def batch_of(rows: int = 4, length: int = 6, *, padded: bool = True) -> Batch:
    """Tokens, some of them padding, which predicts nothing."""
    inputs, labels = tokens(rows, length), tokens(rows, length, 1)
    if not padded:
        return Batch(inputs, labels)
    valid = torch.rand(rows, length, generator=torch.Generator().manual_seed(2)) < 0.7
    valid[:, 2:4] = True
    return Batch(inputs.where(valid, 0), labels.where(valid, IGNORE), valid=valid)


def needs_of(subject: Subject) -> frozenset[str]:
    """What the loss says that it needs."""
    found: frozenset[str] = getattr(subject.component, "needs", frozenset())
    return found


def output_of(subject: Subject, batch: Batch, *, seed: int = 3) -> Output:
    """States, and logits and their normalisers if the loss says that it needs them."""
    shape, needs = batch.inputs.shape, needs_of(subject)
    states = numbers(*shape, DIMS.d_model, seed=seed).requires_grad_()
    logits = numbers(*shape, VOCAB, seed=seed + 1).requires_grad_()
    logsumexp = (
        logits.detach().logsumexp(-1).masked_fill(batch.labels == IGNORE, 0.0).requires_grad_()
    )
    return Output(
        states, logits if "logits" in needs else None, logsumexp if "logsumexp" in needs else None
    )


def loss_of(subject: Subject, out: Output, batch: Batch) -> LossSum:
    """The loss of a batch."""
    term = subject.layer()(out, batch)
    require(
        isinstance(term, LossSum), f"forward returns {type(term).__name__}, not Term(total, count)"
    )
    return term


def part_of(out: Output, batch: Batch, rows: Any) -> tuple[Output, Batch]:
    """Some rows."""
    return Output(*(None if t is None else t[rows] for t in out)), batch.map(lambda t: t[rows])  # type: ignore[arg-type]


@rule(
    "needs",
    ("loss",),
    why=(
        "logits are computed only if a loss says that it needs them: they are the largest tensor"
        " of all"
    ),
    mend='declare needs = frozenset({"logits"}), {"logsumexp"} or {"states"}, and use nothing else',
)
def needs_honest(subject: Subject) -> None:
    """The loss can be computed from what it declares."""
    batch = batch_of()
    declared = needs_of(subject)
    require(declared <= set(Output._fields), f"needs is {set(declared)}")
    loss_of(subject, output_of(subject, batch), batch)


@rule(
    "count",
    ("loss",),
    why=(
        "the denominator of a whole batch must be known before its first micro-batch is"
        " differentiated"
    ),
    mend="override count(batch) so that it tells what forward will count",
    after=("needs",),
)
def count_honest(subject: Subject) -> None:
    """count(batch) is what forward counts, padded or not."""
    loss = subject.layer()
    for padded in (False, True):
        batch = batch_of(padded=padded)
        told, counted = (
            int(loss.count(batch)),
            int(loss_of(subject, output_of(subject, batch), batch).count),
        )  # type: ignore[operator]
        require(told == counted, f"count() says {told}, forward counts {counted}")


@rule(
    "micro-batches",
    ("loss",),
    why=(
        "a batch that is cut into micro-batches, or spread over processes, must have the loss of"
        " the whole"
    ),
    mend="return the sum as total and what it sums over as count; never a mean",
    after=("count",),
)
def parts_add_up(subject: Subject) -> None:
    """Totals and counts of parts add up, in any order of rows."""
    batch = batch_of()
    out = output_of(subject, batch)
    whole = loss_of(subject, out, batch)
    halves = [loss_of(subject, *part_of(out, batch, rows)) for rows in (slice(0, 1), slice(1, 4))]
    total, count = sum(float(h.total.detach()) for h in halves), sum(int(h.count) for h in halves)
    told = f"parts add up to {total:.6g}, the whole is {float(whole.total.detach()):.6g}"
    require(abs(total - float(whole.total.detach())) <= 1e-9 * max(1, abs(total)), told)
    require(count == int(whole.count), f"parts count {count}, the whole {int(whole.count)}")
    turned = loss_of(subject, *part_of(out, batch, torch.tensor([2, 0, 3, 1])))
    require(
        abs(float((turned.total - whole.total).detach())) <= 1e-9 * max(1, abs(total)),
        "the order of rows changes the total",
    )


@rule(
    "padding",
    ("loss",),
    why="padding is no text: what stands there must change nothing",
    mend="leave out tokens where batch.valid is False (and labels that are IGNORE)",
    after=("needs", "micro-batches"),
)
def padding_is_nothing(subject: Subject) -> None:
    """Other states, logits and ids at padding leave the loss as it was."""
    batch = batch_of()
    out, other = output_of(subject, batch), output_of(subject, batch, seed=20)
    valid = batch.valid
    assert valid is not None
    mixed = [
        None if a is None or b is None else a.where(valid[..., None], b)
        for a, b in zip(out[:2], other[:2], strict=True)
    ]
    changed = Output(mixed[0], mixed[1], out.logsumexp)  # type: ignore[arg-type]  # which is 0 there
    ids = batch._replace(inputs=batch.inputs.where(valid, 7))
    before, after = loss_of(subject, out, batch), loss_of(subject, changed, ids)
    moved = abs(float((before.total - after.total).detach()))
    require(moved <= 1e-9, f"what stands at padding moves the total by {moved:.2g}")
    require(int(before.count) == int(after.count), "what stands at padding moves the count")


@rule(
    "gradcheck",
    ("loss",),
    why="a wrong derivative trains something else than what is written",
    mend="check custom backward functions; keep float64 float64",
    after=("needs",),
)
def loss_derivatives(subject: Subject) -> None:
    """Derivatives agree with differences in float64, and are finite where nothing is valid."""
    batch = batch_of(2, 4)
    out = output_of(subject, batch)
    given = {name: t for name, t in out._asdict().items() if t is not None}
    torch.autograd.gradcheck(
        lambda *g: loss_of(subject, Output(**dict(zip(given, g, strict=True))), batch).total,
        list(given.values()),
    )
    nothing = Batch(
        batch.inputs,
        torch.full_like(batch.labels, IGNORE),
        valid=torch.zeros_like(batch.inputs, dtype=torch.bool),
    )
    out = output_of(subject, nothing)
    total = loss_of(subject, out, nothing).total
    if total.requires_grad:
        total.backward()
        gradients = [t.grad for t in out if t is not None and t.grad is not None]
        require(
            all(g.isfinite().all() for g in gradients),
            "gradients are not finite where a whole batch is padding",
        )


# ---------- optimizers


class Problem(nn.Module):
    """A small regression: two weights that decay, two biases that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = numbers(*parameter.shape, seed=i, dtype=torch.float32) * 0.5

    def loss(self, seed: int) -> Tensor:
        """The squared error on some numbers."""
        x = numbers(16, 4, seed=seed, dtype=torch.float32)
        wanted = torch.stack((x.sum(-1), x[:, 0] * x[:, 1]), -1)
        return (self.second(self.first(x).tanh()) - wanted).square().mean()

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups as the core makes them."""
        named = dict(self.named_parameters())
        decayed, rest = ([n for n in named if n.endswith(end)] for end in ("weight", "bias"))
        return [
            {
                "name": "decayed",
                "params": [named[n] for n in decayed],
                "names": decayed,
                "matrices": decayed,
            },
            {
                "name": "undecayed",
                "params": [named[n] for n in rest],
                "names": rest,
                "matrices": [],
                "weight_decay": 0.0,
            },
        ]


class Curvature:
    """The objective of a step, for second-order optimizers: the problem's own gradients and
    Hessian.
    """

    tokens = 16

    def __init__(self, problem: Problem, step: int) -> None:
        self.problem, self.step = problem, step

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """Add the gradient; sampled labels are stood in for by other inputs."""
        seed = self.step if labels == "data" else self.step + 1000
        with torch.enable_grad():
            self.problem.loss(seed).backward()

    @property
    def sampled(self) -> SampledObjective:
        """The part of the objective that an optimizer may use that shares the forward pass."""
        return SampledCurvature(self)

    def hessian_vector_product(
        self, params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """The Hessian times some vectors."""
        with torch.enable_grad():
            first = torch.autograd.grad(
                self.problem.loss(self.step), list(params), create_graph=True
            )
            return list(torch.autograd.grad(first, list(params), list(vectors)))

    def generator(self, purpose: str) -> torch.Generator:
        """Randomness of this step."""
        return torch.Generator().manual_seed(self.step)

    def subset(self, fraction: float) -> Objective:
        """All of it: it is small."""
        return self


class SampledCurvature:
    """Sampled gradients alone, for optimizers that share the forward pass."""

    def __init__(self, objective: Curvature) -> None:
        self.objective, self.tokens = objective, objective.tokens

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """Add the sampled gradient."""
        self.objective.backward("sampled")

    def subset(self, fraction: float) -> SampledObjective:
        """All of it: it is small."""
        return self


def optimizer_of(subject: Subject, problem: Problem, **options: Any) -> Optimizer:
    """The optimizer over the problem's parameters."""
    given = {"lr": 0.02} | options
    known = {
        name: value
        for name, value in given.items()
        if subject.has_option(name) and name not in subject.options
    }
    subject.make(problem.groups())  # skips where options are missing
    build: Any = subject.component
    made: Optimizer = build(problem.groups(), **subject.options, **known)
    return made


def advance(problem: Problem, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """Updates as the trainer makes them, curvature included."""
    for step in steps:
        due = hessian_update_is_due(optimizer, step)
        optimizer.zero_grad()
        objective, params = Curvature(problem, step), list(problem.parameters())
        apply_update(optimizer, objective, params, update_hessian=due)


def values(problem: Problem) -> list[Tensor]:
    """All parameters, copied."""
    return [p.detach().clone() for p in problem.parameters()]


def moved(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest change."""
    return max(distance(a, b) for a, b in zip(before, after, strict=True))


@rule(
    "replay",
    ("optimizer",),
    why=(
        "the same run must give the same bits, and global generators stand elsewhere in every"
        " process"
    ),
    mend="draw from objective.generator(purpose), which depends on seed and step alone",
)
def replays(subject: Subject) -> None:
    """Two runs give the same bits, however the global generator stands."""
    found = []
    for stand in (1, 2):
        torch.manual_seed(stand)
        problem = Problem()
        advance(problem, optimizer_of(subject, problem), range(12))
        found.append(values(problem))
    require(
        moved(*found) == 0,
        f"the same updates differ by {moved(*found):.2g} when the global generator stands"
        " elsewhere",
    )


@rule(
    "resume",
    ("optimizer",),
    why="a run that is killed and resumed must end with the same bits",
    mend=(
        "keep everything in self.state[parameter] or in the groups, nothing in attributes: tensors,"
        " numbers, texts, and lists, tuples and dicts of those"
    ),
    after=("replay",),
)
def resumes(subject: Subject) -> None:
    """Saved to files and loaded in the middle, as a run does, it goes on bitwise."""
    whole = Problem()
    advance(whole, optimizer_of(subject, whole), range(14))
    problem = Problem()
    optimizer = optimizer_of(subject, problem)
    advance(problem, optimizer, range(6))
    with optimizer.eval_parameters(), TemporaryDirectory() as directory:
        moments, document = optimizer_state(optimizer)
        written = Store(Path(directory) / "checkpoints").save(
            6, {"optimizer": moments}, {"optimizer": document}
        )
        saved = verify(written)
        held, document = saved.tensors("optimizer"), saved.document("optimizer")
        weights = values(problem)
    other = Problem()
    for parameter, value in zip(other.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    again = optimizer_of(subject, other)
    restore_optimizer(again, held, document)
    advance(other, again, range(6, 14))
    off = moved(values(whole), values(other))
    require(off == 0, f"after saving and loading it ends {off:.2g} elsewhere")


@rule(
    "learning rate",
    ("optimizer",),
    why="the schedule sets lr of every group before every step",
    mend='multiply updates by group["lr"]',
    after=("replay", "refresh"),
)
def obeys_the_rate(subject: Subject) -> None:
    """With a rate of zero nothing moves, and with another rate something does."""
    problem = Problem()
    optimizer = optimizer_of(subject, problem)
    before = values(problem)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    advance(problem, optimizer, range(1))
    require(
        moved(before, values(problem)) == 0,
        f"with lr = 0 parameters move by {moved(before, values(problem)):.2g}",
    )


@rule(
    "decay",
    ("optimizer",),
    why="biases, norms and embeddings do not decay: their group says weight_decay = 0",
    mend='take weight_decay from the group: group["weight_decay"]',
    after=("learning rate",),
)
def obeys_the_groups(subject: Subject) -> None:
    """Where there is no gradient, a group without decay stays, and one with decay shrinks if the
    optimizer has decay at all.
    """
    problem = Problem()
    optimizer = optimizer_of(subject, problem, weight_decay=0.5)
    before = dict(zip((n for n, _ in problem.named_parameters()), values(problem), strict=True))
    for parameter in problem.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in problem.named_parameters():
        off = distance(parameter, before[name])
        require(
            not name.endswith("bias") or off == 0,
            f"{name}, whose group has no decay, moves by {off:.2g} without a gradient",
        )
        if subject.has_option("weight_decay") and name.endswith("weight"):
            require(
                float(parameter.detach().norm()) < float(before[name].norm()),
                f"{name} does not shrink although weight_decay is 0.5",
            )


@rule(
    "descent",
    ("optimizer",),
    why="an optimizer that does not lower the loss of a small problem will not train a model",
    mend="check signs, bias corrections and the scale of updates",
    after=("learning rate", "resume"),
)
def descends(subject: Subject) -> None:
    """Sixty updates lower the loss of a small regression by a third."""
    problem = Problem()
    optimizer = optimizer_of(subject, problem, weight_decay=0.0)
    before = float(problem.loss(5000).detach())
    advance(problem, optimizer, range(60))
    with optimizer.eval_parameters():
        after = float(problem.loss(5000).detach())
    require(after < before * 2 / 3, f"sixty updates take the loss from {before:.3g} to {after:.3g}")


@rule(
    "refresh",
    ("optimizer",),
    why=(
        "the trainer looks at the curvature after an update: weights must be as the update left"
        " them"
    ),
    mend="read gradients in refresh, change only the optimizer's own state",
    after=("replay",),
)
def refreshes(subject: Subject) -> None:
    """A refresh moves no parameter, and changes the state it is meant for."""
    problem = Problem()
    optimizer = optimizer_of(subject, problem)
    if not optimizer.hessian_update_interval:
        raise SkipTest("it does not look at the curvature (hessian_update_interval is 0)")
    # an update without a refresh
    advance(problem, optimizer, [optimizer.hessian_update_interval + 1])
    before, kept = values(problem), [t.clone() for t in optimizer_state(optimizer)[0].values()]
    optimizer.update_curvature(Curvature(problem, 0))
    require(moved(before, values(problem)) == 0, "refresh moves parameters")
    after = list(optimizer_state(optimizer)[0].values())
    require(
        len(after) != len(kept)
        or any(not torch.equal(a, b) for a, b in zip(kept, after, strict=True)),
        "refresh changes no state",
    )
