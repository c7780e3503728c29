"""The recipe tables of the core; components bring their own options. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, model_validator

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
# The bounds catch typing errors: they are far beyond any model that was ever trained.
Size = Annotated[int, Ge(1), Le(1 << 20)]  # of a width, a text, a batch
Depth = Annotated[int, Ge(1), Le(1 << 12)]
Vocabulary = Annotated[int, Ge(1), Le(1 << 24)]
Amount = Annotated[int, Ge(1), Le(10**16)]  # of tokens
MOST_STEPS = 10**9
Steps = Annotated[int, Ge(1), Le(MOST_STEPS)]


class Table(BaseModel):
    """A recipe table: strict types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(Table):
    """[model]: width, depth and heads of the decoder."""

    d_model: Size = 768
    n_layers: Depth = 12
    n_heads: Size = 12
    n_kv_heads: Size | None = None  # key/value heads (grouped-query attention); None: n_heads
    d_ffn: Size | None = None  # after gating; None: 4 * d_model
    bias: bool = True  # of the attention projections
    init_std: Annotated[float, Gt(0)] = 0.02  # of every Linear and Embedding

    @model_validator(mode="after")
    def heads_divide(self) -> Model:
        """Require that d_model is divisible by n_heads, and n_heads by n_kv_heads."""
        if self.d_model % self.n_heads:
            nearest = min(
                (n for n in range(1, self.d_model + 1) if self.d_model % n == 0),
                key=lambda n: abs(n - self.n_heads),
            )
            raise ValueError(
                f"d_model = {self.d_model} is not divisible by n_heads = {self.n_heads}; the"
                f" nearest that divides is {nearest}"
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads = {self.n_heads} is not divisible by n_kv_heads = {self.n_kv_heads}"
            )
        return self


class Embedding(Table):
    """[embedding]: the tied embedding, and the projections between its width and the model's."""

    # rows of the table: at least the size of the tokenizer's vocabulary
    vocab_size: Vocabulary = 50_272
    d_vocab: Size = 768
    # or a Hub name[@revision], model directory, .safetensors, .npz or .gguf file, package:NAME
    warm_start: str = "none"
    trainable: bool = True  # false: the table is frozen, in float16


class Group(Table):
    """[groups.ROLE]: what differs for the parameters of a role."""

    lr_factor: Annotated[float, Gt(0)] = 1.0  # times optimizer.lr
    weight_decay: Annotated[float, Ge(0)] | None = None  # None: the optimizer's, or none


class Groups(Table):
    """[groups]: learning rates and weight decay by role of the parameters."""

    embedding: Group = Group()  # embedding tables
    projections: Group = Group()  # between the table's width and the model's
    matrices: Group = Group()  # all other weights of two or more dimensions
    vectors: Group = Group()  # biases, gains of norms, and whatever has one dimension


class Train(Table):
    """[train]: batch, length of the run, precision and memory."""

    batch_size: Size = 480  # rows of all ranks together (effective batch size)
    seq_len: Size = 2048  # sequence length: new tokens a row reads per step
    micro_batch_size: Size | None = None  # rows per forward pass; None: all of a process's
    # ranks over which a replica of the model is cut; all: every rank; 1: each has a replica
    shard: Size | Literal["all"] = 1
    tokens: Amount | None = None  # length of the run; give this or steps
    steps: Steps | None = None
    grad_clip: Annotated[float, Ge(0)] = 1.0  # global gradient norm; 0: not clipped
    seed: Count = 0
    # auto: bfloat16 where the hardware has it
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # true: tokens attend to their own document only; false: across document boundaries
    document_masking: bool = False
    # streamed documents go to the row with the fewest tokens left, or i to row i mod batch_size
    document_assignment: Literal["least-loaded", "round-robin"] = "least-loaded"
    compile: Literal["auto", "none", "blocks"] = "auto"  # auto: every block is compiled on CUDA
    # block: store the input of every block only, and recompute it in the backward pass
    activation_checkpointing: Literal["none", "block"] = "none"
    # where memories of the rows are kept between micro-batches; host: in pinned host memory
    memory_device: Literal["device", "host"] = "device"
    log_every: Positive = 10  # steps between plain progress lines where there is no terminal

    @model_validator(mode="after")
    def length_given(self) -> Train:
        """Require a length, and a batch that micro-batches divide."""
        if self.tokens is None and self.steps is None:
            raise ValueError("a run needs a length: set train.steps or train.tokens")
        if self.total_steps > MOST_STEPS:
            each = f"{self.total_steps:,} updates of {self.tokens_per_step:,}"
            raise ValueError(f"tokens = {self.tokens} makes {each}; {MOST_STEPS:,} are the most")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} is not divisible by micro_batch_size ="
                f" {self.micro_batch_size}"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.batch_size * self.seq_len

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; ``steps`` takes precedence over ``tokens``."""
        if self.steps is not None:
            return self.steps
        return -(-(self.tokens or 0) // self.tokens_per_step)


class Evaluate(Table):
    """[evaluate]: evaluation on held-out text."""

    every: Count = 1000  # steps; 0: only at the end
    tokens: Amount = 1_000_000  # at most so many
    batch_size: Size = 8


class Checkpoint(Table):
    """[checkpoint]: how often, how many, and whether training goes on meanwhile."""

    # true: a copy in host memory is written while training goes on; auto: on accelerators
    asynchronous: Literal["auto"] | bool = "auto"

    every: Count = 1000  # steps; 0: only at the end
    keep: Annotated[int, Ge(2)] = 2
    # replay: memories are not stored but rebuilt from the last tokens
    memory: Literal["exact", "replay"] = "exact"


class Sample(Table):
    """[sample]: the text that is generated when a run ends."""

    prompt: str = ""  # empty: the beginning of a held-out document
    tokens: Annotated[int, Ge(0), Le(1 << 24)] = 100
    temperature: Annotated[float, Ge(0)] = 0.8  # 0: greedy
    top_p: Annotated[float, Gt(0), Lt(1.000001)] = 0.95


CORE_TABLES: dict[str, type[Table]] = {
    "model": Model,
    "embedding": Embedding,
    "groups": Groups,
    "train": Train,
    "evaluate": Evaluate,
    "checkpoint": Checkpoint,
    "sample": Sample,
}
