"""``python -m lswt_core export`` and ``import``: models to the HuggingFace ecosystem, and the
original authors' from it.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from lswt_core.cli.common import next_commands, plugin_argument, required_registry


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``export``."""
    parser.add_argument("run", type=Path, help="a run directory, e.g. runs/quickstart")
    parser.add_argument("out", type=Path, help="the new directory to write")
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload it to the HuggingFace Hub afterwards (key: HF_API_KEY)",
    )
    parser.add_argument("--private", action="store_true", help="make the pushed model private")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="with --push: say what would be uploaded, and upload nothing",
    )
    parser.add_argument(
        "--max-file-size",
        metavar="SIZE",
        type=file_size,
        default="5GB",
        help="of a file of weights; a larger model has several (default: 5GB)",
    )
    plugin_argument(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")


def file_size(text: str) -> str:
    """A size as the command line takes it: 500MB, 5GB."""
    if not re.fullmatch(r"[1-9][0-9]*[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 5GB")
    return text


def export(arguments: argparse.Namespace) -> int:
    """Write a run as a model that anybody can load, and push it if asked."""
    from lswt_core.hf.export import export_run  # slow to import
    from lswt_core.hf.push import list_files, push

    registry = required_registry(arguments)
    done = export_run(
        arguments.run,
        arguments.out,
        address=arguments.push,
        registry=registry,
        max_file_size=arguments.max_file_size,
    )
    for note in done.notes:
        print(f"note: {note}")
    print(f"exported to {done.directory}; read back, it gives the run's logits bit for bit")
    if arguments.push and arguments.dry_run:
        print(f"dry run: --push {arguments.push} would upload")
        print("\n".join(list_files(done.directory)))
    elif arguments.push:
        print(f"pushed to {push(done.directory, arguments.push, private=arguments.private)}")
    print(next_python(done.directory, arguments.plugin, needs_code=done.needs_code))
    return 0


def import_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``import``."""
    parser.add_argument(
        "source", help='a directory with "model_type": "lsw_transformer", or a name on the Hub'
    )
    parser.add_argument("out", type=Path, help="the new directory to write")
    parser.add_argument(
        "--memory-length",
        type=int,
        default=2048,
        help="how many tokens the model will remember (default: 2048)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="what weights are stored in",
    )
    parser.add_argument("--revision", default="", help="of a model on the Hub")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="of the Hub, or a directory: the tokenizer to put beside a model that has none",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")


def import_original(arguments: argparse.Namespace) -> int:
    """Turn a checkpoint of the original authors' code into our format."""
    from lswt_core.hf.import_original import import_checkpoint  # slow to import

    done = import_checkpoint(
        arguments.source,
        arguments.out,
        memory_length=arguments.memory_length,
        dtype=arguments.dtype,
        revision=arguments.revision,
        tokenizer=arguments.tokenizer,
    )
    print(f"imported to {done.directory}")
    print(next_python(done.directory))
    return 0


def next_python(directory: Path, plugins: Sequence[Path] = (), *, needs_code: bool = False) -> str:
    """How a model in transformers' format is used: a command, and lines of Python. The components
    of single-file plugins are in the model's own code alone (``needs_code``).
    """
    words = [str(directory), *(word for file in plugins for word in ("--plugin", str(file)))]
    imports = [] if needs_code else ["import lswt_core.hf"]
    trust = ", trust_remote_code=True" if needs_code else ""
    python = [
        *imports,
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({str(directory)!r}{trust})",
    ]
    command = next_commands(f'lswt_core generate {shlex.join(words)} --prompt "..."')
    return "\n".join([command, "or, in Python:", *(f"  {line}" for line in python)])
