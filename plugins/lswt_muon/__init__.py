"""Muon for hidden matrices and AdamW for everything else, both torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer


class Muon(Optimizer):
    """``m = mu m + (1-mu) g; p -= lr scale NS(m)`` after decoupled decay, NS the momentum with its singular values brought near 1 by
    ``ns_steps`` Newton-Schulz iterations in bfloat16, (1-mu) g + mu m in m's place with ``nesterov`` (Jordan et al. 2024).

    Hidden matrices are those a group lists in ``matrices``: the weights of all linear layers of the blocks. Embeddings, the
    projections to and from the vocabulary, norms, biases and registers are AdamW's, at ``adamw_lr``; so is all of a group that lists
    none. ``scale`` "original" is sqrt(max(1, rows / columns)), "match_rms_adamw" 0.2 sqrt(max(rows, columns)), at which AdamW's rate
    and decay can be kept (Liu et al. 2025, arXiv 2502.16982). ``eps`` bounds both denominators. A gated layer's fc1 holds value and
    gate in one matrix, and is orthogonalised as one.
    """

    name = "muon"
    citation = """@misc{jordan2024muon,
  title = {Muon: An optimizer for hidden layers in neural networks},
  author = {Jordan, Keller and Jin, Yuchen and Boza, Vlado and You, Jiacheng and Cesista, Franz and Newhouse, Laker and Bernstein, Jeremy},
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
        divided = list(divide(groups))
        hidden, others = ([group for group in divided if group["hidden"] is flag] for flag in (True, False))
        common: dict[str, Any] = {"weight_decay": weight_decay, "eps": eps}
        muon: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": scale}
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        if hidden:
            self._parts[True] = torch.optim.Muon(hidden, lr=lr, **muon, **common)
        if others:
            self._parts[False] = torch.optim.AdamW(others, lr=adamw_lr, betas=(adamw_beta1, adamw_beta2), **common)
        defaults = {key: value for part in self._parts.values() for key, value in part.defaults.items()}
        super().__init__([group for part in self._parts.values() for group in part.param_groups], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for hidden, part in self._parts.items():  # a loaded state brings groups of its own
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["hidden"] is hidden]
            part.step()
        return loss


def divide(groups: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Every group as up to two: its hidden matrices, and its other parameters."""
    given = list(groups)
    for group in given if given and isinstance(given[0], dict) else [{"params": given}]:
        matrices = set(group.get("matrices", ()))
        rest = {key: value for key, value in group.items() if key not in ("params", "names", "matrices")}
        if not matrices:
            yield {key: value for key, value in group.items() if key != "matrices"} | {"hidden": False}
            continue
        named = list(zip(group["names"], group["params"], strict=True))
        for hidden in (True, False):
            chosen = {name: p for name, p in named if (name in matrices) is hidden}
            if chosen:
                label = "hidden matrices" if hidden else group["name"]
                yield rest | {"name": label, "params": list(chosen.values()), "names": list(chosen), "hidden": hidden}


@hookimpl
def lswt_components() -> list[type]:
    """Offer Muon."""
    return [Muon]
