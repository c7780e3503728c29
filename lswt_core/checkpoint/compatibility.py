"""Whether a run may be resumed from a checkpoint: recipe, component code, data and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lswt_core.checkpoint.saved import Saved
from lswt_core.errors import CheckpointError

# Which recipe keys may change on resume; a table stands for all keys below it. FREE: always.
# TRAJECTORY: with --accept-changes. All others identify the run.
FREE = (
    "evaluate",
    "sample",
    "track",
    "checkpoint.keep",
    "checkpoint.every",
    "checkpoint.asynchronous",
    "train.log_every",
    "train.micro_batch_size",
    "train.shard",
    "train.memory_device",
    "train.compile",
    "train.activation_checkpointing",
)
TRAJECTORY = (
    "train.steps",
    "train.tokens",
    "train.grad_clip",
    "train.precision",
    "optimizer",
    "schedule",
    "loss",
    "attention",
    "cross_entropy",
)
Change = tuple[str, Any, Any]  # key, old value, new value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[Change]:
    """The values that differ between two nested tables, under dotted keys."""
    changes: list[Change] = []
    for key in dict.fromkeys((*old, *new)):
        path, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += differences(before, after, f"{path}.")
        elif before != after:
            changes.append((path, before, after))
    return changes


def check_recipe(
    saved: Saved, resolved: Mapping[str, Any], *, accept_changes: bool
) -> list[Change]:
    """Raise CheckpointError unless the recipe continues the saved run; returns accepted changes."""
    changes = [
        change
        for change in differences(saved.document("recipe"), resolved)
        if not is_below(change[0], FREE)
    ]
    refused = [
        change for change in changes if not (accept_changes and is_below(change[0], TRAJECTORY))
    ]
    if not refused:
        return changes
    lines = [f"  {key}: {old!r} in the checkpoint, {new!r} now" for key, old, new in refused]
    cure = "these make it another run: give it a directory of its own with --out"
    if all(is_below(key, TRAJECTORY) for key, _, _ in refused):
        cure = "--accept-changes continues with the new values"
    raise CheckpointError(
        f"{saved.path} was written by another recipe:\n"
        + "\n".join(lines)
        + f"\n  fix: restore the old values; or {cure}"
    )


def check_code(
    saved: Saved, current: Mapping[str, Mapping[str, str]], *, accept_changes: bool
) -> list[str]:
    """Raise CheckpointError unless components in both runs have the same code (``codes_of``);
    returns remarks on accepted changes. Components in one run only are for ``check_recipe``.
    """
    if not saved.holds("components"):
        return [
            f"{saved.path} does not say which code its components had: whether it has changed since"
            " cannot be told"
        ]
    lines = changed_code(saved, current)
    if not lines or accept_changes:
        return [f"continuing with other code of {line}" for line in lines]
    listed = "\n".join(f"  {line}" for line in lines)
    raise CheckpointError(
        f"{saved.path} was written with other code: the source of these components, or what it"
        f" imports, was edited or updated\n{listed}\n  fix: restore it; or --accept-changes"
        " continues with it as it is now; or give the new code a run of its own with --out"
    )


def changed_code(saved: Saved, current: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line about every component whose code is not that of the checkpoint."""
    old: dict[str, dict[str, str]] = saved.document("components")
    lines = []
    for name in sorted(current.keys() & old.keys()):
        if current[name]["sha256"] != old[name]["sha256"]:
            before, after = describe_code(old[name]), describe_code(current[name])
            lines.append(f"{name}: {before} in the checkpoint, {after} now")
    return lines


def describe_code(code: Mapping[str, str]) -> str:
    """Distribution, version and hash of a component's code."""
    return f"{code['distribution']} {code['version']} (sha256 {code['sha256'][:12]})"


def is_below(key: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of the prefixes or below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def check_fingerprint(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """Raise CheckpointError unless data and tokenizer are those of the saved run."""
    for kind, old in saved.items():
        new = current[kind]
        if new != old:
            raise CheckpointError(
                f"the {kind} is not what this run was trained on (fingerprint {old[:12]} then,"
                f" {new[:12]} now): restore it, or start another run with --out"
            )
