"""Checks of other people's components before something is trained with them: the quick ones, once
for each content of their code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from lswt_core.conformance.check import RULES, Check, checks_of
from lswt_core.conformance.subject import Subject
from lswt_core.data import cache_directory
from lswt_core.errors import PluginError
from lswt_core.model.code_fingerprint import fingerprint_component, fingerprint_core
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.recipe import Chosen
from lswt_core.registry import Registry

# Checks that ``plugins check`` alone makes. They are about words; or take seconds; or start
# processes, read the run's own text or write where a tracker writes; or depend on a recipe's rates
# or matter to some parametrisations and optimizers only.
LEFT_OUT = frozenset(
    {
        "documentation",
        "citation",
        "bfloat16",
        "carry gradients",
        "compile",
        "coordinate check",
        "descent",
        "gradcheck",
        "huggingface",
        "long sequences",
        "long texts",
        "low precision",
        "matrix parameters",
        "state dict",
        "fingerprint",
        "import effects",
        "metrics",
        "order",
        "repeatable",
        "sharding",
        "states",
    }
)


def check_components(
    components: Iterable[Chosen], registry: Registry, say: Callable[[str], None]
) -> None:
    """Check components with the options that a recipe gives them; those that passed before, with
    the same code, are not checked again. Raises PluginError if one fails.
    """
    for chosen in components:
        passed = cache_directory() / "checked" / f"{content_key(chosen, registry)}.json"
        if passed.is_file():
            continue
        start = perf_counter()
        with torch.random.fork_rng(devices=[]):
            results = run_checks(chosen, registry)
        require_passed(chosen, results)
        outcomes = {check.rule.name: check.result().outcome for check in results}
        remember(passed, {"component": label(chosen), "checks": outcomes})
        count = sum(outcome == "ok" for outcome in outcomes.values())
        seconds = perf_counter() - start
        say(f"checked {label(chosen)}: it passes {count} quick checks ({seconds:.1f} s, once)")


def run_checks(chosen: Chosen, registry: Registry) -> list[Check]:
    """The quick checks of a component, each with its result."""
    absent = (None, False)
    options = {
        name: value
        for name, value in chosen.plain_options().items()
        if not (name in chosen.offer.inner and value in absent)
    }
    subject = Subject(chosen.offer, registry.load(chosen.offer), registry, options)
    checks = [check for check in checks_of(subject) if check.rule.name not in LEFT_OUT]
    for check in checks:
        check.result()
    return checks


def require_passed(chosen: Chosen, checks: Iterable[Check]) -> None:
    """Raise PluginError if a check failed, with all that failed."""
    failed = [check.report() for check in checks if check.result().outcome == "FAILED"]
    if not failed:
        return
    offer = chosen.offer
    target = offer.source if offer.distribution == "file" else offer.distribution
    raise PluginError(
        f"[{chosen.table}] {label(chosen)} does not do what its interface promises; nothing was"
        " trained\n"
        + "\n".join(failed)
        + f"\n  all checks: python -m lswt_core plugins check {target}"
        "\n  to train with it all the same: --unchecked"
    )


def label(chosen: Chosen) -> str:
    """A component with its distribution, for people."""
    offer = chosen.offer
    return f"{offer.kind}/{offer.name} of {offer.distribution} {offer.version}"


def content_key(chosen: Chosen, registry: Registry) -> str:
    """A hash of all that the outcome depends on: the code of the component, of those inside of it
    and of the core, the options, and which checks there are.
    """
    code = [fingerprint_component(one.offer, registry).sha256 for one in chosen.with_inner()]
    names = sorted({rule.name for rule in RULES} - LEFT_OUT)
    parts: list[Any] = [chosen.kind, chosen.name, chosen.plain_options(), code]
    parts += [fingerprint_core(), torch.__version__, names]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def remember(path: Path, record: dict[str, Any]) -> None:
    """Write down that a component passed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
