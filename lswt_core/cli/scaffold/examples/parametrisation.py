"""A parametrisation: matrices start smaller and learn slower the wider they are."""

from typing import Annotated

from annotated_types import Gt

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, ParameterInfo, Parametrisation, Scaling


class Example(Parametrisation):
    """A matrix whose fan-in is m times that in a model of width ``base_d_model`` starts at
    1 / sqrt(m), or at 1 / m if its fan-out is the same, and learns at 1 / m.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, *, base_d_model: Annotated[int, Gt(0)] = 256) -> None:
        self.base_d_model = base_d_model

    def base_dims(self, dims: Dims) -> Dims:
        """A model of width ``base_d_model``, with heads as wide."""
        n_heads, rest = divmod(self.base_d_model, dims.d_head)
        if rest or n_heads % dims.queries_per_kv:
            raise ValueError(f"base_d_model = {self.base_d_model} has no whole number of heads")
        d_ffn = dims.d_ffn * self.base_d_model // dims.d_model
        return dims._replace(d_model=self.base_d_model, n_heads=n_heads, d_ffn=d_ffn)

    def scaling(self, parameter: ParameterInfo) -> Scaling:
        """Change this: the factors of a parameter."""
        if parameter.role != "matrix":
            return Scaling()
        m = parameter.shape[-1] / parameter.base_shape[-1]
        grows = parameter.shape[-2] != parameter.base_shape[-2]  # the fan-out, too
        return Scaling(init=m**-0.5 if grows else 1 / m, lr=1 / m)


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
