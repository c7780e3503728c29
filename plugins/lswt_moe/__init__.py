"""A mixture of experts with token-choice routing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    Batch,
    Dims,
    LayerContext,
    LayerOutput,
    LossSum,
    State,
    StatefulFeedForward,
    Unsupported,
)
from lswt_core.plugin_api.recurrence import without_autocast
from lswt_core.plugin_api.softmax_attention import cast_for_autocast
from lswt_moe.grouped import grouped_linear

BALANCE, Z = "router_balance", "router_z"


class Routing(NamedTuple):
    """Which experts tokens are sent to."""

    logits: Tensor  # [B, T, E], at least float32
    affinity: Tensor  # [B, T, E], their softmax
    expert: Tensor  # [B, T, K]
    gate: Tensor  # [B, T, K], the weights of the experts' outputs


class Router(nn.Linear):
    """A linear layer that computes in float32 or wider, whatever autocast says: a rounded logit may
    choose another expert.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., M] -> [..., E]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x):
            return linear(x.to(dtype), self.weight.to(dtype))


class Experts(nn.Module):
    """The SwiGLU layers of all experts: fc2(value * silu(gate)), value and gate the two halves of
    fc1(x), without biases.
    """

    matrix_parameters = ("fc1", "fc2")

    def __init__(self, n_experts: int, d_model: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(n_experts, 2 * width, d_model))
        self.fc2 = nn.Parameter(torch.empty(n_experts, d_model, width))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """Apply to rows x [N, M] the experts [N], which ascend: -> [N, M]."""
        x = cast_for_autocast(x)
        hidden = grouped_linear(x, cast_for_autocast(self.fc1), expert)
        value, gate = hidden.chunk(2, dim=-1)
        out: Tensor = grouped_linear(value * silu(gate), cast_for_autocast(self.fc2), expert)
        return out


class MixtureOfExperts(StatefulFeedForward):
    """Every token goes through the ``top_k`` of ``n_experts`` SwiGLU layers that a linear router
    scores highest; their outputs are added with the router's probabilities as weights (Shazeer et
    al. 2017, arXiv 1701.06538; Jiang et al. 2024, arXiv 2401.04088).

    Dropless: rows are sorted by expert, and no expert has a capacity (Gale et al. 2022, arXiv
    2211.15841). ``width`` is that of an expert's hidden layer; by default d_ffn / top_k, which
    costs what one layer of width d_ffn does. ``normalise`` divides the weights by their sum.

    The load-balancing loss "router_balance" is DeepSeek-V3's sequence-wise one (arXiv 2412.19437,
    eq. 17 to 20): for each row of a segment the sum over experts of the share f of its tokens that
    are sent there, times E / K, and the mean probability P; 1 if all are equal. Unlike Switch's,
    which is computed over a batch, it adds up over micro-batches. "router_z" is the mean of the
    squared logsumexp of the router's logits (ST-MoE, Zoph et al. 2022, arXiv 2202.08906, eq. 5).
    Both see all tokens, padding as well. A weight of 0 leaves a loss out. Affinities are a softmax,
    where DeepSeek-V3 has normalised sigmoids.
    """

    name = "moe"
    citation = """@inproceedings{shazeer2017outrageously,
  title={Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer},
  author={Shazeer, Noam and Mirhoseini, Azalia and Maziarz, Krzysztof and Davis, Andy and
    Le, Quoc and Hinton, Geoffrey and Dean, Jeff},
  booktitle={ICLR}, year={2017}}
@article{gale2022megablocks,
  title={MegaBlocks: Efficient Sparse Training with Mixture-of-Experts},
  author={Gale, Trevor and Narayanan, Deepak and Young, Cliff and Zaharia, Matei},
  journal={arXiv preprint arXiv:2211.15841}, year={2022}}
@article{deepseek2024v3,
  title={DeepSeek-V3 Technical Report}, author={DeepSeek-AI},
  journal={arXiv preprint arXiv:2412.19437}, year={2024}}
@article{zoph2022st,
  title={ST-MoE: Designing Stable and Transferable Sparse Expert Models},
  author={Zoph, Barret and Bello, Irwan and Kumar, Sameer and Du, Nan and Huang, Yanping and
    Dean, Jeff and Shazeer, Noam and Fedus, William},
  journal={arXiv preprint arXiv:2202.08906}, year={2022}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        n_experts: Annotated[int, Ge(1), Le(4096)] = 8,
        top_k: Annotated[int, Ge(1)] = 2,
        width: Annotated[int, Ge(1)] | None = None,
        normalise: bool = True,
        balance_weight: Annotated[float, Ge(0)] = 0.01,
        z_weight: Annotated[float, Ge(0)] = 0.001,
    ) -> None:
        super().__init__(dims)
        if top_k > n_experts:
            raise Unsupported(f"moe has {n_experts} experts, of which no token can use {top_k}")
        self.n_experts, self.top_k, self.normalise = n_experts, top_k, normalise
        self.router = Router(dims.d_model, n_experts, bias=False)
        self.experts = Experts(n_experts, dims.d_model, width or max(dims.d_ffn // top_k, 1))
        weights = {BALANCE: balance_weight, Z: z_weight}
        self.loss_weights = {name: weight for name, weight in weights.items() if weight}
        stored = sum(weight.numel() for weight in self.experts.parameters())
        self.inactive_parameters = stored // n_experts * (n_experts - top_k)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State, context: LayerContext
    ) -> LayerOutput:
        """[B, T, M] -> [B, T, M], without state."""
        routing = self.route(x)
        out = self.apply_experts(x.flatten(0, 1), routing.expert.flatten())  # [B T, K, M]
        out = (out * routing.gate.flatten(0, 1)[..., None]).sum(1).to(out.dtype)
        return LayerOutput(out.view(x.shape), losses=self.losses(routing))

    def route(self, x: Tensor) -> Routing:
        """Choose the experts of tokens x [B, T, M]."""
        logits = self.router(x)
        affinity = logits.softmax(-1)
        gate, expert = affinity.topk(self.top_k, dim=-1)
        if self.normalise:
            gate = gate / gate.sum(-1, keepdim=True)
        return Routing(logits, affinity, expert, gate)

    def apply_experts(self, x: Tensor, expert: Tensor) -> Tensor:
        """Apply to rows x [N, M] their experts [N K]: -> [N, K, M]. Rows are copied before they
        are sorted, so that gradients of the copies are added in a fixed order.
        """
        expert, order = expert.sort(stable=True)
        copies = x[:, None].expand(-1, self.top_k, -1).flatten(0, 1)
        out = self.experts(copies.index_select(0, order), expert)
        return out.index_select(0, order.argsort()).view(x.shape[0], self.top_k, -1)

    def losses(self, routing: Routing) -> Mapping[str, LossSum]:
        """The loss terms, sums over rows and over tokens."""
        rows, length, _ = routing.logits.shape
        losses = {}
        if BALANCE in self.loss_weights:
            numbers = torch.arange(self.n_experts, device=routing.expert.device)
            chosen = (routing.expert[..., None] == numbers).sum((1, 2))  # [B, E] tokens
            sums = (chosen * routing.affinity.mean(1)).sum()  # of f and P, but for a factor
            balance = sums * (self.n_experts / (self.top_k * length))
            losses[BALANCE] = LossSum(balance, chosen.new_full((), rows))
        if Z in self.loss_weights:
            z = routing.logits.logsumexp(-1).square().sum()
            losses[Z] = LossSum(z, routing.expert.new_full((), rows * length))
        return losses

    def loss_count(self, name: str, batch: Batch) -> Tensor:
        """Rows, or tokens."""
        rows, length = batch.inputs.shape
        return batch.inputs.new_full((), rows if name == BALANCE else rows * length)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the mixture of experts."""
    return [MixtureOfExperts]
