"""What plugins ask of a tokenizer of the `tokenizers` library: files that transformers reads, and
long texts in pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers.processors import TemplateProcessing

# characters: a call takes many, and a tokenizer a hundred bytes of memory for each of them
PIECE = 1 << 14
# before a word and its one space, or after the end of a line
SEAM = re.compile(r"(?<=\S)(?=\s\S)|(?<=\S\n)(?=\S)")
CONTEXT = 512  # characters on either side of a seam by which this is checked
TRIES = 16  # seams that do not hold before a text is left whole
NO_LIMIT = 10**30  # what transformers itself writes for "texts may be of any length"


def save_fast(mapping: tokenizers.Tokenizer, begin: int, end: int, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer reads in
    any version. Texts begin with ``begin``, as documents do in training; batches are padded on the
    left, with ``end``.
    """
    copy = tokenizers.Tokenizer.from_str(mapping.to_str())
    first, last = copy.id_to_token(begin), copy.id_to_token(end)
    copy.post_processor = TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, begin)]
    )
    copy.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": first,
        "eos_token": last,
        "pad_token": last,
        "padding_side": "left",
        # where a text spells one, it is plain characters, as in training
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": NO_LIMIT,
    }
    directory.joinpath("tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


def split_long_text(mapping: tokenizers.Tokenizer, text: str) -> Iterator[str]:
    """A text in pieces of about PIECE characters whose ids, one after the other, are the ids of the
    whole. What has no seam is whole: a text without spaces, or any text where what the tokenizer
    does to it before it merges depends on more than a word.
    """
    begin = 0
    if len(text) > 2 * PIECE and local(mapping):
        while len(text) - begin > 2 * PIECE and (seam := next_seam(mapping, text, begin + PIECE)):
            yield text[begin:seam]
            begin = seam
    yield text[begin:]


def local(mapping: tokenizers.Tokenizer) -> bool:
    """Whether nothing is done to a text before it is split into words: no normalisation, no tokens
    that reach over a space.
    """
    tokens = mapping.get_added_tokens_decoder().values()  # looked for before a text is split
    return (
        mapping.normalizer is None
        and mapping.pre_tokenizer is not None
        and not any(reaches_over(token) for token in tokens)
    )


def reaches_over(token: tokenizers.AddedToken) -> bool:
    """Whether a token takes spaces around it, or stands for a word and a space."""
    return (
        token.lstrip
        or token.rstrip
        or (bool(token.content.strip()) and token.content.split() != [token.content])
    )


def next_seam(mapping: tokenizers.Tokenizer, text: str, begin: int) -> int | None:
    """The first place from ``begin`` on at which the text around it is split as its two halves are;
    None if there is none near.
    """

    def split(part: str) -> list[str]:
        return [word for word, _ in mapping.pre_tokenizer.pre_tokenize_str(part)]

    for _, found in zip(range(TRIES), SEAM.finditer(text, begin), strict=False):
        before, after = (
            text[max(0, found.end() - CONTEXT) : found.end()],
            text[found.end() : found.end() + CONTEXT],
        )
        if split(before) + split(after) == split(before + after):
            return found.end()
    return None
