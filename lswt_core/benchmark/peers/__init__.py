"""Models of other libraries at the same sizes, each used as its documentation recommends. Each
module imports its library and is imported only if the peer is named.
"""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from lswt_core.benchmark.work import Contender
from lswt_core.errors import UsageError
from lswt_core.registry import nearest


class Peer(NamedTuple):
    """Where a contender is defined."""

    module: str
    member: str
    needs: str  # pip requirement, and what else


PEERS = {
    "llama": Peer("llama", "Llama", "transformers"),
    "llama-tuned": Peer("llama", "LlamaTuned", "transformers, and a compiler for torch.compile"),
    "x-transformers": Peer("x_transformers", "XTransformers", "x-transformers"),
    "x-transformers-tuned": Peer("x_transformers", "XTransformersTuned", "x-transformers"),
    "gpt": Peer("gpt", "Gpt", "torch"),
    "gpt-compiled": Peer("gpt", "GptCompiled", "torch, and a compiler for torch.compile"),
    "litgpt": Peer("litgpt", "LitGpt", "litgpt"),
}
ORIGINALS = ("original", "original-float32")


def find_peer(name: str) -> type[Contender]:
    """Return a peer's class; raises UsageError if the name is unknown or its library is missing."""
    if name not in PEERS:
        names = [*ORIGINALS, *PEERS]
        guess = nearest(name, names)
        hint = f"; did you mean {guess}?" if guess else ""
        raise UsageError(
            f"--against {name}: neither a recipe nor a peer; peers are {', '.join(names)}{hint}"
        )
    peer = PEERS[name]
    try:
        module = import_module(f"{__name__}.{peer.module}")
    except ImportError as error:
        raise UsageError(
            f"--against {name} needs {peer.needs} ({error}): python -m pip install"
            f" {peer.needs.split(',')[0]}"
        ) from error
    contender: type[Contender] = getattr(module, peer.member)
    return contender
