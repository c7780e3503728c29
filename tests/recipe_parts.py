"""A single-file plugin with a component of every kind, for tests of recipes. It is read as text and
never imported.
"""

from typing import Annotated, Literal

import annotated_types as at
from annotated_types import Ge, Gt

from lswt_core import interfaces
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    AttentionBackend,
    AuxiliaryLoss,
    Block,
    BlockParts,
    DataSource,
    Dims,
    FeedForward,
    Head,
    Memory,
    Mixer,
    MixerParts,
    Norm,
    Optimizer,
    Parametrisation,
    PositionalEncoding,
    QKNorm,
    WeightAverage,
)

Size = Annotated[int, Ge(1)]


class Tied(Head):
    """One table."""

    name = "tied"


class PreNorm(Block):
    """Norms first."""

    name = "pre-norm"

    def __init__(self, dims: Dims, parts: BlockParts) -> None: ...


class Attention(Mixer):
    """Attends."""

    name = "attention"

    def __init__(self, dims: Dims, parts: MixerParts) -> None: ...


class Standard(Parametrisation):
    """Nothing is scaled."""

    name = "standard"


class Rope(PositionalEncoding):
    """Rotary."""

    name = "rope"
    citation = "@article{rope}"

    def __init__(
        self, dims: Dims, *, base: Annotated[float, Gt(1)] = 500_000.0, reversed: bool = True
    ) -> None: ...


class Slopes(PositionalEncoding):
    """Linear biases."""

    name = "alibi"

    def __init__(self, dims: Dims, *, slope: float = -0.5) -> None: ...


class Cache(Memory):
    """Remembers."""

    name = "xl-cache"

    def __init__(self, dims: Dims, *, length: Size = 2048, kept: Size | None = None) -> None: ...


class Registers(Memory):
    """Sinks."""

    name = "registers"

    def __init__(self, dims: Dims, *, count: Size = 16) -> None: ...


class Eager(AttentionBackend):
    """Plain."""

    name = "eager"


class Sdpa(AttentionBackend):
    """Fused."""

    name = "sdpa"

    def __init__(
        self, dims: Dims, *, method: Literal["auto", "split", "joint"] = "auto"
    ) -> None: ...


class SwiGlu(FeedForward):
    """Gated."""

    name = "swiglu"

    def __init__(self, dims: Dims, *, bias: bool = True) -> None: ...


class Gelu(FeedForward):
    """Not gated."""

    name = "gelu"

    def __init__(self, dims: Dims, *, bias: bool = True, approximate: bool = False) -> None: ...


class NoHeadNorm(QKNorm):
    """None."""

    name = "none"


class LayerNorm(Norm):
    """Norm."""

    name = "layernorm"

    def __init__(self, dims: Dims, *, eps: Annotated[float, at.Gt(0)] = 1e-5) -> None: ...


class Chunked(interfaces.CrossEntropy):
    """Logits by the chunk."""

    name = "chunked"


class SimCtg(AuxiliaryLoss):
    """Contrast."""

    name = "simctg"

    def __init__(self, dims: Dims, *, margin: Annotated[float, Ge(0)] = 0.5) -> None: ...


class AdamW(Optimizer):
    """Adam."""

    name = "adamw"

    def __init__(
        self, groups: list, *, lr: Annotated[float, Gt(0)] = 1e-3, betas: list[float] | None = None
    ) -> None: ...


class NoAverage(WeightAverage):
    """The weights themselves."""

    name = "none"


class Cosine(interfaces.Schedule):
    """Cosine."""

    name = "cosine"

    def __init__(
        self, horizon: interfaces.Horizon, *, warmup_steps: Annotated[int, Ge(0)] = 10
    ) -> None: ...


class Stdlib(DataSource):
    """Text at hand."""

    name = "stdlib"


class Text(DataSource):
    """Files."""

    name = "text"

    def __init__(self, *, paths: list[str], header: str = "") -> None: ...


class Bpe(interfaces.Tokenizer):
    """Pieces."""

    name = "bpe"

    def __init__(self, *, vocab_size: Size = 8192) -> None: ...


class Board(interfaces.Tracker):
    """Curves."""

    name = "board"

    def __init__(self, run: interfaces.RunInfo, *, tags: list[str] | None = None) -> None: ...


@hookimpl
def lswt_components() -> list[type]:
    """Offer all of them."""
    return [
        Tied,
        PreNorm,
        Attention,
        Standard,
        Rope,
        Slopes,
        Cache,
        Registers,
        Eager,
        Sdpa,
        SwiGlu,
        Gelu,
        NoHeadNorm,
        LayerNorm,
        Chunked,
        SimCtg,
        AdamW,
        NoAverage,
        Cosine,
        Stdlib,
        Text,
        Bpe,
        Board,
    ]
