"""Checks of how parameters and buffers get their initial values."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lswt_core.conformance.check import Violation, require, rule
from lswt_core.conformance.subject import DIMS, MODEL_KINDS, Subject
from lswt_core.conformance.tensors import seed_global_generators, tensors_in
from lswt_core.model.decoder import Decoder
from lswt_core.model.initialise import initialise

RESET = "reset_parameters"
# Operators whose result nobody has chosen values for.
UNINITIALISED = ("empty", "new_empty", "_to_copy", "clone")


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """All parameters and buffers with their names."""
    return [*module.named_parameters(), *module.named_buffers()]


@rule(
    "meta device",
    MODEL_KINDS,
    why=(
        "models are built on the meta device first, so that planning takes no memory and large"
        " models load piece by piece"
    ),
    fix=(
        "register all tensors as parameters or buffers, and fill every one in"
        " reset_parameters(self)"
    ),
    after=("interface",),
)
def builds_on_meta(subject: Subject) -> None:
    """Every tensor is registered and on the meta device after building, and initialisation fills
    every one.
    """
    on_meta = build_on_meta(subject)
    allocated = [name for name, tensor in named_tensors(on_meta) if not tensor.is_meta]
    require(not allocated, f"allocated while building: {', '.join(allocated)}")
    plain = [name for module in subject.own_modules(on_meta) for name in plain_tensors(module)]
    require(
        not plain,
        f"{', '.join(dict.fromkeys(plain))}: a tensor that the constructor keeps as a plain"
        " attribute has no values, and does not move to the model's device. Register it:"
        ' self.register_buffer("...", torch.empty(...), persistent=False), and fill it in'
        " reset_parameters",
    )
    decoder = on_meta.to_empty(device="cpu")
    values = [initialise_over(decoder, *fill) for fill in ((77, False), (78, True))]
    unfilled = [
        name for name, value in values[0].items() if not torch.equal(value, values[1][name])
    ]
    require(not unfilled, f"not filled by initialisation: {', '.join(unfilled)}")


def build_on_meta(subject: Subject) -> Decoder:
    """The tiny model on the meta device. Raises Violation if its constructor needs values."""
    try:
        return subject.meta_decoder()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if "meta" not in str(error).lower():
            raise
        raise Violation(
            f"the constructor needs a tensor's values ({str(error).split('. ')[0]}): on the meta"
            " device tensors have shapes alone, and no nonzero, x[mask] or .item(); compute with"
            " Python's numbers, or in reset_parameters"
        ) from error


def plain_tensors(module: nn.Module) -> Iterator[str]:
    """The names of attributes that are or hold tensors and are not registered."""
    for path, submodule in module.named_modules():
        for key, value in vars(submodule).items():
            if key not in ("_parameters", "_buffers", "_modules") and tensors_in(value):
                yield f"{path}.{key}".lstrip(".")


def initialise_over(decoder: Decoder, number: int, truth: bool) -> dict[str, Tensor]:
    """What initialisation leaves in a model full of NaN, of a number or of truth values."""
    with torch.no_grad():
        for _, tensor in named_tensors(decoder):
            whole = truth if tensor.dtype == torch.bool else number
            tensor.fill_(torch.nan if tensor.is_floating_point() else whole)
    seed_global_generators(0)
    initialise(decoder, seed=1, std=0.02)
    return {name: tensor.detach().clone() for name, tensor in named_tensors(decoder)}


@rule(
    "reproducible initialisation",
    MODEL_KINDS,
    why=(
        "arms of an ablation start bitwise equal in the parameters that they share, whatever else"
        " was drawn before"
    ),
    fix=(
        "draw in reset_parameters from torch's default generator alone, which the core seeds by the"
        " parameter's name"
    ),
    after=("meta device",),
)
def initialises_reproducibly(subject: Subject) -> None:
    """The same seed gives the same values, whatever the state of the global generators."""
    values = []
    for seed in (1, 2):
        seed_global_generators(seed)
        decoder = subject.meta_decoder().to_empty(device="cpu")
        initialise(decoder, seed=3, std=0.02)
        values.append({name: tensor.clone() for name, tensor in named_tensors(decoder)})
    first, second = values
    different = [name for name in first if not torch.equal(first[name], second[name])]
    require(not different, f"the same seed gives different values of {', '.join(different)}")


class WrittenTensors(TorchDispatchMode):
    """Records which tensors are written while it is active, except by ``reset_parameters``, which
    runs again after building.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and writes_values(func) and not in_reset_parameters():
            self.storages.add(storage_id(out))
        return out


def writes_values(operator: Any) -> bool:
    """Whether an operator writes values into its result, new or in place; a view does not."""
    alias = operator._schema.returns[0].alias_info
    name: str = operator._schema.name.partition("::")[2]
    return not name.startswith(UNINITIALISED) and (alias is None or alias.is_write)


def in_reset_parameters() -> bool:
    """Whether a ``reset_parameters`` is on the call stack."""
    return any(frame.f_code.co_name == RESET for frame, _ in traceback.walk_stack(None))


def storage_id(tensor: Tensor) -> int:
    """Identifies a tensor's storage, also on the meta device."""
    return tensor.untyped_storage()._cdata


@rule(
    "initial values",
    (*MODEL_KINDS, "loss"),
    why=(
        "a layer that is meant to start at zero but starts at N(0, init_std) is another model than"
        " the one written down"
    ),
    fix=(
        "set initial values in reset_parameters(self) of the module or a parent and nowhere else:"
        " constructors run on the meta device"
    ),
    after=("meta device", "reproducible initialisation"),
)
def keeps_initial_values(subject: Subject) -> None:
    """The model holds the values that ``reset_parameters`` of the component and its submodules
    wrote, and constructors write none.
    """
    with torch.device("meta"), WrittenTensors() as written:
        module: nn.Module = subject.build_alone(DIMS)
    in_constructor = {
        name
        for name, parameter in module.named_parameters()
        if storage_id(parameter) in written.storages
    }
    module = module.to_empty(device="cpu")
    values: dict[str, Tensor] = {}
    calls = {name: record_reset(submodule, name, values) for name, submodule in resettable(module)}
    initialise(module, seed=0, std=0.02)
    never = [name or "the component" for name, called in calls.items() if not called]
    require(not never, f"reset_parameters is never called: {', '.join(never)}")
    held = dict(module.named_parameters())
    lost = sorted(name for name, value in values.items() if not torch.equal(held[name], value))
    require(not lost, f"the model does not hold what reset_parameters wrote: {', '.join(lost)}")
    lost = sorted(in_constructor - values.keys())
    require(not lost, f"values set in the constructor are lost: {', '.join(lost)}")


def resettable(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules that have a ``reset_parameters`` of their own; torch's layers are not among
    them.
    """
    for name, submodule in module.named_modules():
        method = getattr(type(submodule), RESET, None)
        if method is not None and not method.__module__.startswith("torch."):
            yield name, submodule


def record_reset(module: nn.Module, prefix: str, values: dict[str, Tensor]) -> list[None]:
    """Let the module's ``reset_parameters`` record in ``values`` what it leaves in parameters; the
    returned list grows with every call.
    """
    reset: Callable[[], None] = getattr(module, RESET)
    calls: list[None] = []

    def reset_and_record() -> None:
        calls.append(None)
        reset()
        for name, parameter in module.named_parameters():
            values[f"{prefix}.{name}".lstrip(".")] = parameter.detach().clone()

    module.reset_parameters = reset_and_record  # type: ignore[assignment]
    return calls
