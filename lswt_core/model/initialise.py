"""Initial values: every parameter from its own random stream, derived from the seed and the
parameter's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from lswt_core.errors import PluginError
from lswt_core.plugin_api.seeding import derive_seed


def initialise(
    model: nn.Module,
    *,
    seed: int,
    std: float,
    prefix: str = "",
    without: Sequence[nn.Module] = (),
) -> None:
    """Initialise every parameter from its own random stream, derived from the seed and its name:
    adding a component changes no other parameter, so that the arms of an ablation start equal.

    Linear and Embedding weights are N(0, std^2), biases 0 (Radford et al. 2019); so are weights
    that a module lists in ``matrix_parameters``. Any other module, and a subclass of these with its
    own ``reset_parameters``, is initialised by that method, torch's convention. Children come
    before their parents, so that a parent may change them.

    ``prefix`` is the module's name in the model that it is part of; submodules ``without`` are left
    out.
    """
    for name, module in children_first(model, prefix, without):
        for key in getattr(module, "matrix_parameters", ()):
            weight = module.get_parameter(key)
            fill_normal(weight, std, derive_seed(seed, "init", f"{name}.{key}"))
        if not has_default_initialisation(module):
            call_reset_parameters(module, name, derive_seed(seed, "init", name))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if key == "bias":
                nn.init.zeros_(parameter)
            else:
                fill_normal(parameter, std, derive_seed(seed, "init", f"{name}.{key}"))


def children_first(
    model: nn.Module, prefix: str = "", without: Sequence[nn.Module] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, under its name in ``named_modules``, children before parents."""
    names = {module: name for name, module in model.named_modules(prefix=prefix)}
    seen = {part for module in without for part in module.modules()}

    def walk(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if module not in seen:
            seen.add(module)
            for child in module.children():
                yield from walk(child)
            yield names[module], module

    return walk(model)


def has_default_initialisation(module: nn.Module) -> bool:
    """Whether a module is a Linear or Embedding without a ``reset_parameters`` of its own."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return False
    defaults = (nn.Linear.reset_parameters, nn.Embedding.reset_parameters)
    return type(module).reset_parameters in defaults


def fill_normal(parameter: nn.Parameter, std: float, seed: int) -> None:
    """Fill with N(0, std^2), drawn on the CPU in float32 so that every device and dtype starts
    equal.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(parameter.shape).normal_(std=std, generator=generator)
    with torch.no_grad():
        parameter.copy_(values)


def call_reset_parameters(module: nn.Module, name: str, seed: int) -> None:
    """Call a module's ``reset_parameters`` with the CPU's random state set to ``seed``. Raises
    PluginError if it has none but owns parameters or buffers.
    """
    reset_parameters: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if reset_parameters is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reset_parameters()
        return
    owned = {name for name, _ in module.named_parameters(recurse=False)}
    owned |= {name for name, _ in module.named_buffers(recurse=False)}
    if owned - set(getattr(module, "matrix_parameters", ())):
        raise PluginError(
            f"{type(module).__name__} at {name!r} owns parameters or buffers but does not say how"
            " they start: give it a method reset_parameters(self) that fills them (models are"
            " built on the meta device first)"
        )
