"""``python -m lswt_core evaluate RUN_OR_MODEL``: is the memory used, how far does it reach, and
what is it worth?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lswt_core.cli.common import plugin_argument, required_registry
from lswt_core.errors import UsageError

if TYPE_CHECKING:
    from lswt_core.decode.load_run import LoadedModel
    from lswt_core.evaluation.texts import Limits, Text

TOKENS = 32_768  # of every text


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="RUN_OR_MODEL",
        help="a run directory, e.g. runs/quickstart, or an exported or imported model's",
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help=(
            "a file of plain text, or a directory of such, each file one document; several are"
            " evaluated one after the other (default: the run's held-out text)"
        ),
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME",
        help="a task of the lm-evaluation-harness, e.g. lambada_openai; a run is exported for it",
    )
    parser.add_argument(
        "--task-dir", type=Path, metavar="DIR", help="where task files of your own are"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="documents of every task (default: all)"
    )
    parser.add_argument(
        "--memory",
        metavar="0,32,64",
        help="memory lengths in tokens (default: up to twice the model's)",
    )
    parser.add_argument(
        "--context",
        metavar="16,32,48",
        help=(
            "contexts of cold restarts in tokens (default: up to four segments, or to one and twice"
            " the longest memory)"
        ),
    )
    parser.add_argument(
        "--among",
        action="append",
        default=[],
        type=Path,
        metavar="RUN_OR_MODEL",
        help=(
            "another model with the same tokenizer: the effective context (RECL) is then measured"
            " in the group of all"
        ),
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help=(
            "tokens of a segment, for losses, memory, key tokens, quantised caches, registers and"
            " dependence on segments (default: as the model was trained, as for all other"
            " measures)"
        ),
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=TOKENS,
        metavar="N",
        help=(
            "tokens to read of every text: the first 16 segments of documents until there are as"
            f" many, more of each where documents are few (default: {TOKENS:,})"
        ),
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where evaluation.json, .md, .html and .png go"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    plugin_argument(parser)


def evaluate(arguments: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    memory, contexts = (read_lengths(arguments, name) for name in ("memory", "context"))
    require_positive(arguments)
    from lswt_core.device import configure_process
    from lswt_core.evaluation.harness import Tasks, require_tasks, run_tasks
    from lswt_core.evaluation.measure import Asked, evaluate_text
    from lswt_core.evaluation.report import render_text, write_report
    from lswt_core.plugin_api.atomic_write import make_output_directory

    configure_process()
    tasks = Tasks(arguments.task, arguments.task_dir, arguments.limit)
    if arguments.task:
        require_tasks(tasks)
    if arguments.out is not None:
        make_output_directory(arguments.out, "--out")
    model, texts = read_inputs(arguments)
    seq_len = arguments.seq_len or model.seq_len
    asked = Asked(seq_len, memory, contexts, load_others(arguments, model))
    report = {
        "model": str(arguments.model),
        "precision": str(model.precision.dtype).removeprefix("torch."),
        "trained_seq_len": model.seq_len,
        "seq_len": seq_len,
        "texts": {text.name: evaluate_text(model, text, asked) for text in texts},
        "tasks": {},
    }
    if arguments.task:
        with as_exported(arguments) as directory:
            report["tasks"] = run_tasks(directory, tasks)
    if arguments.out is not None:
        write_report(report, arguments.out)
    print(json.dumps(report, indent=1) if arguments.json else render_text(report))
    return 0


@contextmanager
def as_exported(arguments: argparse.Namespace) -> Iterator[Path]:
    """The model's directory in the HuggingFace format; a run is exported to one that is gone
    afterwards.
    """
    from lswt_core.decode.load_run import is_run_directory
    from lswt_core.hf.export import export_run

    if not is_run_directory(arguments.model):
        yield arguments.model
        return
    with TemporaryDirectory(prefix="lswt-") as place:
        out, registry = Path(place) / "model", required_registry(arguments)
        yield export_run(arguments.model, out, registry=registry).directory


def read_lengths(arguments: argparse.Namespace, name: str) -> list[int] | None:
    """The lengths of an option in increasing order; None if it was not given. Raises UsageError."""
    given = getattr(arguments, name)
    if given is None:
        return None
    try:
        lengths = sorted({int(word) for word in given.split(",")})
    except ValueError as error:
        raise UsageError(f"--{name} {given}: write whole numbers, e.g. 16,32,64") from error
    if lengths[0] < (0 if name == "memory" else 1):
        raise UsageError(f"--{name} {given}: lengths are numbers of tokens, not negative")
    return lengths


def longest_asked(arguments: argparse.Namespace) -> int:
    """The longest memory or context that was asked for; 0 for none. Raises UsageError."""
    given = [read_lengths(arguments, name) for name in ("memory", "context")]
    return max((lengths[-1] for lengths in given if lengths), default=0)


def require_positive(arguments: argparse.Namespace) -> None:
    """Raise UsageError if a number of tokens is not positive."""
    for name in ("seq_len", "tokens", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def read_inputs(arguments: argparse.Namespace) -> tuple[LoadedModel, list[Text]]:
    """The model, and the texts that were named, or the run's held-out text. Raises UsageError if a
    model that was not trained here is to be evaluated on no text.
    """
    from lswt_core.cli.load_model import load_model
    from lswt_core.decode.load_run import is_run_directory, load_run
    from lswt_core.evaluation.texts import held_out_text, limits_for

    registry, reach = required_registry(arguments), longest_asked(arguments)

    def limits(model: LoadedModel) -> Limits:
        """The part of a text that is read."""
        return limits_for(arguments.tokens, arguments.seq_len or model.seq_len, reach)

    if arguments.text:
        model = load_model(arguments.model, registry)
        return model, named_texts(arguments.text, model, limits(model))
    if is_run_directory(arguments.model):
        run = load_run(arguments.model, registry)
        return run.model, [held_out_text(run, registry, limits(run.model))]
    load_model(arguments.model, registry)  # says what is wrong with the directory
    raise UsageError(f"{arguments.model} has no held-out text of its own\n  fix: --text FILE")


def load_others(arguments: argparse.Namespace, model: LoadedModel) -> dict[str, LoadedModel]:
    """The models of ``--among`` by path. Raises UsageError if one has another tokenizer."""
    from lswt_core.cli.load_model import load_model

    others = {str(path): load_model(path, required_registry(arguments)) for path in arguments.among}
    for path, other in others.items():
        if other.tokenizer.fingerprint() != model.tokenizer.fingerprint():
            raise UsageError(
                f"--among {path}: its tokenizer is not {arguments.model}'s, so that losses of the"
                " same tokens cannot be compared\n  fix: name models with the same tokenizer"
            )
    return others


def named_texts(named: Sequence[str], model: LoadedModel, limits: Limits) -> list[Text]:
    """The texts of the command line; raises UsageError if one is missing or two share a name."""
    from lswt_core.evaluation.texts import text_of_files

    texts = []
    for given in named:
        name, separator, path = given.partition("=")
        if not separator or Path(given).exists():
            name = path = given
        if not name or not path:
            raise UsageError(
                f"--text {given}: a name or a path is missing\n  fix: --text NAME=PATH"
            )
        if not Path(path).exists():
            raise UsageError(f"--text {given}: there is no {path} (looked from {Path.cwd()})")
        texts.append(text_of_files(name, Path(path), model.tokenizer, limits))
    if len({text.name for text in texts}) < len(texts):
        raise UsageError("--text: two texts have the same name\n  fix: name them: --text NAME=PATH")
    return texts
