"""What a checkpoint holds of a run, and whether a run may be continued from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.checkpoint import Saved
from lswt_core.checkpoint.values import escaped, filled, outline, unescaped
from lswt_core.errors import CheckpointError
from lswt_core.interfaces import Optimizer

# How a recipe key may change between the parts of one run (the longest prefix decides; all else is
# identity):
FREE = (
    *("evaluate", "sample", "track", "checkpoint.keep", "checkpoint.every"),
    *(
        "train.log_every",
        "train.micro_batch_size",
        "train.compile",
        "train.activation_checkpointing",
    ),
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


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name."""
    return dict(model.state_dict())


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything the optimizer remembers: tensors named "parameter/key" (and further, where they
    are nested), and the rest as JSON. Raises CheckpointError for what no checkpoint holds.
    """
    state = optimizer.state_dict()
    names = parameter_names(optimizer)
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, entries in state["state"].items():
        if index not in range(len(names)) or not isinstance(entries, dict):
            raise CheckpointError(
                f"the state of optimizer {optimizer.name!r} has an entry {index!r}, which belongs"
                " to no parameter and is not saved: keep it in a parameter's state or in the"
                " groups"
            )
        for key, value in entries.items():
            path = f"{names[index]}/{escaped(text_of(key, names[index]))}"
            outlined = outline(value, path, tensors)
            if not isinstance(value, Tensor):
                rest[path] = outlined
    groups = []
    for i, group in enumerate(state["param_groups"]):
        keys = dynamic_keys(optimizer, group)
        groups.append(
            {key: outline(group[key], f"group {i}/{escaped(key)}", tensors) for key in keys}
        )
    return tensors, {"state": rest, "groups": groups}


def text_of(key: Any, name: str) -> str:
    """A key of a parameter's state; raises CheckpointError if it is no text."""
    if isinstance(key, str):
        return key
    raise CheckpointError(f"the state of {name} cannot be saved: its key {key!r} is no text")


def restore_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Give a fresh optimizer what another remembered, every tensor in the precision it had."""
    state = optimizer.state_dict()
    index = {name: i for i, name in enumerate(parameter_names(optimizer))}
    entries: dict[int, dict[str, Any]] = {}
    for path, value in (*own_tensors(tensors, index).items(), *document["state"].items()):
        name, _, key = path.rpartition("/")
        entries.setdefault(index[name], {})[unescaped(key)] = filled(value, tensors)
    for group, saved in zip(state["param_groups"], document["groups"], strict=True):
        group.update({key: filled(value, tensors) for key, value in saved.items()})
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, held in entries.items():
        loaded = optimizer.state[parameters[i]]
        for key in loaded.keys() & held.keys():
            loaded[key] = as_saved(loaded[key], held[key])


def own_tensors(tensors: Mapping[str, Tensor], index: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors that are themselves an entry of a parameter's state, not nested in one."""
    return {path: tensor for path, tensor in tensors.items() if path.rpartition("/")[0] in index}


def as_saved(loaded: Any, saved: Any) -> Any:
    """A loaded value as it was saved: torch casts tensors to the parameter's precision."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return {key: as_saved(loaded[key], saved[key]) for key in saved}
    if isinstance(loaded, list | tuple) and isinstance(saved, list | tuple):
        return type(saved)(as_saved(*pair) for pair in zip(loaded, saved, strict=True))
    return saved


def parameter_names(optimizer: Optimizer) -> list[str]:
    """Names in the order of torch's parameter indices."""
    return [name for group in optimizer.param_groups for name in group["names"]]


def dynamic_keys(optimizer: Optimizer, group: Mapping[str, Any]) -> list[str]:
    """Group entries that training has changed. Options are left out: they come from the recipe, the
    rate from the schedule.
    """
    fixed = ("params", "names", "name", "matrices", "lr", "weight_decay")
    free = {key: value for key, value in group.items() if key not in fixed}
    return [key for key, value in free.items() if not unchanged(optimizer.defaults.get(key), value)]


def unchanged(default: Any, value: Any) -> bool:
    """Whether an option still is its default; of tensors that is not asked."""
    return not (isinstance(default, Tensor) or isinstance(value, Tensor)) and bool(default == value)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ between two resolved recipes: (key, old, new)."""
    found = []
    for key in dict.fromkeys((*old, *new)):
        path, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{path}.")
        elif before != after:
            found.append((path, before, after))
    return found


def check_recipe(
    saved: Saved, resolved: Mapping[str, Any], *, accept_changes: bool
) -> list[tuple[str, Any, Any]]:
    """Raise CheckpointError unless the recipe continues the saved run; returns the changes that
    were let through.
    """
    changed = [d for d in differences(saved.document("recipe"), resolved) if not under(d[0], FREE)]
    barred = [d for d in changed if not (accept_changes and under(d[0], TRAJECTORY))]
    if barred:
        lines = "\n".join(
            f"  {key}: {before!r} in the checkpoint, {after!r} now" for key, before, after in barred
        )
        curable = all(under(key, TRAJECTORY) for key, _, _ in barred)
        cure = (
            "--accept-changes continues with the new values"
            if curable
            else "these make it another run: give it a directory of its own with --out"
        )
        raise CheckpointError(
            f"{saved.path} was written by another recipe:\n{lines}\n  fix: restore the old values;"
            f" or {cure}"
        )
    return changed


def check_code(
    saved: Saved, found: Mapping[str, Mapping[str, str]], *, accept_changes: bool
) -> list[str]:
    """Raise CheckpointError unless the components are the code that the saved run had
    (``codes_of``); returns what to say of changes that were let through. A component that only one
    side has is for ``check_recipe``.
    """
    if not saved.holds("components"):
        return [
            f"{saved.path} does not say which code its components had: whether it has changed since"
            " cannot be told"
        ]
    then: dict[str, dict[str, str]] = saved.document("components")
    changed = [
        name for name in found.keys() & then.keys() if found[name]["sha256"] != then[name]["sha256"]
    ]
    lines = [
        f"{name}: {offered(then[name])} in the checkpoint, {offered(found[name])} now"
        for name in sorted(changed)
    ]
    if not changed or accept_changes:
        return [f"continuing with other code of {line}" for line in lines]
    listed = "\n".join(f"  {line}" for line in lines)
    raise CheckpointError(
        f"{saved.path} was written with other code: the source of these components, or what it"
        f" imports, was edited or updated\n{listed}\n  fix: restore it; or --accept-changes"
        " continues with it as it is now; or give the new code a run of its own with --out"
    )


def offered(code: Mapping[str, str]) -> str:
    """Whose code, and which."""
    return f"{code['distribution']} {code['version']} (sha256 {code['sha256'][:12]})"


def under(key: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of the prefixes or below one."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def check_fingerprint(saved: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise CheckpointError if the text or tokenizer is not what the run began with."""
    for what, value in saved.items():
        if found[what] != value:
            raise CheckpointError(
                f"the {what} is not what this run was trained on (fingerprint {value[:12]} then,"
                f" {found[what][:12]} now): restore it, or start another run with --out"
            )


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill a model's parameters and buffers, all of them and nothing else."""
    missing = model.state_dict().keys() ^ tensors.keys()
    if missing:
        raise CheckpointError(
            f"checkpoint and model differ in {', '.join(sorted(missing)[:5])} ({len(missing)}"
            " tensors)"
        )
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dtype != tensors[name].dtype:  # copying would round in silence
                raise CheckpointError(
                    f"checkpoint and model differ in {name}: {tensors[name].dtype} there,"
                    f" {tensor.dtype} here"
                )
            tensor.copy_(tensors[name])
