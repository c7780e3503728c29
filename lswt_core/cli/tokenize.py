"""``python -m lswt_core tokenize RECIPE --out DIR``: tokenise a recipe's text once, for runs on any
number of machines.
"""

from __future__ import annotations

import argparse
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lswt_core.cli.common import next_commands, recipe_arguments, report_source, required_registry
from lswt_core.errors import Preempted, UsageError
from lswt_core.plugin_api.atomic_write import make_output_directory
from lswt_core.recipe import OVERLAYS, Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.reporting.units import format_bytes, format_duration

if TYPE_CHECKING:
    from lswt_core.data.make_directory import Outcome
    from lswt_core.data.token_parts import Advance, Share

INTERVAL = 10.0  # seconds between two lines of progress where there is no terminal


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    recipe_arguments(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="directory of the token files"
    )
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="tokenise every N-th file from file I on, beside N - 1 other processes or machines",
    )
    parser.add_argument("--overlay", choices=OVERLAYS, help="apply this overlay of the recipe")


def tokenize(arguments: argparse.Namespace) -> int:
    """Write the token files that are missing."""
    share = parse_part(arguments.part)
    registry = required_registry(arguments)
    recipe = Recipe.load(
        arguments.recipe, arguments.overrides, overlay=arguments.overlay, registry=registry
    )
    report_source(recipe, arguments.recipe)
    make_output_directory(arguments.out, "--out")
    progress = Progress(share)
    try:
        outcome = write_share(recipe, registry, arguments.out, share, progress)
    finally:
        progress.close()
    conclude(arguments, share, outcome, progress)
    return 0


def write_share(
    recipe: Recipe, registry: Registry, directory: Path, share: Share, progress: Progress
) -> Outcome:
    """Write the missing files of a share. Raises Preempted when a stop is requested, and BusyError
    if another process has the share.
    """
    from lswt_core.checkpoint import RunLock
    from lswt_core.data.make_directory import tokenise_text, working_directory
    from lswt_core.train.signals import StopRequest

    stop, report = StopRequest(), (progress.say, progress.report)
    try:
        with stop.listening(), stop.at_once(), RunLock(working_directory(directory, share)):
            return tokenise_text(recipe, registry, directory, share, *report)
    except Preempted:
        raise Preempted(
            f"stopped: {directory} keeps every complete file; the same command resumes"
        ) from None


def parse_part(given: str) -> Share:
    """The share that --part names. Raises UsageError."""
    from lswt_core.data.token_parts import Share

    found = re.fullmatch(r"([0-9]+)/([0-9]+)", given)
    share = Share(*map(int, found.groups())) if found else Share(0, 0)
    if not 1 <= share.number <= share.of:
        raise UsageError(
            f"--part {given}: give the number of this part and how many there are, 1/N to N/N,"
            " e.g. --part 1/4"
        )
    return share


def conclude(
    arguments: argparse.Namespace, share: Share, outcome: Outcome, progress: Progress
) -> None:
    """Print what the directory holds, and what is next."""
    progress.say(f"{arguments.out}: {outcome.tokens:,} tokens in {outcome.files} files")
    if outcome.missing:
        progress.say(
            f"part {share.name} is done; {len(outcome.missing)} files of other parts are missing"
            f" ({outcome.missing[0]} first): the part that ends last writes the index. Parts on"
            " other file systems: copy their files here, and run one part's command again"
        )
        return
    words = [str(arguments.recipe), *arguments.overrides, f"data.token_directory={arguments.out}"]
    words += [word for file in arguments.plugin for word in ("--plugin", str(file))]
    print(next_commands(f"lswt_core.run {shlex.join(words)}"))


class Progress:
    """Prints how far a share is, how fast it goes, and the time that is left: on a terminal in one
    line that changes.
    """

    def __init__(self, share: Share) -> None:
        self.share, self.console = share, Console()
        self.bar = tqdm(bar_format="{desc}", leave=False) if self.console.live else None
        self.split, self.began, self.printed = "", 0.0, -INTERVAL

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.say(text)

    def report(self, advance: Advance) -> None:
        """Show progress."""
        now = time.monotonic()
        if advance.split != self.split:
            self.split, self.began = advance.split, now
        text = self.describe(advance, now - self.began)
        if self.bar is not None:
            self.bar.set_description_str(text)
        elif now - self.printed >= INTERVAL:
            self.printed = now
            self.say(text)

    def describe(self, advance: Advance, seconds: float) -> str:
        """The progress as text."""
        if not advance.documents:
            return f"{advance.split}: reading the text up to the first file to write"
        rate = advance.n_bytes / max(seconds, 1e-9)
        text = (
            f"{advance.split}: {advance.documents:,} documents, {format_bytes(advance.n_bytes)}"
            f" tokenised, {format_bytes(rate)}/s"
        )
        if advance.total is None or not rate:  # documents without text
            return text
        left = max(0, advance.total - advance.passed) / self.share.of
        of = f"{100 * min(1.0, advance.passed / max(1, advance.total)):.0f} % of the text"
        return f"{text}, at {of}, {format_duration(left / rate)} left"

    def close(self) -> None:
        """Remove the changing line."""
        if self.bar is not None:
            self.bar.close()
