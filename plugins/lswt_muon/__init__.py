"""Muon for hidden matrices and AdamW for everything else, both torch's own but for stacks of
matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.optimizer import require_bounds

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz iteration, torch's defaults


class Muon(Optimizer):
    """``m = mu m + (1-mu) g; p -= lr scale NS(m)`` after decoupled weight decay; with ``nesterov``,
    NS((1-mu) g + mu m). NS orthogonalises: ``ns_steps`` Newton-Schulz iterations in bfloat16 bring
    singular values near 1 (Jordan et al. 2024).

    Hidden matrices are those a group lists in ``matrices``: the weights of the linear layers of all
    blocks, and stacks of matrices [..., rows, columns] (experts), each orthogonalised by itself.
    Embeddings, the projections to and from the vocabulary, norms, biases and registers are
    updated by AdamW at ``adamw_lr``; so is a group that lists no matrices. ``scale`` "original" is
    sqrt(max(1, rows / columns)), "match_rms_adamw" is 0.2 sqrt(max(rows, columns)), with which
    AdamW's learning rate and weight decay can be reused (Liu et al. 2025, arXiv 2502.16982).
    ``eps`` is in both denominators. A gated layer's fc1 holds value and gate in one matrix, and is
    orthogonalised as one.
    """

    name = "muon"
    citation = """@misc{jordan2024muon,
  title = {Muon: An optimizer for hidden layers in neural networks},
  author = {Jordan, Keller and Jin, Yuchen and Boza, Vlado and You, Jiacheng and Cesista, Franz and
    Newhouse, Laker and Bernstein, Jeremy},
  year = {2024},
  url = {https://kellerjordan.github.io/posts/muon/}
}"""

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        lr: Annotated[float, Gt(0)] = 0.02,
        momentum: Annotated[float, Ge(0), Lt(1)] = 0.95,
        nesterov: bool = True,
        ns_steps: Annotated[int, Ge(1), Lt(100)] = 5,
        scale: Literal["original", "match_rms_adamw"] = "original",
        weight_decay: Annotated[float, Ge(0)] = 0.1,
        eps: Annotated[float, Gt(0)] = 1e-8,
        adamw_lr: Annotated[float, Gt(0)] = 3e-4,
        adamw_beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
        adamw_beta2: Annotated[float, Ge(0), Lt(1)] = 0.95,
    ) -> None:
        require_bounds(
            type(self),
            lr=lr,
            momentum=momentum,
            ns_steps=ns_steps,
            weight_decay=weight_decay,
            eps=eps,
        )
        require_bounds(
            type(self), adamw_lr=adamw_lr, adamw_beta1=adamw_beta1, adamw_beta2=adamw_beta2
        )
        common: dict[str, Any] = {"weight_decay": weight_decay, "eps": eps}
        muon: dict[str, Any] = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": scale,
        }
        adamw = {"lr": adamw_lr, "betas": (adamw_beta1, adamw_beta2)}
        self._options: dict[type[torch.optim.Optimizer], dict[str, Any]] = {
            torch.optim.Muon: {"lr": lr, **muon, **common},
            StackedMuon: {"lr": lr, **muon, **common},
            torch.optim.AdamW: {**adamw, **common},
        }
        self._optimizers: dict[type[torch.optim.Optimizer], torch.optim.Optimizer] = {}
        order = list(self._options)
        for group in sorted(split_groups(groups), key=lambda one: order.index(optimizer_of(one))):
            self._assign(group)
        all_groups: list[dict[str, Any]] = []
        defaults: dict[str, Any] = {}
        for optimizer in self._optimizers.values():
            all_groups += optimizer.param_groups
            defaults |= optimizer.defaults
        super().__init__(all_groups, defaults)

    def _assign(self, group: dict[str, Any]) -> dict[str, Any]:
        """Add a group to its optimizer; returns it with that optimizer's options."""
        optimizer: Any = optimizer_of(group)
        if optimizer in self._optimizers:
            self._optimizers[optimizer].add_param_group(group)
        else:
            self._optimizers[optimizer] = optimizer([group], **self._options[optimizer])
        complete: dict[str, Any] = self._optimizers[optimizer].param_groups[-1]
        return complete

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a new group is split as those of the constructor are."""
        if "hidden" in param_group:  # split already
            super().add_param_group(param_group)
            return
        for group in split_groups([param_group]):
            super().add_param_group(self._assign(group))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for kind, optimizer in self._optimizers.items():
            # load_state_dict replaces state and groups
            optimizer.state = self.state
            optimizer.param_groups = [
                group for group in self.param_groups if optimizer_of(group) is kind
            ]
            optimizer.step()
        return loss


class StackedMuon(torch.optim.Optimizer):
    """torch's Muon for stacks of matrices, [..., rows, columns]."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update_stack(parameter, self.state[parameter], group)


def update_stack(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Update one stack by its gradient."""
    gradient, momentum = parameter.grad, group["momentum"]
    assert gradient is not None
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
    buffer: Tensor = state["momentum_buffer"]
    buffer.lerp_(gradient, 1 - momentum)
    update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
    rows, columns = parameter.shape[-2:]
    scale = max(1, rows / columns) ** 0.5
    if group["adjust_lr_fn"] == "match_rms_adamw":
        scale = 0.2 * max(rows, columns) ** 0.5
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    update = orthogonalise(update, group["ns_steps"], group["eps"])
    parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, steps: int, eps: float) -> Tensor:
    """Newton-Schulz iterations as torch's Muon makes them, for every matrix [..., rows, columns] of
    a stack by itself.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.flatten(0, -3).bfloat16()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)


def optimizer_of(group: dict[str, Any]) -> type[torch.optim.Optimizer]:
    """The optimizer of a group that ``split_groups`` made."""
    if not group["hidden"]:
        return torch.optim.AdamW
    return StackedMuon if group["params"][0].ndim > 2 else torch.optim.Muon


def split_groups(groups: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Split every group into its hidden matrices, stacks of these and its other parameters. Groups
    are dicts; a list of tensors or of (name, tensor) is one group.
    """
    groups = list(groups)
    if not groups or not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    for group in groups:
        matrices = set(group.get("matrices", ()))
        if matrices:
            yield from split_group(group, matrices)
        else:
            options = {key: value for key, value in group.items() if key != "matrices"}
            yield options | {"hidden": False}


def split_group(group: dict[str, Any], matrices: set[str]) -> Iterator[dict[str, Any]]:
    """Split a group whose hidden matrices have these names; a group of neither is left out."""
    params = list(group["params"])
    named = params
    if not isinstance(params[0], tuple):
        named = list(zip(group["names"], params, strict=True))
    separate = ("params", "names", "matrices")
    options = {key: value for key, value in group.items() if key not in separate}
    kinds = {
        (True, False): "hidden matrices",
        (True, True): "stacks of hidden matrices",
        (False, False): group.get("name", "other parameters"),
    }
    for kind, label in kinds.items():
        chosen = {name: p for name, p in named if kind_of(p, name in matrices) == kind}
        if chosen:
            yield options | {
                "name": label,
                "params": list(chosen.values()),
                "names": list(chosen),
                "hidden": kind[0],
            }


def kind_of(parameter: Tensor, hidden: bool) -> tuple[bool, bool]:
    """Whether a parameter is hidden matrices, and whether it is a stack of them."""
    return hidden, hidden and parameter.ndim > 2


@hookimpl
def lswt_components() -> list[type]:
    """Offer Muon."""
    return [Muon]
