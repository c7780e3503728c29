"""``python -m lswt_core generate RUN_OR_MODEL --prompt TEXT``: print the prompt and, as it is
generated, a trained model's continuation. Imports torch only when it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lswt_core.cli.common import plugin_argument, required_registry
from lswt_core.errors import UsageError
from lswt_core.train.signals import StopRequest

if TYPE_CHECKING:
    from lswt_core.decode import DecodingMethod
    from lswt_core.interfaces import Tokenizer

# options of the decoding methods, which check whether they take them
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
        help="the text to continue, verbatim; - reads it from standard input",
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
        help="generate at most N tokens (default: 200)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sample: temperature of the softmax; 0 is greedy (default: 0.8)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample: nucleus of this probability mass (default: 0.95)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="sample: among the k most likely tokens (default: all); contrastive: candidates (4)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="contrastive: weight of the degeneration penalty, 0 to 1 (default: 0.6)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="sample: random seed (default: 0)")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print prompt and continuation as one JSON object at the end, not as they are written",
    )
    plugin_argument(parser)


def generate(arguments: argparse.Namespace) -> int:
    """Print the prompt and its continuation as text, or both as one JSON object."""
    if arguments.tokens < 1:
        raise UsageError(f"tokens = {arguments.tokens}: must be at least 1")
    prompt = read_standard_input() if arguments.prompt == "-" else arguments.prompt
    from lswt_core import decode
    from lswt_core.cli.load_model import load_model
    from lswt_core.device import configure_process

    method = chosen_method(arguments)
    configure_process()
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
            show(prompt, decode.stream_text(model.tokenizer, start, ids))
        new_ids = list(ids)
    if stop():
        raise KeyboardInterrupt
    if arguments.json:
        text = "".join(decode.stream_text(model.tokenizer, start, new_ids))
        result = {"prompt": prompt, "text": text, "ids": new_ids, "decode": arguments.decode}
        result["ended"] = len(new_ids) < arguments.tokens
        print(json.dumps(result | options_of(method)))
    return 0


def chosen_method(arguments: argparse.Namespace) -> DecodingMethod:
    """The decoding method of the command line. Raises UsageError for options it does not take."""
    from lswt_core.decode import build_method

    given = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    return build_method(arguments.decode, given)


def options_of(method: DecodingMethod) -> dict[str, Any]:
    """A decoding method's options as plain data."""
    from lswt_core.decode import option_names

    return {name: getattr(method, name) for name in option_names(type(method))}


def read_standard_input() -> str:
    """Standard input, verbatim: a newline at its end belongs to the prompt."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt on standard input is not UTF-8: {error}") from error


def encoded(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """Tokenize the prompt. Raises UsageError if it is not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8
        raise UsageError(f"the prompt is not UTF-8: {error}") from error
    return tokenizer.encode([prompt])[0]


def show(prompt: str, pieces: Iterator[str]) -> None:
    """Print a prompt and what follows it as it is generated; end the last line in any case."""
    print(prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        raise
    print(flush=True)
