"""A tokenizer of the `tokenizers` library written as files that transformers' AutoTokenizer reads, in any version."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers.processors import TemplateProcessing

NO_LIMIT = 10**30  # what transformers itself writes for "texts may be of any length"


def save_fast(mapping: tokenizers.Tokenizer, begin: int, end: int, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Texts begin with ``begin``, as documents do in training; batches are padded on
    the left, with ``end``.
    """
    copy = tokenizers.Tokenizer.from_str(mapping.to_str())
    first, last = copy.id_to_token(begin), copy.id_to_token(end)
    copy.post_processor = TemplateProcessing(single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, begin)])
    copy.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": first,
        "eos_token": last,
        "pad_token": last,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": NO_LIMIT,
    }
    directory.joinpath("tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
