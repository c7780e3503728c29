"""For optimizers of other packages: a component around a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lswt_core.errors import PluginError
from lswt_core.interfaces import Optimizer

INSTALL = "pip install 'lswt-core[optimizers]'"


class WrappedOptimizer(Optimizer):
    """An optimizer whose update is another's: ``inner(groups, **arguments)``, with which it shares
    state and parameter groups. The inner optimizer's state is saved and restored as any other's.
    """

    unit = "matrix"  # what the other needs of a parameter is not known

    def __init__(
        self,
        groups: Iterable[Any],
        inner: Callable[..., torch.optim.Optimizer],
        **arguments: Any,
    ) -> None:
        try:
            self._inner = inner(list(groups), **arguments)
        except TypeError as error:
            raise ValueError(f"the optimizer cannot be built: {error}") from error
        super().__init__(self._inner.param_groups, self._inner.defaults)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """As Optimizer's, with the inner optimizer's class and attributes: torch's own copy of it
        would keep its state and groups alone.
        """
        state = super().__getstate__()
        inner = state.pop("_inner")
        return state | {"_inner_class": type(inner), "_inner_attributes": own_attributes(inner)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the inner optimizer of a copy anew. A state without it is load_state_dict's."""
        inner_class = state.pop("_inner_class", None)
        attributes = state.pop("_inner_attributes", {})
        super().__setstate__(state)
        if inner_class is None:
            return
        self._inner = inner_class.__new__(inner_class)
        self._inner.__dict__.update(attributes)
        self._inner.__setstate__(
            {"state": self.state, "param_groups": self.param_groups, "defaults": self.defaults}
        )

    def _share(self) -> None:
        """Share state and groups, which load_state_dict replaces."""
        self._inner.state, self._inner.param_groups = self.state, self.param_groups

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self._share()
        result: float | None = self._inner.step(closure)
        # a saved tensor comes back contiguous, and products of another layout round differently
        for state in self.state.values():
            for key, value in state.items():
                state[key] = contiguous(value)
        return result


def own_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's attributes but for state, groups, and torch's hooks and wrapped ``step``."""
    shared = ("state", "param_groups", "defaults", "step")
    return {
        key: value
        for key, value in vars(optimizer).items()
        if key not in shared and not key.startswith("_optimizer_")
    }


def contiguous(value: Any) -> Any:
    """A tensor, or a list of them, in the usual memory layout; anything else as it is."""
    if isinstance(value, Tensor):
        return value.contiguous()
    if isinstance(value, list):
        return [contiguous(item) for item in value]
    return value


def library_class(component: Optimizer | type[Optimizer], package: str, name: str) -> Any:
    """A class of an optional package; raises PluginError, with what to install, if missing."""
    try:
        return getattr(import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"optimizer {component.name!r} needs {package}, which is missing or has no {name}"
            f" ({error}): {INSTALL}"
        ) from error


def with_tuples(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as optimizers expect them: lists, which is what TOML has, become tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
    }
