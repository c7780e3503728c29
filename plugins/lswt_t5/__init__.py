"""T5's relative position biases."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Bias, DenseBias, Dims, PositionalEncoding, Unsupported


class RelativeBuckets(PositionalEncoding):
    """A learned attention bias for every head and bucket of distances, shared by all layers (Raffel
    et al. 2020, arXiv 1910.10683, section 2.1).

    For biases per layer, use it in [layers."every 1".positional] and "none" in [positional]. Half
    of the ``buckets`` hold one distance each; the others grow geometrically up to ``max_distance``,
    beyond which all distances share the last. Biases start as N(0, 1/M), as in the authors' code,
    and have no weight decay. Unlike T5's, scores are scaled by 1/sqrt(D).
    """

    name = "t5"
    cacheable_keys = True
    has_bias = True
    citation = """@article{raffel2020exploring,
  title={Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer},
  author={Raffel, Colin and Shazeer, Noam and Roberts, Adam and Lee, Katherine and
    Narang, Sharan and Matena, Michael and Zhou, Yanqi and Li, Wei and Liu, Peter J.},
  journal={Journal of Machine Learning Research}, volume={21}, number={140}, year={2020}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        buckets: Annotated[int, Ge(2)] = 32,
        max_distance: Annotated[int, Ge(2)] = 128,
    ) -> None:
        super().__init__(dims)
        if max_distance <= buckets // 2:
            raise Unsupported(
                f"{buckets // 2} of t5's {buckets} buckets hold one distance each; max_distance"
                f" must be more than that, not {max_distance}"
            )
        self.max_distance, self.std = max_distance, dims.d_model**-0.5
        self.biases = nn.Parameter(torch.empty(buckets, dims.n_heads))  # [buckets, H]
        self.no_weight_decay = ("biases",)

    def reset_parameters(self) -> None:
        """Draw the biases from N(0, 1/M)."""
        nn.init.normal_(self.biases, std=self.std)

    def forward(self, distances: Tensor) -> Tensor:
        """Distances [N] -> biases [N, H]; in `forward`, so that hooks can offload the parameter."""
        return self.biases[bucket_of(distances, len(self.biases), self.max_distance)]

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias:
        """The bias of every head, query and key, [H, T, N], looked up by distance."""
        distances = torch.arange(self.max_distance + 1, device=q.device)
        by_distance = self(distances)  # [max_distance + 1, H]
        # [T, N]
        distance = (q_positions[:, None] - k_positions[None, :]).clamp(0, self.max_distance)
        return DenseBias(by_distance.T[:, distance])


def bucket_of(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of every distance (int64, at least 0)."""
    exact = buckets // 2
    log_ratio = (distance.clamp_min(exact).to(torch.float64) / exact).log()
    share = log_ratio / math.log(max_distance / exact)  # 0 at exact, 1 at max_distance
    logarithmic = exact + (share * (buckets - exact)).to(torch.int64)
    return torch.where(distance < exact, distance, logarithmic.clamp_max(buckets - 1))


@hookimpl
def lswt_components() -> list[type]:
    """Offer T5's biases."""
    return [RelativeBuckets]
