"""Apply a parametrisation: factors of initial values, learning rates and weight decay, from a
parameter's role and its shape in the model and in a base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from lswt_core.errors import Incompatible, PluginError
from lswt_core.interfaces import Dims, ParameterInfo, Parametrisation, Scaling


def compute_scalings(
    parametrisation: Parametrisation, dims: Dims, build: Callable[[Dims], nn.Module]
) -> dict[str, Scaling]:
    """The factors of every parameter of ``build(dims)`` that has one other than 1, by name.
    ``build`` makes a model of given sizes on the meta device. Raises Incompatible if the base model
    has other parameters.
    """
    try:
        base_dims = parametrisation.base_dims(dims)
    except ValueError as error:
        raise Incompatible(f"[parametrisation] {parametrisation.name}: {error}") from error
    own = dict(parameter_roles(build(dims)))
    base = own if base_dims == dims else dict(parameter_roles(build(base_dims)))
    if own.keys() != base.keys():
        other = sorted(own.keys() ^ base.keys())[0]
        raise Incompatible(
            f"[parametrisation] {parametrisation.name}: a model of width {base_dims.d_model} has"
            f" other parameters than one of width {dims.d_model}, e.g. {other}"
        )
    scalings = {}
    for name, (role, shape) in own.items():
        info = ParameterInfo(name, role, shape, base[name][1])  # type: ignore[arg-type]
        scaling = require_positive(parametrisation, info)
        if scaling != Scaling():
            scalings[name] = scaling
    return scalings


def require_positive(parametrisation: Parametrisation, info: ParameterInfo) -> Scaling:
    """The factors of a parameter; raises PluginError if one is not a positive finite number."""
    scaling = parametrisation.scaling(info)
    if not all(0 < factor < float("inf") for factor in scaling):
        raise PluginError(
            f"[parametrisation] {parametrisation.name} gives {info.name} the factors {scaling}:"
            " they must be positive and finite"
        )
    return scaling


def parameter_roles(model: nn.Module) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield the name of every parameter with its role (ParameterInfo.role) and shape."""
    for path, module in model.named_modules():
        declared = getattr(module, "matrix_parameters", ())
        for key, parameter in module.named_parameters(recurse=False):
            role = "other"
            if isinstance(module, nn.Embedding):
                role = "embedding"
            elif key in declared or (isinstance(module, nn.Linear) and key == "weight"):
                role = "matrix"
            yield f"{path}.{key}".lstrip("."), (role, tuple(parameter.shape))


@torch.no_grad()
def scale_initial_values(
    named: Iterable[tuple[str, Tensor]], scalings: Mapping[str, Scaling]
) -> None:
    """Multiply the initial values of named parameters by their factors."""
    for name, parameter in named:
        if name in scalings:
            parameter.mul_(scalings[name].init)
