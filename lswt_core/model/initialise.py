"""Initial values: every parameter from a random stream of its own, derived from the seed and the
parameter's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from lswt_core.errors import PluginError
from lswt_core.plugin_api.seeding import derive


def initialise(model: nn.Module, *, seed: int, std: float) -> None:
    """Give every parameter its initial value from a random stream of its own, derived from the seed
    and its name: adding a component moves no other parameter, so that arms of an ablation start
    equal.

    Linear and Embedding weights are N(0, std^2), biases 0 (Radford et al. 2019). Any other module,
    and a subclass of these with a ``reset_parameters`` of its own, draws there, torch's convention.
    Children come before their parents, so that what a module says there about its children stands.
    """
    for name, module in bottom_up(model):
        if starts_by_default(module):
            for key, parameter in module.named_parameters(recurse=False):
                (
                    nn.init.zeros_(parameter)
                    if key == "bias"
                    else normal(parameter, std, derive(seed, "init", f"{name}.{key}"))
                )
        else:
            reset(module, name, derive(seed, "init", name))


def bottom_up(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by the name ``named_modules`` gives it, children before their parents."""
    names = {module: name for name, module in model.named_modules()}
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if module not in seen:
            seen.add(module)
            for child in module.children():
                yield from walk(child)
            yield names[module], module

    return walk(model)


def starts_by_default(module: nn.Module) -> bool:
    """Whether a module starts as Linear and Embedding do: it is one, without a
    ``reset_parameters``.
    """
    if not isinstance(module, nn.Linear | nn.Embedding):
        return False
    return type(module).reset_parameters in (
        nn.Linear.reset_parameters,
        nn.Embedding.reset_parameters,
    )


def normal(parameter: nn.Parameter, std: float, seed: int) -> None:
    """Fill a parameter from its own stream, drawn on the CPU in float32 so that every device and
    precision starts equal.
    """
    drawn = torch.empty(parameter.shape).normal_(
        std=std, generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        parameter.copy_(drawn)


def reset(module: nn.Module, name: str, seed: int) -> None:
    """Let a module draw its own parameters, and change its children's, from its own stream.

    One that owns nothing may leave its children as they are.
    """
    draw: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if draw is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            draw()
    elif any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        raise PluginError(
            f"{type(module).__name__} at {name!r} owns parameters or buffers but does not say how"
            " they start: give it a method reset_parameters(self) that fills them (models are"
            " built without memory first)"
        )
