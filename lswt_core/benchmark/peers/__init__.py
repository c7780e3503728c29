"""Other libraries' models at the same sizes, each as its own users have it. A module here imports
its library only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from lswt_core.benchmark.work import Contender, Work
from lswt_core.errors import UsageError
from lswt_core.registry import nearest


class Peer(NamedTuple):
    """A subject by name."""

    module: str
    member: str
    needs: str  # what to install


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


def find(name: str) -> Callable[[Work], Contender]:
    """What builds a peer; UsageError if there is none of this name or its library is missing."""
    if name not in PEERS:
        guess = nearest(name, [*PEERS, *ORIGINALS])
        known = ", ".join([*ORIGINALS, *PEERS])
        raise UsageError(
            f"--against {name}: neither a recipe nor a peer; peers are {known}"
            + (f"; did you mean {guess}?" if guess else "")
        )
    peer = PEERS[name]
    try:
        built: Callable[[Work], Contender] = getattr(
            import_module(f"{__name__}.{peer.module}"), peer.member
        )
    except ImportError as error:
        raise UsageError(
            f"--against {name} needs {peer.needs} ({error}): python -m pip install"
            f" {peer.needs.split(',')[0]}"
        ) from error
    return built
