"""What plugins implement and the values that cross between them and the core. Imports torch only.

Shapes: B rows, T new tokens, N keys of one part, H heads, D head width, M model width, V
vocabulary. Coordinates ``positions`` number tokens from the start of the new segment: 0 is its
first token, remembered tokens are negative, sinks have none. A component's options are the
annotated keyword-only parameters of its constructor; its kind is its base class, its name the class
attribute ``name``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

IGNORE = -100  # a label that predicts nothing; the value torch's own losses ignore

# what a memory keeps: None, a tensor, or nested dicts (string keys) and tuples of those, batch row
# first
State: TypeAlias = Any
# (x [B,N,M], positions [N]) -> segments, the last one x's own
KVProjection: TypeAlias = Callable[[Tensor, Tensor], "list[KeyValue]"]


class Unsupported(Exception):
    """A component cannot do what the model needs of it; raised while the model is built, never in a
    step.
    """


class Component:
    """What every component has: a name for recipes, and the papers it implements."""

    name: ClassVar[str]
    citation: ClassVar[str] = ""  # BibTeX
    # import names of optional packages of which it needs one; () if it needs none
    libraries: ClassVar[tuple[str, ...]] = ()


# ---------- values


class Dims(NamedTuple):
    """The sizes a component of the model may depend on."""

    d_model: int
    n_heads: int
    d_ffn: int  # width of the feed-forward's hidden layer, after gating
    n_layers: int
    layer: int = 0  # which block this component is built for
    bias: bool = True  # whether attention projections carry biases

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads


class KeyValue(NamedTuple):
    """Keys and values that some memory offers, before any position is applied (but see encoded)."""

    k: Tensor  # [B, N, H, D]
    v: Tensor  # [B, N, H, D]
    # [N]; None = a sink: outside of position, visible to every query, never rotated, biased or
    # cached
    positions: Tensor | None
    # broadcasts to [B, T, H, D]; a sink's alone: what meets its keys in place of the layer's
    # queries
    q: Tensor | None = None
    encoded: bool = False  # keys are encoded at their place already


class Bias(ABC):
    """Something added to the attention scores. It keeps its structure; the backend picks the form
    it can use.
    """

    @abstractmethod
    def dense(self) -> Tensor:
        """The bias as one tensor that broadcasts to [B, H, T, N]."""


class DenseBias(Bias):
    """A bias that has no more structure than its numbers."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores  # broadcasts to [B, H, T, N]

    def dense(self) -> Tensor:
        """The numbers themselves."""
        return self.scores


class SlopeBias(Bias):
    """A penalty that grows linearly with distance: ``-slopes[h] * (q_at - k_at)`` (ALiBi, Press et
    al. 2022, arXiv 2108.12409).
    """

    def __init__(self, slopes: Tensor, q_positions: Tensor, k_positions: Tensor) -> None:
        # [H], [T], [N]
        self.slopes, self.q_positions, self.k_positions = slopes, q_positions, k_positions

    def dense(self) -> Tensor:
        """The penalty for every head, query and key, [H, T, N]."""
        distance = (self.q_positions[:, None] - self.k_positions[None, :]).to(self.slopes.dtype)
        return -self.slopes[:, None, None] * distance


class KVBlock(NamedTuple):
    """One block of keys for an attention backend, queries and keys already encoded for each other."""

    q: Tensor  # [B, T, H, D]; parts whose queries need no different encoding share one tensor
    k: Tensor  # [B, N, H, D]
    v: Tensor  # [B, N, H, D]
    # True: the square of the new segment, key j visible to query i iff j <= i; False: every key
    # visible
    causal: bool
    bias: Bias | None = None
    positions: Tensor | None = None  # [N] coordinates of the keys; None for sinks
    # [B or 1, T] where what each query sees (its document, a window) starts. None: everything is
    # seen
    first_visible: Tensor | None = None

    def visible(self) -> Tensor | None:
        """Which keys each query sees: bool, broadcasts to [B, 1, T, N]; None where every query sees
        every key.
        """
        seen = None
        if self.causal:
            size = self.q.shape[1]
            assert self.k.shape[1] == size, "only the square of the new segment is causal"
            seen = torch.ones(size, size, dtype=torch.bool, device=self.q.device).tril()[None, None]
        if self.first_visible is not None and self.positions is not None:
            same = (self.positions[None, None, :] >= self.first_visible[:, :, None])[:, None]
            seen = same if seen is None else seen & same
        return seen


class AttentionRequirements(NamedTuple):
    """What the model asks of an attention backend, known while it is built."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype  # of queries, keys and values in a step
    d_head: int
    has_bias: bool = False  # the positional encoding adds to the scores
    has_mask: bool = False  # documents or windows hide earlier keys (Part.starts)
    double_backward: bool = False  # second derivatives are taken (Hutchinson's estimate)


class Batch(NamedTuple):
    """The tokens of one segment of every row."""

    inputs: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, IGNORE where nothing is predicted
    valid: Tensor | None = None  # [B, T] bool, False at padding; None: no padding
    # [B, T] int64, coordinate at which each token's document starts; None: documents are not parted
    first_visible: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor replaced by ``function(tensor)``."""
        inputs, labels, *optional = self
        return Batch(
            function(inputs),
            function(labels),
            *(None if t is None else function(t) for t in optional),
        )


class Output(NamedTuple):
    """What the decoder made of a batch."""

    states: Tensor  # [B, T, M], after the last norm
    logits: Tensor | None = None  # [B, T, V]; computed only if a loss needs it
    # [B, T], log of the sum of exp(logits), 0 where nothing is predicted; only if a loss needs it
    logsumexp: Tensor | None = None


class LossSum(NamedTuple):
    """A loss as a fraction, so that the trainer alone decides over what it is averaged:
    micro-batches and ranks add up exactly.
    """

    total: Tensor  # []
    count: Tensor  # type: ignore[assignment]  # [], hides tuple.count


class LabelSampling(NamedTuple):
    """Labels to be drawn from the model's own distribution, one random number a token."""

    # [B, T] in [0, 1): the label is the first id at which the cumulative softmax exceeds it
    uniforms: Tensor
    rows: Tensor | None = None  # [B] bool, for which rows; None: for all


class CrossEntropyOutput(NamedTuple):
    """How well labels were predicted. A token whose label is IGNORE counts for nothing anywhere."""

    total: Tensor  # [] summed negative log-likelihood, natural logarithm; differentiable
    correct: Tensor  # [] how many labels had the largest logit
    # [] the total of the labels that were drawn; differentiable; only if they are asked for
    sampled: Tensor | None = None
    # [B, T] as Output has it; differentiable; only if it is asked for
    logsumexp: Tensor | None = None
    nll: Tensor | None = None  # [B, T] of each label, where more than the sum is told
    drawn: Tensor | None = None  # [B, T] the labels that were drawn, where they are told


class Document(NamedTuple):
    """One text of a data source."""

    id: str
    text: str


class Horizon(NamedTuple):
    """How long a run is, for schedules."""

    steps: int
    tokens_per_step: int
    # where the run's length was given in tokens, which may end within the last step
    tokens: int | None = None

    @property
    def end(self) -> float:
        """The run's length in steps; the last may be a part of one."""
        return self.steps if self.tokens is None else self.tokens / self.tokens_per_step


class RunInfo(NamedTuple):
    """What a tracker is told about the run it follows."""

    name: str
    directory: Path
    recipe: Mapping[str, Any]  # resolved, every default written out
    resumed: bool = False


# ---------- the model


class PositionalEncoding(Component, nn.Module):
    """Where tokens stand. Override what you need; the default is no position at all. Built as
    ``cls(dims, **options)``.
    """

    # may an encoded key be kept as the stream moves on? (RoPE yes; dynamic NTK, xPos no)
    cacheable_keys: ClassVar[bool] = False
    has_bias: ClassVar[bool] = False  # does `bias` return anything?
    # do encodings depend on how many tokens are attended to? (dynamic NTK)
    length_dependent: ClassVar[bool] = False
    by_end: bool = False  # does how a query meets sinks depend on where its segment ends?

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add position to the model's input: x [B, T, M], positions [T] -> [B, T, M]."""
        return x

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn queries or keys by their position: x [B, N, H, D], positions [N] -> [B, N, H, D]."""
        return x

    def encode(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode queries [B, T, H, D] and keys [B, N, H, D] for each other; coordinates [T] and
        [N].
        """
        return self.rotate(q, q_positions), self.rotate(k, k_positions)

    def encode_sink(
        self, q: Tensor, k: Tensor, q_positions: Tensor, oldest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode queries [B, T, H, D] and sink keys [B, N, H, D], which have no position;
        ``oldest`` ([], or [B, T] where documents are parted) is the coordinate of the oldest token
        a query sees. Left alone, logits do not depend on how a text is cut.
        """
        return q, k

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias | None:
        """What to add to the scores of queries [B, T, H, D] against keys positions [N]; sinks are
        never biased.
        """
        return None


class Memory(Component, nn.Module, ABC):
    """Middleware around one layer's key/value projection: what the layer attends to besides the new
    tokens, and what it keeps. Built as ``cls(dims, **options)``, one a layer; several stack, one of
    them with a length. State is returned, never kept on the module.
    """

    length: int = 0  # how many tokens back a state reaches; so many are replayed to rebuild it
    # is a state {"k", "v"}, the last ``length`` keys and values just as they were projected?
    is_kv_cache: ClassVar[bool] = False
    # how many tokens back any query of the layer sees, itself included; None: all that are offered
    window: int | None = None
    position_dependent_from: int | None = (
        # once so many tokens were read, what is kept depends on where in the text they stood; None:
        # never
        None
    )

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Segments to attend to, and the next state.

        x [B, T, M] are the normed inputs of the layer, positions [T] their coordinates, state what
        was returned last time (None when cold). The last segment must be the new tokens' own, T
        long; all earlier ones are visible to every query (but see window).
        """


class AttentionBackend(Component, nn.Module, ABC):
    """One softmax over the union of parts, scale 1/sqrt(D). Built as ``cls(dims, **options)``."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        """Attend: -> [B, T, H, D]."""

    def require(self, need: AttentionRequirements) -> str | None:
        """Raise Unsupported, with the reason, if this backend cannot do what is needed; it may
        return how it will, to be printed.
        """


class FeedForward(Component, nn.Module, ABC):
    """The position-wise layer of a block. Built as ``cls(dims, **options)``."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""


class QKNorm(Component, nn.Module, ABC):
    """Normalisation of queries and keys before they are encoded, one instance each a layer. Built
    as ``cls(dims, **options)``.
    """

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, H, D]."""


class Norm(Component, nn.Module, ABC):
    """Normalisation over the model width. Built as ``cls(dims, **options)``."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., M] -> [..., M]."""


# ---------- training


class CrossEntropy(Component, nn.Module, ABC):
    """How states are scored against the vocabulary: how fast, and in how much memory. What is found
    is the same, up to rounding. Built as ``cls(**options)``.
    """

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self,
        z: Tensor,
        table: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        logsumexp: bool = False,
    ) -> CrossEntropyOutput:
        """The score, against labels [B, T], of the logits z @ table.T; z [B, T, d_vocab], table [V,
        d_vocab], of any precision.
        """

    @abstractmethod
    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        """How many logits exist at once for so many tokens, for plans of memory; the table [V,
        d_vocab] may be without numbers.
        """

    def require(self, device: str) -> None:
        """Raise Unsupported, with the reason, where this cannot run."""

    def compile_kernels(self) -> None:
        """Compile what pays; called once, after `require`, where the model's blocks are compiled."""


class AuxiliaryLoss(Component, nn.Module, ABC):
    """A loss beside cross-entropy. Built as ``cls(dims, **options)``; its weight is the recipe's
    ``weight`` key.
    """

    # of {"states", "logits", "logsumexp"}: the rest of Output is None
    needs: ClassVar[frozenset[str]] = frozenset({"states"})

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, out: Output, batch: Batch) -> LossSum:
        """The loss as total and count; total / count is its mean over this batch."""

    def count(self, batch: Batch) -> Tensor:
        """What ``forward`` will count, told from the batch alone, so that any split is averaged
        exactly; by default predicted labels.
        """
        return (batch.labels != IGNORE).sum()


class Objective(Protocol):
    """A step's micro-batches, ready to be differentiated (again) at the current weights and
    memories.
    """

    @property
    def tokens(self) -> int:
        """Labels predicted, over all micro-batches and ranks."""

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """Add the gradient of the mean loss to every ``p.grad``. "sampled" draws labels from the
        model's own distribution and takes the cross-entropy alone; memories are read, never
        advanced.
        """

    def hessian_vector_product(
        self, params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """The Hessian of the mean training loss times ``vectors``; touches no ``p.grad``."""

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator that depends on run seed, step and purpose only."""

    def subset(self, fraction: float) -> Objective:
        """The same over a share of the rows, spread evenly over the whole batch; its means and
        ``tokens`` are of that part.
        """


class Optimizer(Component, torch.optim.Optimizer):
    """Any torch optimizer qualifies: ``class Mine(Optimizer, torch.optim.Mine)``. Built as
    ``cls(groups, **options)`` with the parameter groups of the model; options include ``lr`` (the
    peak) and, where decay is meant, ``weight_decay``.
    """

    needs_hessian_vector_products: ClassVar[bool] = (
        # calls Objective.hessian_vector_product, for which attention must also run in float32
        False
    )
    # call `update_curvature` with the first update and every so many from there; 0 = never
    hessian_update_interval: int = 0
    # call it before the update, with "sampled" gradients from the forward pass of the data's, not
    # after it
    shares_forward: bool = False
    # the share of a step's rows that `update_curvature` looks at (Objective.part)
    fraction: float = 1.0

    # copies hold attributes too, where options may be; torch's hooks are made anew
    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v for k, v in vars(self).items() if k != "step" and not k.startswith("_optimizer_")
        } | super().__getstate__()

    def update_curvature(self, objective: Objective) -> None:
        """Re-estimate the curvature (second-order methods). Gradients are clear before; what it
        leaves in them is dropped.
        """

    def eval_parameters(self) -> AbstractContextManager[None]:
        """While it lasts, parameters are those to be used and saved, not trained (an average); what
        goes on is as if it had not been.
        """
        return nullcontext()

    def statistics(self) -> dict[str, Tensor]:
        """Numbers worth logging about the last step, as scalar tensors."""
        return {}


class Schedule(Component, ABC):
    """The learning rate over a run. Built as ``cls(horizon, **options)``; raises ValueError for a
    run it cannot serve.
    """

    def __init__(self, horizon: Horizon) -> None:
        self.horizon = horizon

    @abstractmethod
    def factor(self, step: int) -> float:
        """The share of the peak learning rate that update number ``step`` uses; the first update is
        number 1.
        """


# ---------- data, tracking


class DataSource(Component, ABC):
    """Where documents come from. Built as ``cls(**options)``; reading starts only when asked."""

    # True: too large to tokenise beforehand; documents are tokenised as they are read
    streaming: bool = False

    @abstractmethod
    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """Every document of a split, always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the content (or, for a stream, of what identifies it): another text gives
        another hash.
        """

    def n_bytes(self, split: Literal["train", "valid"]) -> int | None:
        """About how many bytes of text a split has, for a bar of progress; None where that is not
        known before it is read.
        """
        return None


class Tokenizer(Component, ABC):
    """Text to token ids and back. Built as ``cls(**options)``."""

    def fit(
        self, documents: Callable[[], Iterable[Document]], fingerprint: str, cache: Path
    ) -> None:
        """Learn from (or load for) a source's training documents; most tokenizers have nothing to
        learn. What was learned is kept under ``cache``, keyed by the fingerprint, which tells
        source and options, and by what it depends on besides.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids; every id is below it."""

    @property
    @abstractmethod
    def bos_id(self) -> int:
        """The id every document's inputs begin with."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The id every document's labels end with."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    def split_long_text(self, text: str) -> Iterable[str]:
        """A long text in pieces whose ids, one after the other, are its own; this one leaves it
        whole (``lswt_core.plugin_api.tokenizers`` helps). Asked while another thread may encode.
        """
        return [text]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the mapping: another tokenizer gives another hash."""

    def save(self, directory: Path) -> None:
        """Write the files from which transformers' AutoTokenizer makes the same mapping
        (``lswt_core.plugin_api.tokenizers`` helps).
        """
        raise Unsupported(
            f"tokenizer {self.name!r} does not say how it is written for transformers"
            " (Tokenizer.save)"
        )

    def vocab(self) -> Mapping[str, int] | None:
        """Every token and its id, spelled as byte-level or SentencePiece vocabularies do ("Ġthe",
        "▁the"), so that pretrained word embeddings find their rows; None if there is no such list,
        and they can then only be taken from a table without one.
        """
        return None


class Tracker(Component, ABC):
    """A place that run metrics are mirrored to. Built as ``cls(run, **options)``. The local
    metrics.jsonl is the truth: what a tracker raises is reported once and never stops the run.
    """

    def __init__(self, run: RunInfo) -> None:
        self.run = run

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record some numbers."""

    def close(self) -> None:
        """Flush and let go."""
