"""A feed-forward layer beside another one, such as the shared expert of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from annotated_types import Gt, Lt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    Dims,
    FeedForward,
    LayerContext,
    LayerOutput,
    State,
    StatefulFeedForward,
)
from lswt_core.plugin_api.blocks import SublayerRunner


class SharedExpert(StatefulFeedForward):
    """shared(x) + routed(x): the ``shared`` layer sees every token, whatever the ``routed`` one
    does (DeepSeekMoE's shared experts, Dai et al. 2024, arXiv 2401.06066, eq. 9 without the
    residual).

    Both are feed-forward components of any name. The hidden width ``d_ffn`` is divided between
    them: ``shared_width`` is the share of the shared layer, rounded to whole units. Two ungated or
    gated layers of one kind, without biases, are together exactly that layer of the whole width.
    State, loss terms and entries of the carry are those of the two layers.
    """

    name = "shared-expert"
    citation = """@article{dai2024deepseekmoe,
  title={DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models},
  author={Dai, Damai and Deng, Chengqi and Zhao, Chenggang and Xu, R. X. and Gao, Huazuo and Chen,
    Deli and Li, Jiashi and Zeng, Wangding and Yu, Xingkai and Wu, Y. and Xie, Zhenda and Li, Y. K.
    and Huang, Panpan and Luo, Fuli and Ruan, Chong and Sui, Zhifang and Liang, Wenfeng},
  journal={arXiv preprint arXiv:2401.06066}, year={2024}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        shared: Callable[[Dims], FeedForward],
        routed: Callable[[Dims], FeedForward],
        shared_width: Annotated[float, Gt(0), Lt(1)] = 0.25,
    ) -> None:
        super().__init__(dims)
        width = round(shared_width * dims.d_ffn)
        if not 0 < width < dims.d_ffn:
            raise ValueError(
                f"shared_width = {shared_width:g} of d_ffn = {dims.d_ffn} leaves one of the two"
                " layers without hidden units"
            )
        self.shared = shared(dims._replace(d_ffn=width))
        self.routed = routed(dims._replace(d_ffn=dims.d_ffn - width))
        reaches = [part.reach for part in (self.shared, self.routed)]
        self.reach = None if None in reaches else max(filter(None, reaches), default=0)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State, context: LayerContext
    ) -> LayerOutput:
        """[B, T, M] -> [B, T, M]; the state is a dictionary of the two layers' states."""
        parts = SublayerRunner(state, context)
        total = parts.feed_forward(self.shared, x, "shared")
        total = total + parts.feed_forward(self.routed, x, "routed")
        return parts.output(total)._replace(state=parts.next_state or None)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the pair."""
    return [SharedExpert]
