"""One run of an ablation in a process of its own: ``python -m lswt_core.ablation.runs.worker RECIPE
DIRECTORY``. A run that fails or is killed takes no other run with it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from threading import Thread
from typing import Any

import torch

from lswt_core.ablation.runs.held_out import HeldOutResult, evaluate_run
from lswt_core.ablation.runs.imported_code import record_imports
from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.ablation.runs.recorded_session import RecordedSession
from lswt_core.ablation.runs.run_records import PEAK_MEMORY
from lswt_core.ablation.runs.run_warnings import read_warnings, recorded_warnings
from lswt_core.ablation.runs.self_check import read_flaws
from lswt_core.ablation.runs.store import (
    DIVERGED,
    OUTCOME,
    WORKER_LOCK,
    CacheKeys,
    write_json,
)
from lswt_core.ablation.runs.surroundings import Surroundings
from lswt_core.checkpoint import RunLock
from lswt_core.device import Precision, pick_device
from lswt_core.errors import CheckpointError, NumericsError, ResourceError, UsageError
from lswt_core.model.attention_choice import choose_backends
from lswt_core.model.code_fingerprint import describe_core
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.exit_status import run_guarded
from lswt_core.reporting.metrics_log import read_metrics

WARM_UP_STEPS = 3  # left out of the throughput: libraries are loaded, the KV cache is cold


def collect_outcome(
    directory: Path, recipe: Recipe, result: HeldOutResult | None, failure: str | None
) -> Outcome:
    """Return a run's outcome from its directory and its evaluation, if it got that far."""
    entries = read_metrics(directory / "metrics.jsonl")
    steps = [entry for entry in entries if entry.get("loss") is not None]
    evaluations = [entry for entry in entries if entry.get("eval/loss") is not None]
    per_step = recipe.train.tokens_per_step
    probes = dict(result.probes) if result else {}
    if result and steps:
        probes["mean_training_loss"] = fmean(entry["loss"] for entry in steps)
    if steps and steps[-1].get("optimizer/unclipped_share") is not None:
        probes["unclipped_share"] = steps[-1]["optimizer/unclipped_share"]
    speeds = [entry["tokens_per_second"] for entry in steps[WARM_UP_STEPS:] or steps]
    return Outcome(
        seed=recipe.train.seed,
        failure=failure,
        loss=result.loss if result else None,
        documents=result.documents if result else [],
        curve=[(entry["step"] * per_step, entry["loss"]) for entry in steps],
        evaluations=[(entry["step"] * per_step, entry["eval/loss"]) for entry in evaluations],
        positions=result.positions if result else [],
        probes=probes,
        tokens_per_second=median(speeds) if speeds else None,
        peak_bytes=read_peak_memory(directory),
        seconds=steps[-1]["seconds"] if steps else 0.0,
        **facts_of(result),
        flaws=[*read_flaws(directory), *(result.flaws if result else ())],
        warnings=read_warnings(directory),
    )


def facts_of(result: HeldOutResult | None) -> dict[str, Any]:
    """Return what an outcome says about the text of an evaluation, if there was one."""
    if result is None:
        return {}
    return {
        "unigram": list(result.unigram),
        "evaluated_bytes": result.n_bytes,
        "evaluated_text": result.text_hash,
        "text": result.text,
    }


def read_peak_memory(directory: Path) -> int | None:
    """Return the peak memory that a finished training recorded, in bytes."""
    path = directory / PEAK_MEMORY
    if not path.is_file():
        return None
    peak: int = json.loads(path.read_text(encoding="utf-8"))
    return peak


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error: the rest is advice for a run by itself."""
    return str(error).partition(". ")[0].partition("\n")[0]


def stop_with_parent(pipe: int) -> None:
    """Send SIGTERM to this process when its parent is gone, so that it saves and stops: then the
    other end of ``pipe`` closes.
    """

    def wait() -> None:
        with suppress(OSError):
            while os.read(pipe, 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=wait, name="lswt-parent", daemon=True).start()


def work(arguments: argparse.Namespace) -> int:
    """Make a run in its directory, which no other process may use meanwhile; return the exit code.
    Raises BusyError if one does.
    """
    if arguments.parent is not None:
        stop_with_parent(arguments.parent)
    if arguments.like is not None:
        require_like(*json.loads(arguments.like))
    registry = Registry(files=arguments.plugin)
    recipe = Recipe.load(arguments.recipe, registry=registry)
    if arguments.code is not None:
        require_same_code(recipe, registry, arguments.code)
    with RunLock(arguments.directory, WORKER_LOCK):
        arguments.directory.joinpath(OUTCOME).unlink(missing_ok=True)  # of an earlier try
        session = RecordedSession(arguments, recipe, registry, arguments.directory)
        with recorded_warnings(arguments.directory, session.console):
            return make_run(session)


def require_like(device: str, threads: int) -> None:
    """Raise UsageError unless this machine is like the one that planned the run, whose key says so:
    its device, and the number of threads.
    """
    here = Surroundings.here(pick_device(0), torch.get_num_threads())
    if (here.device, here.threads) != (device, threads):
        raise UsageError(
            f"this machine is {here.device} with {here.threads} threads, the study was started on"
            f" {device} with {threads}: numbers of the two do not compare\n"
            "  fix: let --launcher ask for machines like that one, and pass OMP_NUM_THREADS on"
        )


def require_same_code(recipe: Recipe, registry: Registry, code: str) -> None:
    """Raise CheckpointError if a run's code is not what it was when its study began: its key says
    that it was made with that.
    """
    device = pick_device(0)
    precision = Precision.choose(recipe.train.precision, device)
    backends = choose_backends(recipe, registry, device, precision.dtype).names
    if CacheKeys(registry, Surroundings("", 0)).code_of(recipe, backends) != code:
        raise CheckpointError(
            "the code of components, core or libraries has changed since the study began; the same"
            " command makes its runs with the new code"
        )


def make_run(session: RecordedSession) -> int:
    """Train, or continue, then evaluate and write the outcome; return the exit code."""
    directory, recipe = session.directory, session.recipe

    def write_outcome(result: HeldOutResult | None, failure: str | None) -> None:
        outcome = replace(
            collect_outcome(directory, recipe, result, failure),
            runs_at_once=session.arguments.runs_at_once,
            code=session.components,
            core=describe_core(),
        )
        record_imports(directory, recipe, session.registry)
        write_json(directory / OUTCOME, outcome.to_json())

    try:
        code = session.run()
    except NumericsError as error:
        write_outcome(None, f"{DIVERGED}: {first_sentence(error)}")
        raise
    except ResourceError as error:
        write_outcome(None, f"memory or disk: {first_sentence(error)}")
        raise
    if code:
        return code
    result = evaluate_run(directory, session.registry)
    if not math.isfinite(result.loss):
        write_outcome(None, f"{DIVERGED}: the held-out loss is {result.loss}")
        return NumericsError.exit_code
    write_outcome(result, None)
    return 0


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m lswt_core.ablation.runs.worker", description=__doc__
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--parent",
        type=int,
        metavar="FD",
        help="reading end of a pipe: save and stop when the other end closes",
    )
    parser.add_argument("--code", metavar="HASH", help="refuse to run with code of another hash")
    parser.add_argument(
        "--runs-at-once", type=int, metavar="N", help="record that N runs share the machine"
    )
    parser.add_argument(
        "--like", metavar="JSON", help="device and number of threads that this machine must have"
    )
    parser.add_argument("--plugin", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument(
        "--unchecked", action="store_true", help="record that plugins of others were not checked"
    )
    parser.set_defaults(
        overrides=[], out=None, resume=False, full=True, accept_changes=False, traceback=False
    )
    return run_guarded(work, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
