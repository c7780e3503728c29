"""Checks of how parameters start: what a component says of it is what a built model holds."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, MODEL_KINDS, Subject
from lswt_core.model.initialise import initialise

RESET = "reset_parameters"
# operators whose result is nobody's choice of numbers
NO_VALUES = ("empty", "new_empty", "_to_copy", "clone")


class Chosen(TorchDispatchMode):
    """Notes what is given values while it lasts, but by ``reset_parameters``: that is asked again
    later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and chooses(func) and not within_reset():
            self.storages.add(storage(found))
        return found


def chooses(operator: Any) -> bool:
    """Whether an operator puts numbers into what it returns, new or in place; a view has them
    already.
    """
    alias = operator._schema.returns[0].alias_info
    name: str = operator._schema.name.partition("::")[2]
    return not name.startswith(NO_VALUES) and (alias is None or alias.is_write)


def within_reset() -> bool:
    """Whether a ``reset_parameters`` is running."""
    return any(frame.f_code.co_name == RESET for frame, _ in traceback.walk_stack(None))


def storage(tensor: Tensor) -> int:
    """What tells one tensor's memory from another's, also on the meta device."""
    return tensor.untyped_storage()._cdata


@rule(
    "start",
    (*MODEL_KINDS, "loss"),
    why=(
        "a layer that is meant to start at zero, and starts at N(0, init_std), trains another model"
        " than the one written down"
    ),
    mend=(
        "say it in reset_parameters(self), of the module or of a parent, and nowhere else:"
        " constructors run without memory"
    ),
    after=("meta", "initialisation"),
)
def starts_as_said(subject: Subject) -> None:
    """What constructors and ``reset_parameters`` put into parameters, of children too, is what the
    model holds.
    """
    with torch.device("meta"), Chosen() as chosen:
        made: nn.Module = subject.make(DIMS)
    early = {
        name for name, parameter in made.named_parameters() if storage(parameter) in chosen.storages
    }
    made = made.to_empty(device="cpu")
    said: dict[str, Tensor] = {}
    called = {name: listen(module, name, said) for name, module in speakers(made)}
    initialise(made, seed=0, std=0.02)
    silent = [name or "the component" for name, times in called.items() if not times]
    require(not silent, f"reset_parameters is never called: {', '.join(silent)}")
    held = dict(made.named_parameters())
    lost = sorted(name for name, value in said.items() if not torch.equal(held[name], value))
    require(not lost, f"the model does not hold what reset_parameters wrote: {', '.join(lost)}")
    early -= said.keys()
    require(
        not early, f"given values in the constructor, which are lost: {', '.join(sorted(early))}"
    )


def speakers(made: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that say themselves how they start, torch's own not among them."""
    for name, module in made.named_modules():
        method = getattr(type(module), RESET, None)
        if method is not None and not method.__module__.startswith("torch."):
            yield name, module


def listen(module: nn.Module, name: str, said: dict[str, Tensor]) -> list[None]:
    """Note what parameters hold once a module has had its word; the list grows with every call."""
    reset: Callable[[], None] = getattr(module, RESET)
    calls: list[None] = []

    def heard() -> None:
        calls.append(None)
        reset()
        said.update(
            {
                f"{name}.{key}".lstrip("."): p.detach().clone()
                for key, p in module.named_parameters()
            }
        )

    module.reset_parameters = heard  # type: ignore[assignment]
    return calls
