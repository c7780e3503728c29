"""Model and optimizer state as named tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.checkpoint.values import escape_key, fill_outline, outline, unescape_key
from lswt_core.errors import CheckpointError
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.sharded_tensor import local_tensor

# Group entries that are not saved: options come from the recipe, the rate from the schedule.
UNSAVED = (
    "params",
    "names",
    "name",
    "matrices",
    "lr",
    "lr_factor",
    "weight_decay",
    "weight_decay_factor",
)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name."""
    return dict(model.state_dict())


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, or this rank's pieces of them, into a model's parameters and buffers. Raises
    CheckpointError unless names and dtypes are the model's.
    """
    state = model.state_dict()
    differing = state.keys() ^ tensors.keys()
    if differing:
        raise CheckpointError(
            f"checkpoint and model differ in {', '.join(sorted(differing)[:5])} ({len(differing)}"
            " tensors)"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            stored = tensors[name]
            if tensor.dtype != stored.dtype:  # a copy would round silently
                raise CheckpointError(
                    f"checkpoint and model differ in {name}: {stored.dtype} there,"
                    f" {tensor.dtype} here"
                )
            local_tensor(tensor).copy_(stored)


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state: tensors named "parameter/key", longer where they are nested, and the
    rest as JSON data. Raises CheckpointError for values that cannot be saved.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for path, value in parameter_entries(optimizer, state["state"]):
        outlined = outline(value, path, tensors)
        if not isinstance(value, Tensor):
            rest[path] = outlined
    groups = []
    for i, group in enumerate(state["param_groups"]):
        saved = {}
        for key in changed_keys(optimizer, group):
            saved[key] = outline(group[key], f"group {i}/{escape_key(key)}", tensors)
        groups.append(saved)
    names = [group.get("name", "") for group in state["param_groups"]]
    return tensors, {"state": rest, "groups": groups, "group_names": names}


def parameter_entries(optimizer: Optimizer, state: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Every entry of the parameters' states, by "parameter/key". Raises CheckpointError for one
    that belongs to no parameter.
    """
    names = parameter_names(optimizer)
    for index, entries in state.items():
        if index not in range(len(names)) or not isinstance(entries, dict):
            raise CheckpointError(
                f"the state of optimizer {optimizer.name!r} has an entry {index!r}, which belongs"
                " to no parameter and is not saved: keep it in a parameter's state or in the"
                " groups"
            )
        for key, value in entries.items():
            yield f"{names[index]}/{escape_key(require_string(key, names[index]))}", value


def require_string(key: Any, name: str) -> str:
    """A key of a parameter's state. Raises CheckpointError if it is no string."""
    if isinstance(key, str):
        return key
    raise CheckpointError(f"the state of {name} cannot be saved: its key {key!r} is no string")


def restore_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Load an ``optimizer_state`` into a new optimizer; every tensor keeps its dtype."""
    state = optimizer.state_dict()
    index = {name: i for i, name in enumerate(parameter_names(optimizer))}
    # nested tensors are filled into the document's entries
    direct = {path: t for path, t in tensors.items() if path.rpartition("/")[0] in index}
    entries: dict[int, dict[str, Any]] = {}
    for path, value in (*direct.items(), *document["state"].items()):
        name, _, key = path.rpartition("/")
        if name in index:  # else the parameter is updated by another rank
            entries.setdefault(index[name], {})[unescape_key(key)] = fill_outline(value, tensors)
    for group, saved in pair_groups(state["param_groups"], document):
        group.update({key: fill_outline(value, tensors) for key, value in saved.items()})
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, saved in entries.items():
        loaded = optimizer.state[parameters[i]]
        for key in loaded.keys() & saved.keys():
            loaded[key] = restore_dtype(loaded[key], saved[key])


def pair_groups(
    groups: Sequence[dict[str, Any]], document: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield every parameter group with what was saved of it: in order, or by name where a rank has
    not all of the groups. Raises CheckpointError for one that was not saved.
    """
    saved = document["groups"]
    own = [group.get("name", "") for group in groups]
    names = document.get("group_names", own)  # a checkpoint without them has all in order
    if own == names:
        yield from zip(groups, saved, strict=True)
        return
    by_name = dict(zip(names, saved, strict=True))
    for name, group in zip(own, groups, strict=True):
        if name not in by_name:
            raise CheckpointError(f"the checkpoint has no parameter group {name!r}")
        yield group, by_name[name]


def restore_dtype(loaded: Any, saved: Any) -> Any:
    """A loaded value with its saved dtypes: torch casts tensors to the parameter's dtype."""
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return {key: restore_dtype(loaded[key], saved[key]) for key in saved}
    if isinstance(loaded, list | tuple) and isinstance(saved, list | tuple):
        return type(saved)(restore_dtype(*pair) for pair in zip(loaded, saved, strict=True))
    return saved


def named_parameters(optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimizer's parameters by name."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return dict(zip(parameter_names(optimizer), parameters, strict=True))


def parameter_names(optimizer: Optimizer) -> list[str]:
    """Parameter names in the order of torch's indices."""
    return [name for group in optimizer.param_groups for name in group["names"]]


def changed_keys(optimizer: Optimizer, group: Mapping[str, Any]) -> list[str]:
    """Entries of a parameter group that training has changed from their default."""
    changed = []
    for key, value in group.items():
        if key not in UNSAVED and not equals_default(optimizer.defaults.get(key), value):
            changed.append(key)
    return changed


def equals_default(default: Any, value: Any) -> bool:
    """Whether a value equals its default; False for tensors, which are not compared."""
    if isinstance(default, Tensor) or isinstance(value, Tensor):
        return False
    return bool(default == value)
