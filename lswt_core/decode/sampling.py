"""How the next token is chosen: the likeliest, one drawn at random, or contrastive search."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lswt_core.decode.engine import InferenceEngine
from lswt_core.errors import UsageError
from lswt_core.plugin_api.pytree import tree_map
from lswt_core.registry import nearest


class Method(ABC):
    """A way to go on with a text; its fields are its options."""

    @abstractmethod
    def __call__(
        self, read: InferenceEngine, prompt: Tensor, pads: Tensor | None = None
    ) -> Iterator[Tensor]:
        """What follows prompts [B, T]: ids [B] at a time, without end. Prompts of different length
        are padded on the left, by ``pads`` [B] ids; raises UsageError where a method cannot read
        those.
        """


@dataclass(frozen=True)
class Greedy(Method):
    """Always the likeliest token, the lowest id of equals."""

    def __call__(
        self, read: InferenceEngine, prompt: Tensor, pads: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See Method."""
        return one_at_a_time(read, prompt, pads, lambda logits: logits.argmax(-1))


@dataclass(frozen=True)
class Sample(Method):
    """A token drawn from the model's distribution at a ``temperature``, of the ``top_k`` likeliest
    alone, and of those from the smallest set that has probability ``top_p`` (Holtzman et al. 2020,
    arXiv 1904.09751). Temperature 0 is greedy.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check("temperature", self.temperature, 0 <= self.temperature < math.inf, "at least 0")
        check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        check("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")
        check("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2^63")

    def __call__(
        self, read: InferenceEngine, prompt: Tensor, pads: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See Method. Drawn on the CPU, so that a seed means the same on every device."""
        if self.temperature == 0:
            return Greedy()(read, prompt, pads)
        stream = torch.Generator().manual_seed(self.seed)
        return one_at_a_time(read, prompt, pads, lambda logits: self.draw(logits.cpu(), stream))

    def draw(self, logits: Tensor, stream: torch.Generator) -> Tensor:
        """Logits [B, V] -> ids [B]."""
        p, ids = (logits / self.temperature).softmax(-1).sort(descending=True, stable=True)
        if self.top_k is not None:
            p = p[:, : self.top_k] / p[:, : self.top_k].sum(-1, keepdim=True)
        p = p.where(p.cumsum(-1) - p < self.top_p, 0.0)  # the likeliest is always kept
        return ids.gather(-1, torch.multinomial(p, 1, generator=stream))[:, 0]


@dataclass(frozen=True)
class Contrastive(Method):
    """Contrastive search (Su et al. 2022, arXiv 2202.06417, eq. 5; Su and Collier 2022, arXiv
    2210.14140): of the ``top_k`` likeliest tokens v, the one with the highest

        (1 - alpha) p(v | x_<t) - alpha max_{j<t} cos(h_v, h_{x_j})

    p is the softmax over the whole vocabulary, h are the states after the output norm (which SimCTG
    trains), h_v is had by reading v, and x_<t is all that has been read, the prompt included. Of
    equals the lowest id wins. With alpha 0 or top_k 1 it is greedy. A step is one forward pass of
    top_k rows.
    """

    top_k: int = 4
    alpha: float = 0.6

    def __post_init__(self) -> None:
        check("top_k", self.top_k, self.top_k >= 1, "at least 1")
        check("alpha", self.alpha, 0 <= self.alpha <= 1, "from 0 to 1")

    def __call__(
        self, read: InferenceEngine, prompt: Tensor, pads: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See Method."""
        if self.alpha == 0 or self.top_k == 1:
            return Greedy()(read, prompt, pads)
        if pads is not None:
            raise UsageError(
                "contrastive search compares with all that was read, of which pads are no part:"
                " give it prompts of one length"
            )
        return self.search(read, prompt)

    def search(self, read: InferenceEngine, prompt: Tensor) -> Iterator[Tensor]:
        """The same without the shortcut."""
        states, past = read(prompt)
        history = directions(states)  # [B, T, M]
        while True:
            p, ids = candidates(read.logits(states[:, -1]), self.top_k)  # [B, K]
            rows, k = ids.shape
            # [B*K, 1, M]
            ahead, pasts = read(ids.reshape(-1, 1), tree_map(partial(repeat, k=k), past))
            h = directions(ahead).view(rows, k, -1)  # [B, K, M]
            similarity = (h @ history.mT).amax(-1)  # [B, K]
            best = contrast(p, similarity, self.alpha).argmax(-1)  # [B]
            yield ids.gather(-1, best[:, None])[:, 0]
            chosen = best + k * torch.arange(rows, device=best.device)  # [B] among B*K
            states, past = (
                ahead[chosen],
                tree_map(partial(torch.index_select, dim=0, index=chosen), pasts),
            )
            history = torch.cat((history, directions(states)), dim=1)


METHODS: dict[str, type[Method]] = {"sample": Sample, "greedy": Greedy, "contrastive": Contrastive}


def method_of(name: str, options: Mapping[str, Any]) -> Method:
    """A method by its name; raises UsageError for a name or an option that there is not."""
    if name not in METHODS:
        near = nearest(name, METHODS)
        raise UsageError(
            f"unknown decoding method {name!r}; "
            + (f"did you mean {near!r}?" if near else f"choose of {', '.join(METHODS)}")
        )
    for option in options:
        takers = [other for other, method in METHODS.items() if option in option_names(method)]
        if name not in takers:
            raise UsageError(
                f"decoding method {name!r} has no {option}; it is an option of"
                f" {' and '.join(takers)}"
            )
    return METHODS[name](**options)


def option_names(method: type[Method]) -> list[str]:
    """The options of a method."""
    return [field.name for field in fields(method)]  # type: ignore[arg-type]  # every method is a dataclass


def check(name: str, value: object, valid: bool, range_: str) -> None:
    """Raise UsageError for an option outside of its range."""
    if not valid:
        raise UsageError(f"{name} = {value}: must be {range_}")


def one_at_a_time(
    read: InferenceEngine, prompt: Tensor, pads: Tensor | None, choose: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Go on with prompts [B, T] where logits [B, V] are enough to choose ids [B]."""
    reading = read.begin(pads)
    states = reading(prompt)
    while True:
        chosen = choose(read.logits(states[:, -1]))
        yield chosen
        states = reading(chosen[:, None].to(prompt.device))


def candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits [B, V] -> probabilities and ids [B, K] of the k largest, in the order of their ids;
    the lowest of equals.
    """
    ids = logits.sort(descending=True, stable=True).indices[:, :k].sort().values
    return logits.softmax(-1).gather(-1, ids), ids


def repeat(tensor: Tensor, k: int) -> Tensor:
    """[B, ...] -> [B*K, ...], every row k times; a single row is not copied."""
    return tensor[:, None].expand(-1, k, *tensor.shape[1:]).flatten(0, 1)


def directions(states: Tensor) -> Tensor:
    """States [..., M] at length 1, in float32 at least."""
    return normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)


def contrast(p: Tensor, similarity: Tensor, alpha: float) -> Tensor:
    """Scores of candidates: probabilities, and their states' largest cosine with what has been
    read; all [..., K].
    """
    return (1 - alpha) * p - alpha * similarity
