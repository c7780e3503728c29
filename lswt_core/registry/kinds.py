"""The kinds of component: the interface, recipe table and multiplicity of each. Imports nothing, so
that recipes are checked without importing torch.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of component."""

    name: str
    interface: str  # class name in lswt_core.interfaces
    table: str  # "ffn" -> [ffn]; "memory" -> [memory.<name>] when `many`
    many: bool = False  # whether a recipe may have several
    given: int = 1  # positional constructor arguments that the core supplies before the options
    # other classes that make a component one of this kind: dotted names
    bases: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()  # of its table that are the core's, not the component's


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("head", "Head", "head", bases=("lswt_core.plugin_api.lm_head.LMHead",)),
        Kind("block", "Block", "block", given=2),
        Kind(
            "mixer",
            "Mixer",
            "mixer",
            given=2,
            bases=("lswt_core.plugin_api.softmax_attention.SoftmaxAttention",),
        ),
        Kind("positional", "PositionalEncoding", "positional"),
        Kind("memory", "Memory", "memory", many=True),
        Kind("attention", "AttentionBackend", "attention"),
        Kind("qk_norm", "QKNorm", "qk_norm"),
        Kind("ffn", "FeedForward", "ffn", bases=("lswt_core.interfaces.StatefulFeedForward",)),
        Kind("norm", "Norm", "norm"),
        Kind("parametrisation", "Parametrisation", "parametrisation", given=0),
        Kind("cross_entropy", "CrossEntropy", "cross_entropy", given=0),
        Kind("loss", "AuxiliaryLoss", "loss", many=True, keys=("weight",)),
        Kind("optimizer", "Optimizer", "optimizer"),
        Kind("average", "WeightAverage", "average", given=0),
        Kind("schedule", "Schedule", "schedule"),
        Kind("data", "DataSource", "data", given=0, keys=("token_directory",)),
        Kind("tokenizer", "Tokenizer", "tokenizer", given=0),
        Kind("tracker", "Tracker", "track", many=True),
    )
}
KIND_OF_INTERFACE: dict[str, str] = {kind.interface: kind.name for kind in KINDS.values()}
# by the dotted name of a class that a component may extend
KIND_OF_BASE: dict[str, str] = {
    base: kind.name
    for kind in KINDS.values()
    for base in (f"lswt_core.interfaces.{kind.interface}", *kind.bases)
}
KIND_OF_TABLE: dict[str, Kind] = {kind.table: kind for kind in KINDS.values()}
