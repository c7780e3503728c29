"""``python -m lswt_core generate RUN_OR_MODEL --prompt TEXT``: let a trained model write. Imports
torch only when it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lswt_core.cli.common import plugin_argument, required_registry
from lswt_core.errors import UsageError
from lswt_core.train.signals import StopRequest

if TYPE_CHECKING:
    from lswt_core.interfaces import Tokenizer

# of the decoding methods; which has which, they know themselves
OPTIONS = ("temperature", "top_p", "top_k", "alpha", "seed")


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="RUN_OR_MODEL",
        help="a run directory, e.g. runs/quickstart, or an exported or imported model's",
    )
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="what to go on with, as it stands; - reads it from standard input",
    )
    parser.add_argument(
        "--decode",
        default="sample",
        metavar="METHOD",
        help="sample, greedy or contrastive (default: sample)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=200,
        metavar="N",
        help="write at most so many tokens (default: 200)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sample: flattens the distribution; 0 is greedy (default: 0.8)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample: from the likeliest tokens of this probability (default: 0.95)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="sample: from so many tokens (default: all); contrastive: of so many (4)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="contrastive: how much likeness to the text costs, 0 to 1 (default: 0.6)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="sample: another seed, another text (default: 0)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end instead of text as it is written",
    )
    plugin_argument(parser)


def generate(arguments: argparse.Namespace) -> int:
    """Print what the model writes after the prompt."""
    if arguments.tokens < 1:
        raise UsageError(f"tokens = {arguments.tokens}: must be at least 1")
    prompt = arguments.prompt if arguments.prompt != "-" else read_standard_input()
    from lswt_core import decode
    from lswt_core.cli.load_model import load_model

    given = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    method = decode.build_method(arguments.decode, given)
    model = load_model(arguments.model, required_registry(arguments))
    start = [model.tokenizer.bos_id, *encoded(prompt, model.tokenizer)]
    reader = decode.InferenceEngine(model.decoder, model.precision, model.seq_len)
    # polled between tokens: an exception out of a signal could be lost in a callback of torch's
    stop = StopRequest()
    with stop.listening():
        ids = decode.generate(
            reader,
            start,
            method,
            max_new_tokens=arguments.tokens,
            eos_id=model.tokenizer.eos_id,
            should_stop=stop,
        )
        if not arguments.json:
            show(decode.stream_text(model.tokenizer, start, ids))
        found = list(ids)
    if stop():
        raise KeyboardInterrupt
    if not arguments.json:
        return 0
    text = "".join(decode.stream_text(model.tokenizer, start, found))
    used = {"decode": arguments.decode} | {
        name: getattr(method, name) for name in decode.option_names(type(method))
    }
    print(
        json.dumps(
            {"prompt": prompt, "text": text, "ids": found, "ended": len(found) < arguments.tokens}
            | used
        )
    )
    return 0


def read_standard_input() -> str:
    """All of it, as it is: a newline at its end belongs to the prompt."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt on standard input is not UTF-8: {error}") from error


def encoded(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of the prompt."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8
        raise UsageError(f"the prompt is not UTF-8: {error}") from error
    return tokenizer.encode([prompt])[0]


def show(pieces: Iterator[str]) -> None:
    """Print text as it comes, and end its last line however it ends."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        raise
    print(flush=True)
