"""A check of which parameters are matrices of hidden states."""

from __future__ import annotations

from torch import nn

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, MODEL_KINDS, Subject
from lswt_core.interfaces import Dims

WIDER_HEADS = DIMS._replace(
    d_model=2 * DIMS.d_model, d_ffn=2 * DIMS.d_ffn, d_vocab=2 * DIMS.d_vocab
)
MORE_HEADS = WIDER_HEADS._replace(n_heads=2 * DIMS.n_heads)
DECLARED = "matrix_parameters"


@rule(
    "matrix parameters",
    MODEL_KINDS,
    why=(
        "a parametrisation scales matrices with the model's width, and Muon orthogonalises them;"
        " what it does not know to be one keeps the base model's initial values and rate"
    ),
    fix=(
        'name them on their module, matrix_parameters = ("weight",), each [..., out, in]; or, where'
        " none of its parameters is used as a matrix, matrix_parameters = ()"
    ),
    after=("meta device",),
)
def matrices_are_declared(subject: Subject) -> None:
    """A parameter whose last two dimensions grow with the model's width is the weight of a linear
    layer, or its module has ``matrix_parameters``, which names no vector.
    """
    vectors = [
        key
        for component in subject.own_modules(subject.meta_decoder())
        for module in component.modules()
        for key in getattr(module, DECLARED, ())
        if module.get_parameter(key).ndim < 2
    ]
    require(not vectors, f"{DECLARED} names {', '.join(dict.fromkeys(vectors))}, a vector")
    small = undeclared_shapes(subject, DIMS)
    for dims in (MORE_HEADS, WIDER_HEADS) if small else ():
        large = undeclared_shapes(subject, dims)
        growing = [name for name in small if name in large and grows(small[name], large[name])]
        require(
            not growing,
            f"{', '.join(growing)}: the last two dimensions grow with the model's width, as those"
            f" of a matrix do, but the module has no {DECLARED}",
        )


def undeclared_shapes(subject: Subject, dims: Dims) -> dict[str, tuple[int, ...]]:
    """The last two dimensions of the component's parameters that have them and whose modules do not
    say which are matrices, by name.
    """
    shapes = {}
    for component in subject.own_modules(subject.meta_decoder(dims)):
        for path, module in component.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) or hasattr(module, DECLARED):
                continue
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2:
                    shapes[f"{path}.{key}".lstrip(".")] = tuple(parameter.shape[-2:])
    return shapes


def grows(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """Whether all dimensions are larger in the larger model."""
    return all(one < other for one, other in zip(small, large, strict=True))
