"""What a run finds in itself against its certificate: weights that changed before the first update,
a learning rate, updates or batches that are not those of its recipe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from lswt_core.ablation.certificate import Flaw
from lswt_core.ablation.runs.run_records import BATCHES, INITIAL_VALUES
from lswt_core.ablation.runs.store import write_json
from lswt_core.interfaces import Optimizer
from lswt_core.model.components import build_schedule
from lswt_core.model.parameters import parameters_with_owners
from lswt_core.model.train_module import TrainModule
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.metrics_log import read_metrics

FLAWS = "flaws.json"


def forget_flaws(directory: Path) -> None:
    """Remove the flaws of an earlier try."""
    directory.joinpath(FLAWS).unlink(missing_ok=True)


def add_flaws(directory: Path, flaws: Iterable[Flaw]) -> None:
    """Keep flaws in a run's directory, beside those that are there."""
    known = read_flaws(directory)
    kept = dict.fromkeys([*known, *flaws])
    if len(kept) > len(known):
        write_json(directory / FLAWS, [list(flaw) for flaw in kept])


def read_flaws(directory: Path) -> list[Flaw]:
    """Return the flaws in a run's directory."""
    path = directory / FLAWS
    if not path.is_file():
        return []
    return [Flaw(*flaw) for flaw in json.loads(path.read_text(encoding="utf-8"))]


def hash_parameters(loss: TrainModule) -> dict[str, dict[str, Any]]:
    """Return shape, components and a hash of the values of every parameter."""
    hashes = {}
    for name, owners, parameter in parameters_with_owners(loss):
        hashes[name] = hash_parameter(parameter, owners)
    return hashes


def hash_parameter(parameter: torch.Tensor, owners: Sequence[str]) -> dict[str, Any]:
    """Return a parameter's shape, the components that it lies in and a hash of its values."""
    flat = parameter.detach().cpu().contiguous().reshape(-1)  # bytes of a scalar need a dimension
    content = flat.view(torch.uint8).numpy().tobytes()
    return {
        "shape": str(list(parameter.shape)),
        "owners": list(owners),
        "sha256": sha256(content).hexdigest(),
    }


def check_start(directory: Path, loss: TrainModule) -> Iterator[Flaw]:
    """Compare the weights before the first update with the recorded initial values."""
    recorded = json.loads(directory.joinpath(INITIAL_VALUES).read_text(encoding="utf-8"))
    now = hash_parameters(loss)
    changed = [name for name in {**recorded, **now} if recorded.get(name) != now.get(name)]
    if changed:
        text = f"{len(changed)} parameters were changed between the start and the first update"
        yield Flaw("initialisation", f"{text}, the first is {changed[0]}")


def check_log(
    directory: Path, recipe: Recipe, registry: Registry, optimizer: Optimizer, batches: int
) -> list[Flaw]:
    """Compare what a finished run logged with its recipe: updates, tokens, the learning rate of
    each, and the number of recorded batches (``batches`` were used).
    """
    entries = [one for one in read_metrics(directory / "metrics.jsonl") if "lr" in one]
    train, flaws = recipe.train, []
    logged = [(one["step"], one["tokens"]) for one in entries]
    expected = [(step, step * train.tokens_per_step) for step in range(1, train.total_steps + 1)]
    if logged != expected:
        text = f"{len(logged):,} updates are logged, the recipe makes {len(expected):,}"
        flaws.append(Flaw("schedule", text))
    flaws += check_rates({one["step"]: one["lr"] for one in entries}, recipe, registry, optimizer)
    recorded = len(directory.joinpath(BATCHES).read_text(encoding="utf-8").splitlines())
    if recorded != batches:
        flaws.append(Flaw("data", f"{recorded:,} batches are recorded, {batches:,} were used"))
    return flaws


def check_rates(
    logged: dict[int, float], recipe: Recipe, registry: Registry, optimizer: Optimizer
) -> list[Flaw]:
    """Compare logged learning rates, by step, with the recipe's schedule, which is asked backwards:
    one that remembers what it was asked does not answer alike.
    """
    peak = recipe.one("optimizer").options.get("lr")
    if peak is None:
        return []
    schedule = build_schedule(recipe, registry)
    peak *= optimizer.param_groups[0].get("lr_factor", 1.0)
    for step in sorted(logged, reverse=True):
        expected = peak * schedule.factor(step)
        if not math.isclose(logged[step], expected, rel_tol=1e-9, abs_tol=1e-15):
            text = f"update {step:,} had learning rate {logged[step]:g}"
            return [Flaw("schedule", f"{text}, by the recipe it is {expected:g}")]
    return []
