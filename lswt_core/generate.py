"""Text from a model, token by token, with the model's own memory as cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lswt_core.model import Decoder
from lswt_core.parallel import Precision


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompt: list[int],
    *,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    precision: Precision,
    context: int,
    end: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Draw up to ``tokens`` ids after the prompt, until ``end`` or a stop.

    The prompt is read in segments of at most ``context`` tokens, as in training; then one token at a time. Temperature 0 takes
    the likeliest token; ``top_p`` draws from the smallest set of tokens with that probability (Holtzman et al. 2020, arXiv
    1904.09751).
    """
    device = next(decoder.parameters()).device
    stream = torch.Generator().manual_seed(seed)
    pieces: list[list[int]] = [prompt[i : i + context] for i in range(0, len(prompt), context)]
    state = None
    for _ in range(tokens):
        for piece in pieces:
            with precision.autocast(device):
                states, state = decoder(torch.tensor([piece], device=device), state)
                logits = decoder.vocabulary.logits(states[:, -1:])[0, 0]
        chosen = pick(logits.float().cpu(), temperature, top_p, stream)
        if chosen == end or stopping():
            return
        yield chosen
        pieces = [[chosen]]


def pick(logits: Tensor, temperature: float, top_p: float, stream: torch.Generator) -> int:
    """One id from logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    p, ids = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    p = p.where(p.cumsum(-1) - p < top_p, 0.0)  # the likeliest is always kept
    return int(ids[torch.multinomial(p, 1, generator=stream)])
