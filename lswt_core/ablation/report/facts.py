"""The facts that make every number of a report traceable: its runs in the store, the text that was
evaluated, the code of the components, and what no certificate shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lswt_core.ablation.runs.outcome import ArmResult, Outcome

# What neither recipes nor the probes of a trained model show.
LIMITS = (
    "A component may do more than its kind says: a feed-forward layer with a norm inside, say, is"
    " one swap.",
    "What an optimizer does within a step, and what a component keeps beside its parameters, is not"
    " compared.",
    "A model is probed as it is evaluated; what it does in training alone is not.",
)


def list_runs(arm: ArmResult, outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Return where the runs of an arm are kept, and what they say about themselves.

    "seed", "key" (of the store), "directory", "text" (fingerprint of the data source),
    "evaluated_text" (hash of the evaluated tokens), "runs_at_once" and "warnings".
    """
    runs = []
    for outcome in outcomes:
        key, directory = arm.stored.get(outcome.seed, ("", ""))
        runs.append(
            {
                "seed": outcome.seed,
                "key": key,
                "directory": directory,
                "text": outcome.text,
                "evaluated_text": outcome.evaluated_text,
                "runs_at_once": outcome.runs_at_once,
                "warnings": outcome.warnings,
            }
        )
    return runs


def describe_loss(
    loss: float | None, evaluated: Mapping[str, Any], ask: Callable[..., Any]
) -> dict[str, Any]:
    """Return a loss in nats per token as "perplexity" and "bits_per_byte" of the evaluated text;
    None where that is not known. ``ask``: see ``compare.compute``.
    """
    tokens, n_bytes = evaluated["tokens"], evaluated["bytes"]
    per_byte = None
    if loss is not None and tokens and n_bytes:
        per_byte = loss * tokens / (math.log(2) * n_bytes)
    perplexity = None if loss is None else ask("perplexity", math.exp, loss)
    return {"perplexity": perplexity, "bits_per_byte": per_byte}


def describe_unigram(
    runs: Iterable[Outcome], evaluated: Mapping[str, Any], ask: Callable[..., Any]
) -> dict[str, Any]:
    """Return what losses compare with: the loss of the unigram model of the training text on the
    evaluated tokens, its perplexity and bits per byte; None where runs do not agree, or know none.
    """
    loss = common({one.unigram_loss for one in runs})
    return {"loss": loss, **describe_loss(loss, evaluated, ask)}


def list_arm_runs(arms: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return arm, seed, loss, failure and key of the runs of some arms (entries of a report)."""
    runs = []
    for arm in arms:
        failures = {one["seed"]: one["why"] for one in arm["failures"]}
        for run, loss in zip(arm["runs"], arm["final_loss"]["values"], strict=True):
            failure = failures.get(run["seed"])
            known = {"arm": arm["name"], "seed": run["seed"], "key": run["key"]}
            runs.append({**known, "loss": loss, "failure": failure})
    return runs


def common(values: set[Any]) -> Any:
    """Return the one value of a set; None if there are others."""
    return next(iter(values)) if len(values) == 1 else None


def list_code(arm: ArmResult) -> dict[str, Any]:
    """Return the code that an arm's runs were made with: "components" (by "kind/name":
    distribution, version, sha256 of the source) and "core" (version, sha256, commit); a list of all
    where runs differ.
    """
    known = [one for one in arm.outcomes if one.code]
    different = [one for i, one in enumerate(known) if one.code not in [o.code for o in known[:i]]]
    cores = list({str(sorted(one.core.items())): one.core for one in known}.values())
    return {
        "components": different[0].code if len(different) == 1 else [one.code for one in different],
        "core": cores[0] if len(cores) == 1 else cores,
    }


def list_warnings(arms: Iterable[dict[str, Any]]) -> list[str]:
    """Return every different warning of an arm's runs, with the seeds that had it."""
    lines = []
    for arm in arms:
        seeds: dict[str, list[int]] = {}
        for run in arm["runs"]:
            for text in run["warnings"]:
                seeds.setdefault(text, []).append(run["seed"])
        for text, which in seeds.items():
            lines.append(f"{arm['name']} (seeds {', '.join(map(str, which))}): {text}")
    return lines


def find_source(report: Mapping[str, Any]) -> str | None:
    """Return the data source of a report's baseline by name; None where that is not recorded."""
    values = {one["key"]: one["value"] for one in report["values"]}
    return values.get("data.use")


def describe_held_out(report: Mapping[str, Any]) -> str:
    """Return what text a report's losses are on, in words."""
    text, source = report["text"], find_source(report)
    parts = [f"source {source}"] if source else []
    if text["tokens"]:
        parts.append(f"{text['tokens']:,} tokens of {text['documents']:,} documents")
    return f"held-out text ({', '.join(parts)})" if parts else "held-out text"


def compare_with_unigram(arms: Iterable[dict[str, Any]]) -> list[str]:
    """Return a sentence if arms are no better than the unigram model of the training text."""
    worse = []
    for arm in arms:
        mean, unigram = arm["final_loss"]["mean"], arm["unigram"]["loss"]
        if mean is not None and unigram is not None and mean >= unigram:
            worse.append(f"{arm['name']} ({mean:.4f}, unigram {unigram:.4f})")
    if not worse:
        return []
    return [
        f"WORSE THAN UNIGRAM: {', '.join(worse)}; a model that ignores its context does better, so"
        " that differences say little about components."
    ]
