"""Token embeddings and LM head: one table, its rows scaled up on the way in."""

from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims
from lswt_core.plugin_api.lm_head import LMHead


class Example(LMHead):
    """The tied embedding with the model's input times ``scale``; logits are not scaled."""

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, dims: Dims, *, scale: Annotated[float, Gt(0)] = 4.0) -> None:
        super().__init__(dims)
        self.scale = scale

    def project_in(self, embedded: Tensor) -> Tensor:
        """Change this. Rows of the table [B, T, d_vocab] -> the model's input [B, T, M]."""
        return self.scale * super().project_in(embedded)


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
