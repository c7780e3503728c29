"""Decoding methods: greedy, sampling (temperature, top-k, top-p) and contrastive search."""

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

from lswt_core.decode.engine import InferenceEngine, require_finite_logits
from lswt_core.device import send
from lswt_core.errors import UsageError
from lswt_core.plugin_api.pytree import tree_map
from lswt_core.registry import nearest


class DecodingMethod(ABC):
    """A decoding method; its dataclass fields are its options."""

    @abstractmethod
    def __call__(
        self, engine: InferenceEngine, prompt: Tensor, pad_lengths: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the ids [B] that follow prompts [B, T], without end. Prompts of different length
        are padded on the left by ``pad_lengths`` [B] ids; raises UsageError if the method does not
        support padding.
        """


@dataclass(frozen=True)
class Greedy(DecodingMethod):
    """Greedy search: the most likely token, the lowest id among equals."""

    def __call__(
        self, engine: InferenceEngine, prompt: Tensor, pad_lengths: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See DecodingMethod."""
        return decode_tokens(engine, prompt, pad_lengths, most_likely)


@dataclass(frozen=True)
class Sample(DecodingMethod):
    """Sampling at a ``temperature``, of the ``top_k`` most likely tokens, and of those from the
    smallest set with probability ``top_p`` (nucleus sampling, Holtzman et al. 2020, arXiv
    1904.09751). Temperature 0 is greedy search.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        is_temperature = 0 <= self.temperature < math.inf
        require_option("temperature", self.temperature, is_temperature, "at least 0")
        require_option("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        require_option("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")
        require_option("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2^63")

    def __call__(
        self, engine: InferenceEngine, prompt: Tensor, pad_lengths: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See DecodingMethod. Samples on the CPU, so that a seed gives the same on every device."""
        if self.temperature == 0:
            return Greedy()(engine, prompt, pad_lengths)
        generator = torch.Generator().manual_seed(self.seed)

        def choose(logits: Tensor) -> Tensor:
            return self.sample(require_finite_logits(logits.cpu()), generator)

        return decode_tokens(engine, prompt, pad_lengths, choose)

    def sample(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Logits [B, V] -> ids [B]."""
        p, ids = (logits / self.temperature).softmax(-1).sort(descending=True, stable=True)
        if self.top_k is not None:
            p = p[:, : self.top_k] / p[:, : self.top_k].sum(-1, keepdim=True)
        p = p.where(p.cumsum(-1) - p < self.top_p, 0.0)  # the most likely token always remains
        return ids.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


@dataclass(frozen=True)
class Contrastive(DecodingMethod):
    """Contrastive search (Su et al. 2022, arXiv 2202.06417, eq. 5; Su and Collier 2022, arXiv
    2210.14140): of the ``top_k`` most likely tokens v, the one with the highest

        (1 - alpha) p(v | x_<t) - alpha max_{j<t} cos(h_v, h_{x_j})

    p is the softmax over the whole vocabulary, h are the hidden states after the output norm (which
    SimCTG trains), h_v is computed by a forward pass over v, and x_<t are all tokens so far, the
    prompt included. Among equals the lowest id wins. With alpha 0 or top_k 1 it is greedy search. A
    step is one forward pass of top_k rows.
    """

    top_k: int = 4
    alpha: float = 0.6

    def __post_init__(self) -> None:
        require_option("top_k", self.top_k, self.top_k >= 1, "at least 1")
        require_option("alpha", self.alpha, 0 <= self.alpha <= 1, "from 0 to 1")

    def __call__(
        self, engine: InferenceEngine, prompt: Tensor, pad_lengths: Tensor | None = None
    ) -> Iterator[Tensor]:
        """See DecodingMethod."""
        if self.alpha == 0 or self.top_k == 1:
            return Greedy()(engine, prompt, pad_lengths)
        if pad_lengths is not None:
            raise UsageError(
                "contrastive search does not support padding, which it would compare candidates"
                " with: give it prompts of one length"
            )
        return self.search(engine, prompt)

    def search(self, engine: InferenceEngine, prompt: Tensor) -> Iterator[Tensor]:
        """Yield ids [B] after prompts [B, T], also where greedy search would give the same."""
        states, cache = engine(prompt)
        history = unit_vectors(states)  # [B, T, M]
        while True:
            p, ids = top_candidates(engine.logits(states[:, -1]), self.top_k)  # [B, K]
            rows, k = ids.shape
            repeated = tree_map(partial(repeat_rows, k=k), cache)
            candidate_states, caches = engine(ids.reshape(-1, 1), repeated)  # [B*K, 1, M]
            h = unit_vectors(candidate_states).view(rows, k, -1)  # [B, K, M]
            similarity = (h @ history.mT).amax(-1)  # [B, K]
            best = contrastive_score(p, similarity, self.alpha).argmax(-1)  # [B]
            yield ids.gather(-1, best[:, None])[:, 0]
            chosen = best + k * torch.arange(rows, device=best.device)  # [B] rows of B*K
            states = candidate_states[chosen]
            cache = tree_map(partial(torch.index_select, dim=0, index=chosen), caches)
            history = torch.cat((history, unit_vectors(states)), dim=1)


METHODS: dict[str, type[DecodingMethod]] = {
    "sample": Sample,
    "greedy": Greedy,
    "contrastive": Contrastive,
}


def build_method(name: str, options: Mapping[str, Any]) -> DecodingMethod:
    """Build a decoding method; raises UsageError for an unknown name or option."""
    if name not in METHODS:
        near = nearest(name, METHODS)
        hint = f"choose from {', '.join(METHODS)}"
        if near:
            hint = f"did you mean {near!r}?"
        raise UsageError(f"unknown decoding method {name!r}; {hint}")
    for option in options:
        methods = [other for other, method in METHODS.items() if option in option_names(method)]
        if name not in methods:
            raise UsageError(
                f"decoding method {name!r} has no {option}; it is an option of"
                f" {' and '.join(methods)}"
            )
    return METHODS[name](**options)


def option_names(method: type[DecodingMethod]) -> list[str]:
    """Return the options of a method."""
    # every method is a dataclass
    return [field.name for field in fields(method)]  # type: ignore[arg-type]


def require_option(name: str, value: object, is_valid: bool, allowed: str) -> None:
    """Raise UsageError for an option outside of its range."""
    if not is_valid:
        raise UsageError(f"{name} = {value}: must be {allowed}")


def decode_tokens(
    engine: InferenceEngine,
    prompt: Tensor,
    pad_lengths: Tensor | None,
    choose: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """Yield ids [B] after prompts [B, T], each chosen from logits [B, V] alone. ``choose`` returns
    ids on the CPU, and raises NumericsError for logits that are not finite: in the step's one wait
    for the device.
    """
    sequence = engine.start(pad_lengths)
    states = sequence(prompt)
    while True:
        chosen = choose(sequence.unchecked_logits(states[:, -1]))
        yield chosen
        states = sequence(send(chosen[:, None], prompt.device))


def most_likely(logits: Tensor) -> Tensor:
    """The ids [B] of the largest logits [B, V], the lowest among equals, on the CPU. Raises
    NumericsError.
    """
    ids = torch.cat((logits.argmax(-1), logits.isfinite().all()[None])).cpu()  # read together
    require_finite_logits(logits, bool(ids[-1]))
    return ids[:-1]


def top_candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Logits [B, V] -> probabilities and ids [B, K] of the k most likely tokens, sorted by id; the
    lowest ids among equals.
    """
    ids = logits.sort(descending=True, stable=True).indices[:, :k].sort().values
    return logits.softmax(-1).gather(-1, ids), ids


def repeat_rows(tensor: Tensor, k: int) -> Tensor:
    """[B, ...] -> [B*K, ...], every row k times; a single row is expanded without a copy."""
    return tensor[:, None].expand(-1, k, *tensor.shape[1:]).flatten(0, 1)


def unit_vectors(states: Tensor) -> Tensor:
    """Hidden states [..., M] at norm 1, at least float32."""
    return normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)


def contrastive_score(p: Tensor, similarity: Tensor, alpha: float) -> Tensor:
    """Score candidates by their probability and their largest cosine similarity to earlier tokens;
    all [..., K].
    """
    return (1 - alpha) * p - alpha * similarity
