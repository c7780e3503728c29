"""Muon for hidden matrices and AdamW for everything else, both torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.optimizer import require_bounds


class Muon(Optimizer):
    """``m = mu m + (1-mu) g; p -= lr scale NS(m)`` after decoupled weight decay; with ``nesterov``,
    NS((1-mu) g + mu m). NS orthogonalises: ``ns_steps`` Newton-Schulz iterations in bfloat16 bring
    singular values near 1 (Jordan et al. 2024).

    Hidden matrices are those a group lists in ``matrices``: the weights of the linear layers of all
    blocks. Embeddings, the projections to and from the vocabulary, norms, biases and registers are
    updated by AdamW at ``adamw_lr``; so is a group that lists no matrices. ``scale`` "original" is
    sqrt(max(1, rows / columns)), "match_rms_adamw" is 0.2 sqrt(max(rows, columns)), with which
    AdamW's learning rate and weight decay can be reused (Liu et al. 2025, arXiv 2502.16982).
    ``eps`` is in both denominators. A gated layer's fc1 holds value and gate in one matrix, and is
    orthogonalised as one.
    """

    name = "muon"
    unit = "matrix"
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
        self._options: dict[bool, dict[str, Any]] = {
            True: {"lr": lr, **muon, **common},
            False: {"lr": adamw_lr, "betas": (adamw_beta1, adamw_beta2), **common},
        }
        # By whether the parameters are hidden matrices: torch's Muon, torch's AdamW.
        self._optimizers: dict[bool, torch.optim.Optimizer] = {}
        for group in sorted(split_groups(groups), key=lambda group: not group["hidden"]):
            self._assign(group)
        all_groups: list[dict[str, Any]] = []
        defaults: dict[str, Any] = {}
        for optimizer in self._optimizers.values():
            all_groups += optimizer.param_groups
            defaults |= optimizer.defaults
        super().__init__(all_groups, defaults)

    def _assign(self, group: dict[str, Any]) -> dict[str, Any]:
        """Add a group to torch's Muon or AdamW; returns it with that optimizer's options."""
        hidden: bool = group["hidden"]
        if hidden in self._optimizers:
            self._optimizers[hidden].add_param_group(group)
        else:
            optimizer: Any = torch.optim.Muon if hidden else torch.optim.AdamW
            self._optimizers[hidden] = optimizer([group], **self._options[hidden])
        complete: dict[str, Any] = self._optimizers[hidden].param_groups[-1]
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
        for hidden, optimizer in self._optimizers.items():
            # load_state_dict replaces state and groups
            optimizer.state = self.state
            optimizer.param_groups = [
                group for group in self.param_groups if group["hidden"] is hidden
            ]
            optimizer.step()
        return loss


def split_groups(groups: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Split every group into its hidden matrices and its other parameters. Groups are dicts; a list
    of tensors or of (name, tensor) is one group.
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
    for hidden in (True, False):
        chosen = {name: p for name, p in named if (name in matrices) is hidden}
        label = "hidden matrices" if hidden else group.get("name", "other parameters")
        if chosen:
            yield options | {
                "name": label,
                "params": list(chosen.values()),
                "names": list(chosen),
                "hidden": hidden,
            }


@hookimpl
def lswt_components() -> list[type]:
    """Offer Muon."""
    return [Muon]
