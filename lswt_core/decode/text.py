"""Generate token ids after a prompt, and stream them as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch

from lswt_core.decode.engine import InferenceEngine
from lswt_core.decode.sampling import DecodingMethod
from lswt_core.interfaces import Tokenizer

# decoded at the end of a text if some bytes of a character have yet to come
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def generate(
    engine: InferenceEngine,
    prompt: Sequence[int],
    method: DecodingMethod,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield up to ``max_new_tokens`` ids after a prompt of at least one id, until ``eos_id`` or
    ``should_stop()``.
    """
    ids = torch.tensor([prompt], device=engine.device)
    for chosen in islice(method(engine, ids), max_new_tokens):
        token = int(chosen)
        if token == eos_id or should_stop():
            return
        yield token


def generate_batch(
    engine: InferenceEngine,
    prompts: Sequence[Sequence[int]],
    method: DecodingMethod,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
) -> list[list[int]]:
    """Return up to ``max_new_tokens`` ids after each prompt, before its ``eos_id``. Prompts may
    differ in length: they are padded on the left.
    """
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    pad_lengths = torch.tensor(pads, device=engine.device) if any(pads) else None
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=engine.device)
    generated: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    for chosen in islice(method(engine, ids, pad_lengths), max_new_tokens):
        tokens = chosen.tolist()
        for row in list(unfinished):
            token = tokens[row]
            if token == eos_id:
                unfinished.discard(row)
            else:
                generated[row].append(token)
        if not unfinished:
            break
    return generated


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of ids that follow a prompt, in pieces of whole characters.

    New ids are decoded together with the ids of the piece before them: some tokenizers decode a
    token differently at the beginning of a text.
    """
    before, new = list(prompt), list[int]()
    for chosen in ids:
        new.append(chosen)
        text = decode_continuation(tokenizer, before, new)
        if text and not text.endswith(INCOMPLETE):
            yield text
            before, new = new, []
    text = decode_continuation(tokenizer, before, new)
    if text:
        yield text


def decode_continuation(tokenizer: Tokenizer, before: list[int], new: list[int]) -> str:
    """Return the text that ids add to that of the ids before them."""
    return tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]
