"""Small components that are wrong in one way each, and the check that is meant to find it (``MEANT``)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lswt_core.cross_entropy import dense
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    AttentionBackend,
    AuxiliaryLoss,
    Batch,
    Bias,
    CrossEntropy,
    DataSource,
    DenseBias,
    Dims,
    Document,
    Draws,
    FeedForward,
    HeadNorm,
    Horizon,
    Memory,
    Norm,
    Optimizer,
    Output,
    Part,
    PositionalEncoding,
    Project,
    RunInfo,
    Schedule,
    Score,
    Segment,
    SlopeBias,
    State,
    Term,
    Tokenizer,
    Tracker,
)
from lswt_core.parts import scores

MEANT: dict[str, str] = {}  # class name -> check
CITED = "@misc{mutant, title={A mutant}}"


def meant(check: str) -> Any:
    """Note which check is to find a class."""

    def note(cls: type) -> type:
        MEANT[cls.__name__] = check
        return cls

    return note


class Layer(FeedForward):
    """A right layer for mutants to spoil."""

    citation = CITED

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.fc = nn.Linear(dims.d_model, dims.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


@meant("documentation")
class Silent(Layer, FeedForward):
    name = "silent"


@meant("citation")
class Unquotable(Layer, FeedForward):
    """Says nothing of where it comes from."""

    name, citation = "unquotable", ""


@meant("options")
class Untyped(Layer, FeedForward):
    """Its option has a value that its type forbids."""

    name = "untyped"

    def __init__(self, dims: Dims, *, scale: int = 0.5) -> None:  # type: ignore[assignment]
        super().__init__(dims)


@meant("meta")
class Unfilled(Layer, FeedForward):
    """A buffer that is computed when it is built, where there is no memory, and never again."""

    name = "unfilled"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("table", torch.ones(dims.d_model), persistent=False)

    def reset_parameters(self) -> None:
        """Forgets the table."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.table.nan_to_num(1.0).sign()


@meant("initialisation")
class Careless(Layer, FeedForward):
    """Its table is drawn from Python's generator."""

    name = "careless"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.scale = nn.Parameter(torch.empty(dims.d_model))

    def reset_parameters(self) -> None:
        """Draw from a generator that nobody seeds."""
        nn.init.constant_(self.scale, 1 + random.random())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@meant("state dict")
class Forgetful(Layer, FeedForward):
    """A random table that no checkpoint holds."""

    name = "forgetful"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("table", torch.empty(dims.d_model), persistent=False)

    def reset_parameters(self) -> None:
        """Draw it."""
        self.table.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.table


@meant("randomness")
class Noisy(Layer, FeedForward):
    """Draws a number in every pass, and does not even use it."""

    name = "noisy"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.rand(()).to(x)


@meant("shapes")
class Widening(Layer, FeedForward):
    """Gives float64, whatever it is given."""

    name = "widening"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


@meant("position-wise")
class Clairvoyant(Layer, FeedForward):
    """Adds the mean over all tokens, later ones included."""

    name = "clairvoyant"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(1, keepdim=True)


@meant("position-wise")
class Counting(Norm):
    """Scales tokens by their place."""

    name, citation = "counting", CITED

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)
        return x * (1 + 0.1 * places)[:, None]


@meant("rows")
class Crowded(Layer, FeedForward):
    """Subtracts the mean over rows."""

    name = "crowded"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5 * x.mean(0, keepdim=True))


@meant("gradcheck")
class Short(HeadNorm):
    """Takes a detour over float32."""

    name, citation = "short", CITED

    def forward(self, x: Tensor) -> Tensor:
        return x.float().tanh().to(x.dtype)


@meant("gradients")
class Idle(Layer, FeedForward):
    """Has a parameter that is of no use."""

    name = "idle"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.spare = nn.Parameter(torch.empty(3))

    def reset_parameters(self) -> None:
        """Fill it all the same."""
        nn.init.ones_(self.spare)


@meant("bfloat16")
class Cancelling(Layer, FeedForward):
    """Adds a number that bfloat16 cannot hold beside small ones."""

    name = "cancelling"

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) + 300.0) - 300.0


@meant("compile")
class Looking(Layer, FeedForward):
    """Looks at a value."""

    name = "looking"

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found if found.abs().max().item() < 1e9 else found * 0


@meant("hidden state")
class Selfish(Memory):
    """Keeps keys and values on itself."""

    name, citation = "selfish", CITED

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length
        self.kept: Any = None

    def forward(self, x: Tensor, at: Tensor, state: State, project: Project) -> tuple[list[Segment], State]:
        *others, new = project(x, at)
        k, v = new.k.detach(), new.v.detach()
        if state is not None:
            old = self.kept
            others.append(Segment(*old, torch.arange(-old[0].shape[1], 0)))
            k, v = torch.cat((old[0], k), 1), torch.cat((old[1], v), 1)
        self.kept = k, v
        return [*others, new], k


def keep(new: Segment, state: State) -> tuple[list[Segment], tuple[Tensor, Tensor]]:
    """What a right memory does."""
    k, v = new.k.detach(), new.v.detach()
    if state is None:
        return [new], (k, v)
    old = Segment(state[0], state[1], torch.arange(-state[0].shape[1], 0))
    return [old, new], (torch.cat((state[0], k), 1), torch.cat((state[1], v), 1))


@meant("causality")
class Peeking(Memory):
    """Every token meets the next one's value."""

    name, citation = "peeking", CITED

    def forward(self, x: Tensor, at: Tensor, state: State, project: Project) -> tuple[list[Segment], State]:
        *others, new = project(x, at)
        return [*others, new._replace(v=new.v.roll(-1, 1))], None


@meant("state")
class Sideways(Memory):
    """Puts tokens before rows in its state."""

    name, citation = "sideways", CITED

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(self, x: Tensor, at: Tensor, state: State, project: Project) -> tuple[list[Segment], State]:
        *_, new = project(x, at)
        upright = None if state is None else tuple(t.transpose(0, 1) for t in state)
        segments, following = keep(new, upright)
        return segments, tuple(t.transpose(0, 1) for t in following)


@meant("state")
class Attached(Memory):
    """Lets gradients into the past."""

    name, citation = "attached", CITED

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(self, x: Tensor, at: Tensor, state: State, project: Project) -> tuple[list[Segment], State]:
        *_, new = project(x, at)
        segments, _ = keep(new, state)
        return segments, (torch.cat([s.k for s in segments], 1), torch.cat([s.v for s in segments], 1))


@meant("state")
class Numbered(Memory):
    """Counts its calls in its state."""

    name, citation = "numbered", CITED

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(self, x: Tensor, at: Tensor, state: State, project: Project) -> tuple[list[Segment], State]:
        *_, new = project(x, at)
        segments, following = keep(new, None if state is None else state[0])
        return segments, (following, 0 if state is None else state[1] + 1)


@meant("streaming")
class Misplaced(Memory):
    """Gives remembered tokens coordinates that are one off."""

    name, citation = "misplaced", CITED

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(self, x: Tensor, at: Tensor, state: State, project: Project) -> tuple[list[Segment], State]:
        *_, new = project(x, at)
        segments, following = keep(new, state)
        return [s if s is new else s._replace(at=s.at - 1) for s in segments], following  # type: ignore[operator]


@meant("streaming")
class Indexed(PositionalEncoding):
    """Turns tokens by their index in the tensor."""

    name, citation = "indexed", CITED

    def rotate(self, x: Tensor, at: Tensor) -> Tensor:
        return x * (1 + torch.arange(x.shape[1], dtype=x.dtype))[:, None, None]


@meant("causality")
class Averaging(PositionalEncoding):
    """Adds the mean of all tokens to the input."""

    name, citation = "averaging", CITED

    def embed(self, x: Tensor, at: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


@meant("bias")
class Unplaced(PositionalEncoding):
    """Biases by index instead of coordinate."""

    name, citation, biased = "unplaced", CITED, True

    def bias(self, q: Tensor, q_at: Tensor, k_at: Tensor) -> Bias:
        return DenseBias((q_at[:, None] - torch.arange(len(k_at))[None]).to(q.dtype) * -0.1)


class Lying(SlopeBias):
    """Slopes that are not what it is made of."""

    def dense(self) -> Tensor:
        return super().dense() * 2


@meant("bias")
class TwoFaced(PositionalEncoding):
    """Its bias is one thing as slopes and another as numbers."""

    name, citation, biased = "two-faced", CITED, True

    def bias(self, q: Tensor, q_at: Tensor, k_at: Tensor) -> Bias:
        return Lying(torch.tensor([0.1, 0.2], dtype=q.dtype), q_at, k_at)


def attend(parts: Sequence[Part], weights: Tensor) -> Tensor:
    """Values weighed."""
    values = torch.cat([part.v for part in parts], 1).transpose(1, 2)
    return (weights.to(values.dtype) @ values).transpose(1, 2)


@meant("oracle")
class Shifted(AttentionBackend):
    """Its mask is off by one: every token sees the next."""

    name, citation = "shifted", CITED

    def forward(self, parts: Sequence[Part]) -> Tensor:
        found = [scores(p._replace(causal=False)) for p in parts]
        size = parts[-1].q.shape[1]
        found[-1] = found[-1].masked_fill(torch.ones(size, size, dtype=torch.bool).triu(2), -torch.inf)
        return attend(parts, torch.cat(found, -1).softmax(-1))


@meant("oracle")
class Unscaled(AttentionBackend):
    """Forgets 1/sqrt(D)."""

    name, citation = "unscaled", CITED

    def forward(self, parts: Sequence[Part]) -> Tensor:
        return attend(parts, torch.cat([scores(p._replace(q=p.q * p.q.shape[-1] ** 0.5)) for p in parts], -1).softmax(-1))


@meant("oracle")
class Borderless(AttentionBackend):
    """Does not keep documents apart, and does not say so."""

    name, citation = "borderless", CITED

    def forward(self, parts: Sequence[Part]) -> Tensor:
        return attend(parts, torch.cat([scores(p._replace(starts=None)) for p in parts], -1).softmax(-1))


@meant("low precision")
class Coarse(AttentionBackend):
    """Rounds its scores to bfloat16 where the input is."""

    name, citation = "coarse", CITED

    def forward(self, parts: Sequence[Part]) -> Tensor:
        found = torch.cat([scores(p) for p in parts], -1)
        narrow = found if parts[0].q.dtype != torch.bfloat16 else (found * 4).round() / 4
        return attend(parts, narrow.softmax(-1))


class Scoring(CrossEntropy):
    """A right cross-entropy for mutants to spoil."""

    def forward(self, z: Tensor, table: Tensor, labels: Tensor, draws: Draws | None = None, *, normaliser: bool = False) -> Score:
        return dense(z, table, labels, draws, normaliser=normaliser)

    def logits_at_once(self, device: str, tokens: int, table: Tensor) -> int:
        return tokens * len(table)


@meant("formula")
class Everything(Scoring, CrossEntropy):
    """Counts labels that are to be ignored."""

    name = "everything"

    def forward(self, z: Tensor, table: Tensor, labels: Tensor, *rest: Any, **asked: Any) -> Score:
        return super().forward(z, table, labels.clamp_min(0), *rest, **asked)


@meant("gradients of labels")
class Fixed(Scoring, CrossEntropy):
    """Leaves the table as it is."""

    name = "fixed"

    def forward(self, z: Tensor, table: Tensor, *rest: Any, **asked: Any) -> Score:
        return super().forward(z, table.detach() + 0 * table, *rest, **asked)


@meant("drawn labels")
class Likeliest(Scoring, CrossEntropy):
    """Always draws the same."""

    name = "likeliest"

    def forward(self, z: Tensor, table: Tensor, labels: Tensor, draws: Draws | None = None, *, normaliser: bool = False) -> Score:
        draws = None if draws is None else draws._replace(uniforms=torch.full_like(draws.uniforms, 0.5))
        return super().forward(z, table, labels, draws, normaliser=normaliser)


@meant("normaliser")
class Unmasked(Scoring, CrossEntropy):
    """Tells a normaliser of tokens that predict nothing."""

    name = "unmasked"

    def forward(self, z: Tensor, table: Tensor, *rest: Any, **asked: Any) -> Score:
        return super().forward(z, table, *rest, **asked)._replace(normaliser=(z @ table.to(z.dtype).T).logsumexp(-1))


class Price(AuxiliaryLoss):
    """A right loss for mutants to spoil: the mean square of states where a label is predicted."""

    citation = CITED

    def forward(self, out: Output, batch: Batch) -> Term:
        squares = out.states.square().sum(-1).masked_fill(batch.labels < 0, 0.0)
        return Term(squares.sum(), self.count(batch))


@meant("needs")
class Greedy(Price, AuxiliaryLoss):
    """Uses logits that it does not ask for."""

    name = "greedy"

    def forward(self, out: Output, batch: Batch) -> Term:
        assert out.logits is not None, "no logits were given"
        return Term(out.logits.square().sum(), self.count(batch))


@meant("count")
class Boasting(Price, AuxiliaryLoss):
    """Counts more than it announces."""

    name = "boasting"

    def forward(self, out: Output, batch: Batch) -> Term:
        term = super().forward(out, batch)
        return term._replace(count=term.count + 1)

    def count(self, batch: Batch) -> Tensor:
        return (batch.labels >= 0).sum()


@meant("micro-batches")
class Mean(Price, AuxiliaryLoss):
    """Returns a mean as its total."""

    name = "mean"

    def forward(self, out: Output, batch: Batch) -> Term:
        term = super().forward(out, batch)
        return term._replace(total=term.total / term.count.clamp_min(1))


@meant("padding")
class Wasteful(Price, AuxiliaryLoss):
    """Takes padding for text."""

    name = "wasteful"

    def forward(self, out: Output, batch: Batch) -> Term:
        return Term(out.states.square().sum(), self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.labels.numel())


@meant("gradcheck")
class Careful(Price, AuxiliaryLoss):
    """Half of its gradient is cut off."""

    name = "careful"

    def forward(self, out: Output, batch: Batch) -> Term:
        return super().forward(out._replace(states=0.5 * (out.states + out.states.detach())), batch)


class Plain(Optimizer):
    """A right optimizer for mutants to spoil: momentum, decoupled decay."""

    citation = CITED

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float = 0.02, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state["momentum"] = state.get("momentum", torch.zeros_like(p)).lerp(p.grad, 0.3)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(self.update(m), alpha=group["lr"])

    def update(self, m: Tensor) -> Tensor:
        return m.sign()


@meant("replay")
class Gambling(Plain, Optimizer):
    """Draws from the global generator."""

    name = "gambling"

    def update(self, m: Tensor) -> Tensor:
        return m.sign() * torch.rand(()) * 2


@meant("resume")
class Amnesic(Plain, Optimizer):
    """Counts its steps where no checkpoint looks."""

    name = "amnesic"
    calls = 0

    def update(self, m: Tensor) -> Tensor:
        self.calls += 1
        return m.sign() / (1 + 0.01 * self.calls)


@meant("learning rate")
class Headstrong(Plain, Optimizer):
    """Has a rate of its own."""

    name = "headstrong"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.02)


@meant("decay")
class Levelling(Plain, Optimizer):
    """Decays all groups alike."""

    name = "levelling"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.01 * group["lr"])


@meant("descent")
class Climbing(Plain, Optimizer):
    """Goes uphill."""

    name = "climbing"

    def update(self, m: Tensor) -> Tensor:
        return -m.sign()


@meant("refresh")
class Restless(Plain, Optimizer):
    """Moves parameters while it looks at the curvature."""

    name = "restless"
    refresh_every = 5

    @torch.no_grad()
    def refresh(self, objective: Any) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.999)
                self.state[p]["seen"] = torch.ones_like(p)


@meant("range")
class Vanishing(Schedule):
    """Divides by zero at the end."""

    name = "vanishing"

    def factor(self, step: int) -> float:
        return float("nan") if step == self.horizon.steps else 1.0


@meant("pure")
class Ageing(Schedule):
    """Falls with every question."""

    name = "ageing"

    def __init__(self, horizon: Horizon) -> None:
        super().__init__(horizon)
        self.asked = 0

    def factor(self, step: int) -> float:
        self.asked += 1
        return 1 / self.asked


@meant("repeatable")
class Once(DataSource):
    """Can be read once."""

    name = "once"

    def __init__(self) -> None:
        self.left = {split: iter([Document(split, "text")]) for split in ("train", "valid")}

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        yield from self.left[split]

    def fingerprint(self) -> str:
        return "once"


@meant("round trip")
class Lossy(Tokenizer):
    """Knows no capital letters."""

    name = "lossy"
    size, begin, end = 258, 256, 257

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.lower().encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        return "lossy"


@meant("pieces")
class Marked(Tokenizer):
    """Marks the beginning of what it is given, also of what is the middle of a text."""

    name = "marked"
    size, begin, end = 259, 256, 257

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[258, *text.encode()] for text in texts]

    def pieces(self, text: str) -> Iterator[str]:
        return (text[at : at + 1000] for at in range(0, len(text), 1000))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        return "marked"


@meant("records")
class Fussy(Tracker):
    """Cannot take what is not finite."""

    name = "fussy"

    def __init__(self, run: RunInfo) -> None:
        super().__init__(run)

    def log(self, metrics: Any, step: int) -> None:
        for value in metrics.values():
            int(value)


OFFERED = [cls for cls in list(globals().values()) if isinstance(cls, type) and cls.__name__ in MEANT]


@hookimpl
def lswt_components() -> list[type]:
    """All of them."""
    return OFFERED
