"""The wiring of a layer: pre-norm with residual branches scaled down."""

from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Block, BlockParts, Dims, LayerContext, LayerOutput, State
from lswt_core.plugin_api.blocks import SublayerRunner


class Example(Block):
    """``x + scale * mixer(norm(x))``, then ``x + scale * ffn(norm(x))``."""

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(
        self, dims: Dims, parts: BlockParts, *, scale: Annotated[float, Gt(0)] = 0.5
    ) -> None:
        super().__init__(dims, parts)
        # parameters of these names start as those of other blocks do
        self.attention_norm, self.attention = parts.norm(dims), parts.mixer(dims)
        self.ffn_norm, self.ffn = parts.norm(dims), parts.ffn(dims)
        self.scale = scale

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """Change this. [B, T, M] -> [B, T, M]."""
        parts = SublayerRunner(state, context)
        x = x + self.scale * parts.mix(self.attention, self.attention_norm(x))
        x = x + self.scale * parts.feed_forward(self.ffn, self.ffn_norm(x))
        return parts.output(x)


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
