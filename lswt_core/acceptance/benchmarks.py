"""Benchmarks as items: the command ``bench`` in a process of its own, and what is kept of its
results. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lswt_core.acceptance.item import require

ERROR = re.compile(r"error: |[\w.]*(Error|Exception)\b")
TRACEBACK_ABOVE = "the traceback above"  # a message that says no more than that there is one
RATES = ("training", "evaluation", "decoding")
COSTS = (
    "step_peak_bytes",
    "syncs_per_step",
    "first_step_seconds",
    "compiled_graphs",
    "graph_breaks",
    "recompiled_later",
    "loss",
)


def run_benchmark(words: Sequence[str], aim: float | None = None) -> dict[str, Any]:
    """``python -m lswt_core bench WORDS``. Returns "ratio", the training time of the last contender
    relative to that of its baseline, with "aim"; of every contender its rates and costs, of the
    recipe the share of the device's rate (MFU). Raises Unmet if it ends otherwise than well, or
    with a graph break of the recipe or a loss that is not finite.
    """
    command = [sys.executable, "-m", "lswt_core", "bench", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    require(done.returncode == 0, f"exit code {done.returncode}: {last_error(done.stderr)}")
    report = json.loads(done.stdout)
    contenders = {name: brief(row) for name, row in report["contenders"].items()}
    recipe = contenders[report["recipe"]]
    require(recipe["graph_breaks"] == 0, f"{recipe['graph_breaks']} graph breaks")
    for name, row in contenders.items():
        require(math.isfinite(row["loss"]), f"the loss of {name} is not finite")
    compared = [row["times_as_long"] for row in contenders.values() if row["times_as_long"]]
    return {
        "ratio": compared[-1] if compared else None,
        "aim": aim,
        "utilisation": report["utilisation"],
        "data_sheet": report["data_sheet"],
        "contenders": contenders,
        "breakdown": report["breakdown"],
        "work": report["work"],
        "machine": report["machine"],
    }


def brief(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rates in tokens per second, and costs, of a contender."""
    training = row["training"]["times_as_long"]
    rates = {kind: row[kind] and row[kind]["tokens_per_second"] for kind in RATES}
    costs = {name: row[name] for name in COSTS}
    return {"times_as_long": training and training["median"], "spread": training, **rates, **costs}


def last_error(text: str) -> str:
    """The last line of standard error that says what went wrong: a message, or the exception of a
    traceback.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line) and not line.endswith(TRACEBACK_ABOVE)]
    return (errors or lines or ["nothing on standard error"])[-1]
