"""A parametrisation: matrices start smaller and learn slower the wider they are."""

from typing import Annotated

from annotated_types import Gt

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, ParameterInfo, Parametrisation, Scaling


class Example(Parametrisation):
    """Initial values and learning rate of every matrix times (fan-in / fan-in at half the width) to
    the power of ``-power``.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, *, power: Annotated[float, Gt(0)] = 0.5) -> None:
        self.power = power

    def base_dims(self, dims: Dims) -> Dims:
        """A model of half the width, with heads as wide."""
        if dims.n_heads % (2 * dims.queries_per_kv):
            raise ValueError(f"{dims.n_heads} heads cannot be halved; choose an even number")
        return dims._replace(
            d_model=dims.d_model // 2, n_heads=dims.n_heads // 2, d_ffn=dims.d_ffn // 2
        )

    def scaling(self, parameter: ParameterInfo) -> Scaling:
        """Change this: the factors of a parameter."""
        if parameter.role != "matrix":
            return Scaling()
        factor = (parameter.shape[-1] / parameter.base_shape[-1]) ** -self.power
        return Scaling(init=factor, lr=factor)


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
