"""Tasks of the lm-evaluation-harness (Gao et al. 2024, doi 10.5281/zenodo.12608602)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lswt_core.device import pick_device
from lswt_core.errors import PluginError, UsageError

METRIC_SUFFIX = ",none"  # of a metric's name: no filter of the model's answers
ERROR_SUFFIX = "_stderr"


class Tasks(NamedTuple):
    """What is asked of the harness."""

    names: Sequence[str]
    folder: Path | None = None  # with task files of one's own
    limit: int | None = None  # documents of every task; None: all


def require_harness() -> None:
    """Raise PluginError if the lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise PluginError(
            "--task needs the lm-evaluation-harness\n  fix: pip install 'lswt-core[eval]'"
        )


def require_tasks(tasks: Tasks) -> Any:
    """Return the harness's manager of tasks. Raises PluginError without the harness, and UsageError
    for tasks that it does not have.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))
    unknown = [name for name in tasks.names if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(
            f"--task {', '.join(unknown)}: the harness has no such task\n  fix: lm_eval ls tasks"
            " lists its tasks; --task-dir DIR adds those of a directory"
        )
    return manager


def run_tasks(directory: Path, tasks: Tasks) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return {task: {metric: {"value", "error"}}} of a model in the HuggingFace format; the error
    is the standard error over documents, None if the harness has none. Raises PluginError without
    the harness, and UsageError for tasks that it does not have.
    """
    manager = require_tasks(tasks)
    from lm_eval import simple_evaluate

    arguments = {"pretrained": str(directory), "trust_remote_code": True, "add_bos_token": False}
    measured = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=list(tasks.names),
        task_manager=manager,
        device=str(pick_device(0)),
        limit=tasks.limit,
        log_samples=False,
        bootstrap_iters=0,
    )
    return {name: read_metrics(one) for name, one in measured["results"].items()}


def read_metrics(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the numbers of a task, by metric."""
    metrics: dict[str, dict[str, float | None]] = {}
    for key, value in result.items():
        name = key.removesuffix(METRIC_SUFFIX)
        if not isinstance(value, int | float) or "," in name or name.endswith(ERROR_SUFFIX):
            continue
        if key == name:  # "sample_len" and the like are no metrics
            continue
        error = result.get(f"{name}{ERROR_SUFFIX}{METRIC_SUFFIX}")
        metrics[name] = {
            "value": float(value),
            "error": error if isinstance(error, float) else None,
        }
    return metrics
