"""Ids as they are chosen, and text as it becomes readable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch

from lswt_core.decode.engine import InferenceEngine
from lswt_core.decode.sampling import Method
from lswt_core.interfaces import Tokenizer

# at the end of a text: a character of which some bytes have yet to come
UNREADABLE = "\N{REPLACEMENT CHARACTER}"


def generate(
    read: InferenceEngine,
    prompt: Sequence[int],
    method: Method,
    *,
    tokens: int,
    end: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Up to ``tokens`` ids after a prompt of at least one id, until ``end`` or a stop."""
    for chosen in islice(method(read, torch.tensor([prompt], device=read.device)), tokens):
        if int(chosen) == end or stopping():
            return
        yield int(chosen)


def complete(
    read: InferenceEngine,
    prompts: Sequence[Sequence[int]],
    method: Method,
    *,
    tokens: int,
    end: int | None = None,
) -> list[list[int]]:
    """Up to ``tokens`` ids after each of several prompts, of whatever length, all at once; each
    ends before its ``end``.
    """
    longest = max(map(len, prompts))
    pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=read.device)
    ids = torch.tensor(
        [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=read.device
    )
    found: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for chosen in islice(method(read, ids, pads if pads.any() else None), tokens):
        for row in list(going):
            if (token := int(chosen[row])) == end:
                going.discard(row)
            else:
                found[row].append(token)
        if not going:
            break
    return found


def texts(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """The text of ids that follow a prompt, piece by piece, whole characters only.

    An id is decoded together with the piece before it: some tokenizers write a token differently
    where a text begins.
    """
    before, new = list(prompt), list[int]()
    for chosen in ids:
        new.append(chosen)
        text = continuation(tokenizer, before, new)
        if text and not text.endswith(UNREADABLE):
            yield text
            before, new = new, []
    if text := continuation(tokenizer, before, new):
        yield text


def continuation(tokenizer: Tokenizer, before: list[int], new: list[int]) -> str:
    """What some ids add to the text of those before them."""
    return tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]
