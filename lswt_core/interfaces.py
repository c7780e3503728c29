"""The interfaces that plugins implement, and the values that cross between plugins and the core.

Imports torch only. Shapes: B rows (sequences) of a batch, T new tokens, N keys of one block,
H query heads, G key/value heads (H unless heads are grouped; query head h reads key/value head
h // (H / G)), D head width, M model width (d_model), V vocabulary.

Positions number tokens from the start of the new segment: 0 is its first token, tokens in memory
have negative positions, attention sinks (registers among them) have none. A segment is the T
tokens of every row that one forward pass reads, as in Transformer-XL.

A component's kind is its base class, its name the class attribute ``name``, and its options are the
annotated keyword-only parameters of its constructor.

An option can be a component: a recipe writes a table with ``use`` ([ffn.inner] use = "gelu"), and
the annotation says what the constructor gets. ``inner: FeedForward``: a component, built with the
arguments that its owner got. ``inner: Callable[[Dims], FeedForward]``: a function that builds one,
for sizes of the owner's choice. ``sources: Mapping[str, DataSource]``: several, sorted by name.
``| None = None``: perhaps none. The owner answers for what it wraps: flags, state, loss terms.

Any module of the model may name parameters of its own in two attributes, tuples of names.
``no_weight_decay``: without weight decay, as are embeddings and whatever has fewer than two
dimensions. ``matrix_parameters``: [..., out, in], each matrix used like the weight of an nn.Linear
(a stack of experts): it starts like one, and is one to parametrisations and Muon. (): none is.

Models are built on the meta device, where tensors have shapes and no values, and then initialised.
So a constructor computes with Python's numbers; every tensor is a parameter or a buffer
(``self.register_buffer``), and a module that owns any, other than nn.Linear and nn.Embedding with
their weights N(0, init_std^2), fills all of them in ``reset_parameters(self)``, by torch's default
generator alone. It runs after those of the submodules, so it may change them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

IGNORE = -100  # the label of a token that is not predicted; ``ignore_index`` of torch's own losses

# The state of a memory: None, a tensor, or nested dicts (string keys) and tuples of tensors. The
# first dimension of every tensor is the batch row.
State: TypeAlias = Any

# (x [B, N, M], positions [N]) -> key/value blocks; the last one holds the keys and values of x.
KVProjection: TypeAlias = Callable[[Tensor, Tensor], "list[KeyValue]"]


class Unsupported(Exception):
    """A component cannot do what is required of it. Raised by constructors and ``require`` while a
    model is built, and by optional operations when they are called for.
    """


class Component:
    """Base of all components."""

    name: ClassVar[str]  # its name in recipes
    citation: ClassVar[str] = ""  # BibTeX; `plugins check` asks for it
    # import names of optional packages of which it needs one; () if it needs none
    libraries: ClassVar[tuple[str, ...]] = ()

    def compile_kernels(self) -> None:
        """Compile with torch.compile what gains from it. Called once on the cross-entropy, losses
        and the optimizer, after ``require``, if the model's blocks are compiled.
        """


# ---------- values


class Dims(NamedTuple):
    """The sizes that a component of the model may depend on."""

    d_model: int
    n_heads: int  # query heads
    d_ffn: int  # width of the feed-forward's hidden layer, after gating
    n_layers: int
    layer: int = 0  # index of the block that the component is built for
    bias: bool = True  # whether the attention projections have biases
    queries_per_kv: int = 1  # query heads that share a key/value head (grouped-query attention)
    vocab_size: int = 0  # rows of the embedding table; 0: not known
    d_vocab: int = 0  # width of the embedding table; 0: not known

    @property
    def d_head(self) -> int:
        """Width of one attention head (head dimension)."""
        return self.d_model // self.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads."""
        return self.n_heads // self.queries_per_kv


class KeyValue(NamedTuple):
    """Keys and values that a memory offers, without positional encoding unless ``encoded``."""

    k: Tensor  # [B, N, G, D]
    v: Tensor  # [B, N, G, D]
    # [N]. None: sinks, which have no position. They are visible to every query, are never
    # biased or cached, and are encoded by PositionalEncoding.encode_sink alone.
    positions: Tensor | None
    # Sinks only, broadcasts to [B, T, H, D]: queries that replace the layer's for these keys.
    q: Tensor | None = None
    encoded: bool = False  # whether the positional encoding is applied to k already
    # [B, N, ...] what PositionalEncoding.features computed of these tokens; memories that keep k
    # and v keep it too
    features: Tensor | None = None


class Bias(ABC):
    """A term added to the attention scores, in a structure that a backend's kernel may take."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The bias as a tensor that broadcasts to [B, H, T, N]."""


class ScoreTransform(ABC):
    """An elementwise function of the scaled scores q . k / sqrt(D), applied before the bias."""

    @abstractmethod
    def __call__(self, scores: Tensor) -> Tensor:
        """Transform scores of any shape. May be compiled into a kernel, score by score."""


class SoftCap(ScoreTransform):
    """``cap * tanh(scores / cap)`` (Gemma 2, arXiv 2408.00118)."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def __call__(self, scores: Tensor) -> Tensor:
        """The capped scores."""
        return self.cap * (scores / self.cap).tanh()


class DenseBias(Bias):
    """An attention bias without structure."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores  # broadcasts to [B, H, T, N]

    def dense(self) -> Tensor:
        """The bias itself."""
        return self.scores


class SlopeBias(Bias):
    """A bias linear in the distance, ``-slopes[h] * (q_position - k_position)`` (ALiBi, Press et
    al. 2022, arXiv 2108.12409).
    """

    def __init__(self, slopes: Tensor, q_positions: Tensor, k_positions: Tensor) -> None:
        self.slopes = slopes  # [H]
        self.q_positions = q_positions  # [T]
        self.k_positions = k_positions  # [N]

    def dense(self) -> Tensor:
        """The bias of every head, query and key, [H, T, N]."""
        distance = (self.q_positions[:, None] - self.k_positions[None, :]).to(self.slopes.dtype)
        return -self.slopes[:, None, None] * distance


class DifferenceBias(Bias):
    """A term of the query minus a term of the key, as differences of a running sum are."""

    def __init__(self, q_terms: Tensor, k_terms: Tensor) -> None:
        self.q_terms = q_terms  # [B, H, T]
        self.k_terms = k_terms  # [B, H, N]

    def dense(self) -> Tensor:
        """The bias of every row, head, query and key, [B, H, T, N]."""
        return self.q_terms[..., :, None] - self.k_terms[..., None, :]


class KVBlock(NamedTuple):
    """One block of keys and values with the queries that attend to it, positional encoding applied
    to both. Attention is one softmax over the union of all blocks of a layer.
    """

    q: Tensor  # [B, T, H, D]; blocks whose queries are encoded alike share one tensor
    k: Tensor  # [B, N, G, D]
    v: Tensor  # [B, N, G, D]
    causal: bool  # causal mask of the new segment's own keys (N = T): query i sees key j iff j <= i
    bias: Bias | None = None
    positions: Tensor | None = None  # [N] of the keys; None: sinks
    # [B or 1, T]: the lowest position that each query sees (the start of its document or of its
    # window). None: no key is hidden.
    first_visible: Tensor | None = None
    transform: ScoreTransform | None = None  # of the scores, before the bias
    # bool, broadcasts to [B, H, T, N], False where a query does not see a key (a selection of keys
    # per query). None: no key is hidden.
    selected: Tensor | None = None

    def visible(self) -> Tensor | None:
        """Whether a query sees a key: bool, broadcasts to [B, H, T, N]; None if all do."""
        mask = self.selected
        if self.causal:
            size = self.q.shape[1]
            assert self.k.shape[1] == size, "a causal block is the square of the new segment"
            causal = torch.ones(size, size, dtype=torch.bool, device=self.q.device).tril()
            mask = causal[None, None] if mask is None else mask & causal
        if self.first_visible is not None and self.positions is not None:
            near = (self.positions[None, None, :] >= self.first_visible[:, :, None])[:, None]
            mask = near if mask is None else mask & near
        return mask


class AttentionRequirements(NamedTuple):
    """What a model requires of an attention backend, known while the model is built."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype  # of queries, keys and values
    d_head: int
    # the positional encoding or the mixer adds a bias to the scores (KVBlock.bias)
    has_bias: bool = False
    has_mask: bool = False  # document masking or windows hide keys (KVBlock.first_visible)
    double_backward: bool = False  # second derivatives are taken (Hutchinson's estimator)
    queries_per_kv: int = 1  # query heads that share a key/value head
    # the class of KVBlock.transform; None: scores are not transformed
    transform: type[ScoreTransform] | None = None
    has_selection: bool = False  # keys are hidden per query (KVBlock.selected)

    @property
    def has_transform(self) -> bool:
        """Whether scores are transformed."""
        return self.transform is not None


class Batch(NamedTuple):
    """The tokens of one segment of every row."""

    inputs: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, IGNORE where nothing is predicted
    valid: Tensor | None = None  # [B, T] bool, False at padding; None: no padding
    # [B, T] int64: the position at which the document of each token starts; None: no document
    # masking
    first_visible: Tensor | None = None
    # [B, L], L the largest AuxiliaryLoss.lookahead of the run: the labels after the segment's own,
    # IGNORE where there is none (with document masking: in a document that begins after the
    # segment); None: not known, as in evaluation
    labels_ahead: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor replaced by ``function(tensor)``."""
        return Batch(*(None if t is None else function(t) for t in self))  # type: ignore[arg-type]


class Output(NamedTuple):
    """The decoder's output for a batch. Optional fields are there if a loss ``needs`` them."""

    states: Tensor  # [B, T, M], after the output norm
    logits: Tensor | None = None  # [B, T, V]
    logsumexp: Tensor | None = None  # [B, T], of the logits; 0 where nothing is predicted
    # (states [B, T, M], labels [B, T]) -> their cross-entropy by the model's head, differentiable;
    # no logits are held
    score: Callable[[Tensor, Tensor], CrossEntropyOutput] | None = None


class LossSum(NamedTuple):
    """A loss as a sum and the number of terms in it, so that micro-batches and data-parallel ranks
    add up exactly to the mean over the global batch.
    """

    total: Tensor  # []
    count: Tensor  # type: ignore[assignment]  # [], hides tuple.count


class LayerContext(NamedTuple):
    """What a layer may read besides its input and state."""

    positions: Tensor  # [T] of the segment's tokens
    # [B or 1, T]: the position at which the document of each token starts; None: no document
    # masking. Tokens see nothing before it: a recurrent state is reset where a token's is its own
    # position (``lswt_core.plugin_api.recurrence``).
    first_visible: Tensor | None
    positional: PositionalEncoding  # the layer's
    # What lower layers wrote in this forward pass, by name, and what the decoder writes if a layer
    # reads it: "ids" [B, T] token ids, "embeddings" [B, T, M] the input of the first layer.
    carry: Mapping[str, Any]


class LayerOutput(NamedTuple):
    """What a block, a mixer or a stateful feed-forward layer returns."""

    x: Tensor  # [B, T, M]; of a block: the residual stream
    # The next state, row first: of blocks and mixers a dictionary of trees by name, of feed-forward
    # layers any tree. None: no state.
    state: State = None
    carry: Mapping[str, Any] = {}  # for the layers above: the names declared in ``writes``
    losses: Mapping[str, LossSum] = {}  # the names declared in ``loss_weights``


class LabelSampling(NamedTuple):
    """Labels are sampled from the model's own distribution by inverting its cumulative sum, with
    one uniform random number a token.
    """

    uniforms: Tensor  # [B, T] in [0, 1)
    rows: Tensor | None = None  # [B] bool, the rows to sample for; None: all


class CrossEntropyOutput(NamedTuple):
    """Cross-entropy of a batch. Tokens whose label is IGNORE count nowhere."""

    total: Tensor  # [] sum of the negative log-likelihoods, in nats; differentiable
    correct: Tensor  # [] number of labels that have the largest logit
    sampled: Tensor | None = None  # [] sum for the sampled labels, if asked for; differentiable
    logsumexp: Tensor | None = None  # [B, T] as in Output, if asked for; differentiable
    nll: Tensor | None = None  # [B, T] of each label, if the implementation has it
    drawn: Tensor | None = None  # [B, T] the sampled labels, if the implementation has them


class Document(NamedTuple):
    """One text of a data source."""

    id: str
    text: str
    # Ranges (begin, end) of characters, in order, whose tokens are predicted, each tokenised by
    # itself; the end of the text counts as one more character. None: all are predicted.
    scored: Sequence[tuple[int, int]] | None = None


class Horizon(NamedTuple):
    """The length of a run, for learning-rate schedules."""

    steps: int
    tokens_per_step: int
    tokens: int | None = None  # if the length was given in tokens; may end within the last step

    @property
    def end(self) -> float:
        """The length in steps, the last of which may be partial."""
        return self.steps if self.tokens is None else self.tokens / self.tokens_per_step


class RunInfo(NamedTuple):
    """What a tracker knows about its run."""

    name: str
    directory: Path
    recipe: Mapping[str, Any]  # resolved: every default written out
    resumed: bool = False


# ---------- model


class PositionalEncoding(Component, nn.Module):
    """Positional encoding. Override what you need; by default there is none. Built as
    ``cls(dims, **options)``.
    """

    # Whether an encoded key stays valid as the stream moves on, so that a KV cache may hold encoded
    # keys (RoPE: yes; dynamic NTK and xPos: no).
    cacheable_keys: ClassVar[bool] = False
    has_bias: ClassVar[bool] = False  # whether ``bias`` or ``block_biases`` returns biases
    # Whether all encodings of a call depend on how many tokens are attended to (dynamic NTK).
    length_dependent: ClassVar[bool] = False
    # Whether ``encode_sink`` depends on the position of the segment's last token.
    sinks_depend_on_segment_end: bool = False

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add positions to the model's input: x [B, T, M], positions [T] -> [B, T, M]."""
        return x

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries or keys: x [B, N, H, D], positions [N] -> [B, N, H, D]."""
        return x

    def encode(
        self, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode queries [B, T, H, D] at positions [T] and keys [B, N, G, D] at [N]. Override this
        instead of ``rotate`` if the encoding of a query depends on the keys.
        """
        return self.rotate(q, q_positions), self.rotate(k, k_positions)

    def scale_queries(self, q: Tensor, q_positions: Tensor, oldest: Tensor) -> Tensor:
        """Scale queries [B, T, H, D] at positions [T] by how many tokens each sees, before they are
        encoded for any key. ``oldest`` is as in ``encode_sink``.
        """
        return q

    def encode_sink(
        self, q: Tensor, k: Tensor, q_positions: Tensor, oldest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode queries [B, T, H, D] and sink keys [B, N, G, D], which have no position.

        ``oldest`` is the lowest position that a query sees: [], or [B or 1, T] if documents or
        windows hide keys. By default neither is encoded, and logits do not depend on how a text is
        split into segments.
        """
        return q, k

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias | None:
        """The bias on the scores of queries [B, T, H, D] at positions [T] for keys at [N]. Sinks
        are never biased.
        """
        return None

    def features(self, x: Tensor) -> Tensor | None:
        """What ``block_biases`` needs to know of a layer's normed inputs x [B, N, M], e.g. a
        forgetting gate: [B, N, ...], kept by memories beside keys and values. It must be computed
        of each token alone. None: nothing.
        """
        return None

    def block_biases(
        self, q: Tensor, keys: Sequence[KeyValue], q_positions: Tensor
    ) -> Sequence[Bias | None]:
        """The bias for every block of keys but sinks, oldest first; the last one is the new
        segment's own, to which the queries [B, T, H, D] at positions [T] belong. Override this
        instead of ``bias`` if it depends on keys, on features, or on all blocks together. Queries
        and keys are encoded already.
        """
        return [self.bias(q, q_positions, kv.positions) for kv in keys if kv.positions is not None]


class Layer(Component, nn.Module):
    """Base of blocks, mixers and feed-forward layers: what they declare. Set these on the class, or
    on the instance before the constructor returns.
    """

    reads: frozenset[str] = frozenset()  # entries of LayerContext.carry that it reads
    writes: frozenset[str] = frozenset()  # entries of LayerOutput.carry that it returns
    # The loss terms it returns, with their weights. Terms of one name are added over layers, counts
    # as well: the loss is the mean over layers. They are left out of evaluation and export.
    loss_weights: Mapping[str, float] = {}
    # How many tokens back its state reaches; replaying so many rebuilds it. None: all of the past,
    # as a recurrent state does. 0: no state.
    reach: int | None = 0
    # How many of its own parameters a token does not use (experts it is not sent to), for ``plan``.
    inactive_parameters: int = 0
    # Rows of at least so many tokens cannot be padded or packed: tokens are grouped from the row's
    # beginning, not the text's. None: no limit.
    position_dependent_from: int | None = None

    def loss_count(self, name: str, batch: Batch) -> Tensor:
        """The count that a loss term will have, computed from the batch alone (see
        AuxiliaryLoss.count); by default the number of predicted labels.
        """
        return (batch.labels != IGNORE).sum()


class MixerParts(NamedTuple):
    """What the recipe names for the mixer of one layer: functions that build a part for given
    sizes, which may differ from the layer's (another head width, say).
    """

    memories: Mapping[str, Callable[[Dims], Memory]]  # by name, the outermost first
    attention: Callable[[Dims], AttentionBackend]
    qk_norm: Callable[[Dims], QKNorm]
    # an instance of its own; the layer's is ``LayerContext.positional``
    positional: Callable[[Dims], PositionalEncoding]


class Mixer(Layer, ABC):
    """How the tokens of a layer see each other. Built as ``cls(dims, parts, **options)``.

    A variant of softmax attention extends ``lswt_core.plugin_api.softmax_attention``; a recurrence
    is made of ``recurrence`` and ``linear_attention`` there. The state is returned and never stored
    on the module.
    """

    # The parts it uses, of {"memory", "attention", "qk_norm", "positional"}. A recipe that names
    # another one for its layer is refused.
    uses: ClassVar[frozenset[str]] = frozenset()
    # softmax attention only, checked against the backend while the model is built
    # the class of KVBlock.transform that it sets, as kernels may know SoftCap alone
    transforms_scores: ClassVar[type[ScoreTransform] | None] = None
    selects_keys: ClassVar[bool] = False  # sets KVBlock.selected
    has_bias: ClassVar[bool] = False  # sets KVBlock.bias
    # Whether it sees earlier tokens only in what a layer below wrote, and keeps no state itself.
    sees_past_of_others: bool = False

    def __init__(self, dims: Dims, parts: MixerParts) -> None:
        super().__init__()

    @classmethod
    def head_dims(cls, dims: Dims) -> Dims:
        """The sizes of the heads that the attention backend and memories get, from the layer's
        (softmax attention only). By default the same.
        """
        return dims

    @abstractmethod
    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """Mix the layer's normed inputs x [B, T, M]: -> [B, T, M] and the next state, a dictionary.
        ``state`` is what the last call returned, None at the start of a stream.
        """


class BlockParts(NamedTuple):
    """What a block wires together: functions that build a part for given sizes. Each may be called
    several times.
    """

    norm: Callable[[Dims], Norm]
    mixer: Callable[[Dims], Mixer]
    ffn: Callable[[Dims], FeedForward]


class Block(Layer, ABC):
    """How a layer is wired: norms, residual stream, scaling. Built as ``cls(dims, parts,
    **options)``. See ``lswt_core.plugin_api.blocks``.
    """

    def __init__(self, dims: Dims, parts: BlockParts) -> None:
        super().__init__()
        # the layer's own positional encoding, set when the model is built; None: the model's
        self.positional: PositionalEncoding | None = None

    @abstractmethod
    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """One layer: residual stream in, residual stream out, and the next state of its parts."""

    def open_stream(self, x: Tensor) -> Tensor:
        """The residual stream, of any shape [B, T, ...], from the model's input [B, T, M]. Called
        on the first block. All blocks of a model must open and close alike.
        """
        return x

    def close_stream(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, M] from the residual stream. Called on the last block, before the
        output norm.
        """
        return x


class Memory(Component, nn.Module, ABC):
    """Middleware around the key/value projection of one layer: which keys the layer attends to
    besides the new tokens, and which state it keeps. Rows and queries share positions: a selection
    by query is a mixer's (KVBlock.selected). Built as ``cls(dims, **options)``, once a layer.
    Several stack; at most one has a ``length``. State is returned, never stored on the module.
    """

    length: int = 0  # how many tokens back a state reaches; replaying so many rebuilds it
    # Whether a state is {"k", "v"}: the last ``length`` keys and values as they were projected.
    is_kv_cache: ClassVar[bool] = False
    # Sliding window: how many tokens back a query sees, itself included. None: no window.
    window: int | None = None
    # The number of tokens from which on the state depends on absolute positions. None: never.
    position_dependent_from: int | None = None

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Return the key/value blocks to attend to, and the next state.

        x [B, T, M] are the layer's inputs after its norm, positions [T]; ``state`` is what the last
        call returned, None at the start of a stream. The last block must be the new segment's own,
        T long. Earlier blocks are visible to every query, within ``window``.
        """


class AttentionBackend(Component, nn.Module, ABC):
    """Softmax attention over the union of key/value blocks, scale 1/sqrt(D). Built as
    ``cls(dims, **options)``.
    """

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        """Attend with every block's queries to its keys, one softmax over all: -> [B, T, H, D]."""

    def require(self, need: AttentionRequirements) -> str | None:
        """Raise Unsupported, with the reason, if this backend cannot meet the requirements. May
        return a note on how it meets them (the kernel), to be printed and recorded.
        """


class FeedForward(Layer, ABC):
    """The position-wise feed-forward layer of a block. Built as ``cls(dims, **options)``."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""


class StatefulFeedForward(FeedForward, ABC):
    """A feed-forward layer that keeps state from segment to segment (``reach``), reads the
    context (token ids, what lower layers wrote) or returns loss terms.
    """

    @abstractmethod
    def forward(  # type: ignore[override]
        self, x: Tensor, state: State, context: LayerContext
    ) -> LayerOutput:
        """Inputs [B, T, M] -> [B, T, M], the next state (any tree) and loss terms; ``state`` is
        what the last call returned, None at the start of a stream.
        """


class QKNorm(Component, nn.Module, ABC):
    """Normalisation of queries and of keys before the positional encoding, one instance each a
    layer. Built as ``cls(dims, **options)``.
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


class Head(Component, nn.Module, ABC):
    """Token ids to the model's input, and final hidden states to logits: token embedding and LM
    head in one module, which may share a table. Built as ``cls(dims, **options)`` and stored as
    ``decoder.vocabulary``. Heads of one or two tables extend ``lswt_core.plugin_api.lm_head``.
    """

    table: nn.Module  # an nn.Embedding [V, width] that ids are looked up in
    vocab_size: int
    # logits are soft_cap * tanh(logits / soft_cap), in ``logits`` and in ``score``; None: uncapped
    soft_cap: float | None = None

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def project_in(self, embedded: Tensor) -> Tensor:
        """Rows of the table [B, T, width] -> the model's input [B, T, M]."""

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """States [B, T, M] -> logits [B, T, V], all in memory at once."""

    @abstractmethod
    def score(
        self,
        states: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        by: Callable[..., CrossEntropyOutput] | None = None,
        logsumexp: bool = False,
    ) -> CrossEntropyOutput:
        """Cross-entropy of ``logits(states)`` [B, T, V] against labels [B, T] and, with ``draws``,
        also against labels sampled from the model's own distribution. ``by`` computes it: a
        CrossEntropy component or a function with its arguments; None: the head's choice.
        """

    @abstractmethod
    def freeze(self) -> None:
        """Exclude the table that ids are looked up in from training."""

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [B, T] -> the model's input [B, T, M]."""
        return self.project_in(self.table(ids))

    def pretrained_tables(self) -> Sequence[Tensor]:
        """The weights [V, d_vocab] that ``embedding.warm_start`` fills with pretrained rows."""
        return [self.table.weight]  # type: ignore[list-item]

    # transformers resizes what these name (get_output_embeddings, set_output_embeddings)
    def output_layer(self) -> nn.Module | None:
        """The linear layer of the LM head that has a table of its own; None: there is none."""
        return None

    def set_output_layer(self, layer: nn.Module) -> None:
        """Replace the linear layer of the LM head."""
        raise Unsupported(f"head {self.name!r} has no table of its own for logits")


class ParameterInfo(NamedTuple):
    """A parameter as its parametrisation sees it, beside the same one in the base model."""

    name: str  # as in the state dict
    # "matrix": multiplies hidden states; its last dimension is the fan-in, the one before it the
    # fan-out, as in nn.Linear (linear layers' weights, and what a module lists in
    # ``matrix_parameters``). "embedding": rows that are looked up. "other": biases, gains, ...
    role: Literal["matrix", "embedding", "other"]
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]


class Scaling(NamedTuple):
    """Factors for one parameter, 1: as the recipe says."""

    init: float = 1.0  # of the initial values
    lr: float = 1.0  # of the learning rate
    weight_decay: float = 1.0


class Parametrisation(Component, ABC):
    """How initial values, learning rates and weight decay depend on a parameter's role and shape,
    relative to a base model of other sizes. Built as ``cls(**options)``.
    """

    def base_dims(self, dims: Dims) -> Dims:
        """The sizes of the base model, in which every factor is 1. Raises ValueError if a model of
        these sizes has none.
        """
        return dims

    @abstractmethod
    def scaling(self, parameter: ParameterInfo) -> Scaling:
        """The factors of a parameter."""


# ---------- training


class CrossEntropy(Component, nn.Module, ABC):
    """An implementation of cross-entropy over the vocabulary. Implementations differ in speed and
    memory; results agree up to rounding. Built as ``cls(**options)``.
    """

    # Whether ``forward`` also takes ``soft_cap: float | None = None``: logits are then
    # ``soft_cap * tanh(z @ table.T / soft_cap)`` wherever logits are spoken of. A head that caps
    # its logits refuses others.
    takes_soft_cap: bool = False

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
        """Cross-entropy of the logits ``z @ table.T`` against labels [B, T].

        z is [B, T, d_vocab], table [V, d_vocab], of any dtype. With ``draws``, labels are sampled
        and scored as well; with ``logsumexp``, the logsumexp of the logits is returned.
        """

    @abstractmethod
    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        """The number of logits that exist at once for so many tokens, for memory estimates. The
        table [V, d_vocab] may be on the meta device.
        """

    def require(self, device: str) -> None:
        """Raise Unsupported, with the reason, if this cannot run on a device."""


class AuxiliaryLoss(Component, nn.Module, ABC):
    """A loss beside cross-entropy. Built as ``cls(dims, **options)``; its weight is the recipe's
    key ``weight``.
    """

    # Which fields of Output it reads, of {"states", "logits", "logsumexp", "score"}. ``states`` is
    # always there; of the others, those that no loss reads are None.
    needs: ClassVar[frozenset[str]] = frozenset({"states"})
    lookahead: int = 0  # labels beyond the segment's end that it reads (Batch.labels_ahead)

    def __init__(self, dims: Dims) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, out: Output, batch: Batch) -> LossSum:
        """The loss as a sum and a count; total / count is its mean over this batch."""

    def count(self, batch: Batch) -> Tensor:
        """The count that ``forward`` will return, computed from the batch alone; by default the
        number of predicted labels. The global count must be known before the first micro-batch is
        differentiated.
        """
        return (batch.labels != IGNORE).sum()


class Objective(Protocol):
    """The loss of one step's global batch, to be differentiated at the current weights. The states
    of memories are read and never advanced.

    For an optimizer with ``shares_forward`` it is the loss of the ``fraction`` of rows that the
    step's own forward pass sampled labels for: ``subset`` takes that fraction alone.
    """

    @property
    def tokens(self) -> int:
        """The number of predicted labels over all micro-batches and data-parallel ranks."""

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """Add the gradient of the mean loss to every ``p.grad``. "sampled": the cross-entropy
        against labels sampled from the model (the Gauss-Newton-Bartlett estimator), without
        auxiliary losses and those of layers.
        """

    def hessian_vector_product(
        self, params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """The Hessian of the mean training loss times ``vectors``. Leaves ``p.grad`` alone."""

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator seeded by run seed, step and purpose."""

    def subset(self, fraction: float) -> Objective:
        """The objective over a fraction of the rows, spread evenly over the global batch; means and
        ``tokens`` are those of the subset.
        """


class Optimizer(Component, torch.optim.Optimizer):
    """An optimizer: ``class Mine(Optimizer, torch.optim.Mine)`` makes a component of any torch
    optimizer. Built as ``cls(groups, **options)`` with the model's parameter groups; options
    include ``lr``, the peak learning rate, and usually ``weight_decay``.
    """

    # Whether it calls Objective.hessian_vector_product; attention must then also run in float32.
    needs_hessian_vector_products: ClassVar[bool] = False
    # ``update_curvature`` is called every so many steps, beginning with the first; 0: never.
    hessian_update_interval: int = 0
    # Whether that is before the update, with sampled gradients of the forward pass that also gives
    # the gradients of the data; else after the update, with a forward pass of its own.
    shares_forward: bool = False
    # Share of a step's rows that ``update_curvature`` uses; it calls Objective.subset itself.
    fraction: float = 1.0
    # What an update reads of a parameter cut over ranks; "matrix": all of it, which is gathered.
    unit: Literal["element", "matrix"] = "element"

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, attributes included; torch's hooks are made anew."""
        own = {
            key: value
            for key, value in vars(self).items()
            if key != "step" and not key.startswith("_optimizer_")
        }
        return own | super().__getstate__()

    def update_curvature(self, objective: Objective) -> None:
        """Update the Hessian estimate of a second-order method: after ``step`` on the same batch,
        or before it with ``shares_forward``. Gradients are clear before the call; what it leaves in
        them is dropped. Where the objective raises an exception because a gradient is not finite,
        the estimate must stay as it was; the next update tries again.
        """

    def eval_parameters(self) -> AbstractContextManager[None]:
        """A context in which the parameters hold the values to evaluate and save, such as a weight
        average; on exit training goes on with the trained values.
        """
        return nullcontext()

    def statistics(self) -> dict[str, Tensor]:
        """Scalar tensors about the last step, to be logged."""
        return {}


class WeightAverage(Component, ABC):
    """An average of the trained weights, which is evaluated, saved and exported in their place.
    Built as ``cls(**options)``.
    """

    is_active: ClassVar[bool] = True  # False: no average is kept

    @abstractmethod
    def rate(self, step: int) -> float:
        """How far the average moves to the weights after update ``step``, the first being 1:
        ``average += rate * (weights - average)``; 0: not at all. It starts as the initial weights.
        """


class Schedule(Component, ABC):
    """A learning-rate schedule. Built as ``cls(horizon, **options)``; raises ValueError for a run
    that it cannot serve.
    """

    def __init__(self, horizon: Horizon) -> None:
        self.horizon = horizon

    @abstractmethod
    def factor(self, step: int) -> float:
        """The learning rate of update ``step``, from 1 on, as a fraction of the peak."""


# ---------- data, tracking


class DataSource(Component, ABC):
    """A source of documents. Built as ``cls(**options)``; nothing is read before it is asked."""

    streaming: bool = False  # True: tokenised while it is read, instead of once beforehand
    selects_scored: bool = False  # True: documents may have ``scored`` ranges
    # The train.seq_len, if rows begin where documents do: all have the same number of segments.
    segment_length: int | None = None

    @abstractmethod
    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """Every document of a split, always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the content, or of what identifies a stream: another text has another hash."""

    def n_bytes(self, split: Literal["train", "valid"]) -> int | None:
        """The approximate size of a split in bytes, for a progress bar; None if not known."""
        return None

    def state(self) -> Mapping[str, Any] | None:
        """Where the latest ``documents`` stands, as JSON data: ``documents(split, after=state)`` on
        any instance goes on there. None: no states; a resumed stream reads again, and skips.
        """
        return None


class Tokenizer(Component, ABC):
    """Text to token ids and back. Built as ``cls(**options)``."""

    def fit(
        self, documents: Callable[[], Iterable[Document]], fingerprint: str, cache: Path
    ) -> None:
        """Train on the training documents, or load what was trained before; most do nothing here.
        Files go to ``cache``, named after ``fingerprint`` (of source and options) and all else.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of ids; every id is below it."""

    @property
    @abstractmethod
    def bos_id(self) -> int:
        """The id that the inputs of every document begin with."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The id that the labels of every document end with."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""

    def split_long_text(self, text: str) -> Iterable[str]:
        """Split a text into pieces whose ids, concatenated, are the ids of the whole; by default
        one piece. See ``lswt_core.plugin_api.tokenizers``. May run while another thread encodes.
        """
        return [text]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the mapping: another tokenizer has another hash."""

    def save(self, directory: Path) -> None:
        """Write files for transformers' AutoTokenizer (see ``lswt_core.plugin_api.tokenizers``)."""
        raise Unsupported(f"tokenizer {self.name!r} has no export to transformers (Tokenizer.save)")

    def vocab(self) -> Mapping[str, int] | None:
        """Every token with its id, spelled as in byte-level or SentencePiece vocabularies ("Ġthe",
        "▁the"). Pretrained embeddings are matched by these. None: there is no such list.
        """
        return None


class Tracker(Component, ABC):
    """A mirror of a run's metrics. Built as ``cls(run, **options)``. The local metrics.jsonl is
    complete without it; an exception of a tracker is reported once and never stops the run.
    """

    def __init__(self, run: RunInfo) -> None:
        self.run = run

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step."""

    def close(self) -> None:
        """Flush and close."""
