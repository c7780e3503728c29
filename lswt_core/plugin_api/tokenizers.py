"""For tokenizers of the `tokenizers` library: save files that transformers reads, split long
texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tokenizers
from tokenizers.processors import TemplateProcessing

# of a chunk; encoding takes about a hundred bytes of memory per character
CHUNK_CHARACTERS = 1 << 14
# before a word and its one space, or after a line break
SPLIT_POINT = re.compile(r"(?<=\S)(?=\s\S)|(?<=\S\n)(?=\S)")
CHECKED_CHARACTERS = 512  # on either side of a split point, to verify it
MAX_TRIES = 16  # split points that fail verification before the rest is left whole
NO_LIMIT = 10**30  # what transformers writes where there is no maximum length


def save_fast_tokenizer(
    mapping: tokenizers.Tokenizer, begin: int, end: int, directory: Path
) -> None:
    """Write tokenizer.json and tokenizer_config.json, which any version of transformers'
    AutoTokenizer reads. Texts begin with the BOS id ``begin``, as documents do in training;
    batches are padded on the left with the EOS id ``end``.
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
        # special tokens in a text are encoded as plain characters, as in training
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": NO_LIMIT,
    }
    directory.joinpath("tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


def split_long_text(mapping: tokenizers.Tokenizer, text: str) -> Iterator[str]:
    """Split a text into chunks of about CHUNK_CHARACTERS whose ids, concatenated, are the ids of
    the whole. A text without spaces is not split, nor any text if the tokenizer's pre-tokenisation
    depends on more than a word.
    """
    begin = 0
    if pretokenizes_locally(mapping):
        while len(text) - begin > 2 * CHUNK_CHARACTERS:
            end = find_split(mapping, text, begin + CHUNK_CHARACTERS)
            if end is None:
                break
            yield text[begin:end]
            begin = end
    yield text[begin:]


def pretokenizes_locally(mapping: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer splits a text into words before anything else: no normalisation, no
    added tokens that span a space.
    """
    tokens = mapping.get_added_tokens_decoder().values()  # these are matched before words
    return (
        mapping.normalizer is None
        and mapping.pre_tokenizer is not None
        and not any(spans_spaces(token) for token in tokens)
    )


def spans_spaces(token: tokenizers.AddedToken) -> bool:
    """Whether an added token strips spaces around it, or contains a word and a space."""
    has_word = bool(token.content.strip())
    has_space = token.content.split() != [token.content]
    return token.lstrip or token.rstrip or (has_word and has_space)


def find_split(mapping: tokenizers.Tokenizer, text: str, begin: int) -> int | None:
    """The first position from ``begin`` on where the surrounding text is pre-tokenised as its two
    halves are; None if the next MAX_TRIES candidates are not.
    """

    def words(part: str) -> list[str]:
        return [word for word, _ in mapping.pre_tokenizer.pre_tokenize_str(part)]

    for candidate in islice(SPLIT_POINT.finditer(text, begin), MAX_TRIES):
        end = candidate.end()
        before = text[max(0, end - CHECKED_CHARACTERS) : end]
        after = text[end : end + CHECKED_CHARACTERS]
        if words(before) + words(after) == words(before + after):
            return end
    return None
