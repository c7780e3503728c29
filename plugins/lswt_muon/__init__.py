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
    """``m = mu m + (1-mu) g; p -= lr scale NS(m)`` after decoupled decay, NS the momentum with its
    singular values brought near 1 by ``ns_steps`` Newton-Schulz iterations in bfloat16, (1-mu) g +
    mu m in m's place with ``nesterov`` (Jordan et al. 2024).

    Hidden matrices are those a group lists in ``matrices``: the weights of all linear layers of the
    blocks. Embeddings, the projections to and from the vocabulary, norms, biases and registers are
    AdamW's, at ``adamw_lr``; so is all of a group that lists none. ``scale`` "original" is
    sqrt(max(1, rows / columns)), "match_rms_adamw" 0.2 sqrt(max(rows, columns)), at which AdamW's
    rate and decay can be kept (Liu et al. 2025, arXiv 2502.16982). ``eps`` bounds both
    denominators. A gated layer's fc1 holds value and gate in one matrix, and is orthogonalised as
    one.
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
        # hidden matrices first
        divided = sorted(divide(groups), key=lambda group: not group["hidden"])
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        for group in divided:
            self._take(group)
        defaults = {
            key: value for part in self._parts.values() for key, value in part.defaults.items()
        }
        super().__init__(
            [group for part in self._parts.values() for group in part.param_groups], defaults
        )

    def _take(self, group: dict[str, Any]) -> dict[str, Any]:
        """Give a divided group to the optimizer of its kind; returns the group with that one's
        options.
        """
        hidden: bool = group["hidden"]
        if hidden in self._parts:
            self._parts[hidden].add_param_group(group)
        else:
            kind: Any = torch.optim.Muon if hidden else torch.optim.AdamW
            self._parts[hidden] = kind([group], **self._options[hidden])
        taken: dict[str, Any] = self._parts[hidden].param_groups[-1]
        return taken

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a new group is divided as those of the constructor are."""
        if "hidden" in param_group:  # it is divided already
            super().add_param_group(param_group)
            return
        for group in divide([param_group]):
            super().add_param_group(self._take(group))

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
    given = list(groups)  # of tensors, (name, tensor) or dicts
    for group in given if given and isinstance(given[0], dict) else [{"params": given}]:
        matrices = set(group.get("matrices", ()))
        rest = {
            key: value for key, value in group.items() if key not in ("params", "names", "matrices")
        }
        if not matrices:
            yield {key: value for key, value in group.items() if key != "matrices"} | {
                "hidden": False
            }
            continue
        params = list(group["params"])
        named = (
            params
            if isinstance(params[0], tuple)
            else list(zip(group["names"], params, strict=True))
        )
        for hidden in (True, False):
            chosen = {name: p for name, p in named if (name in matrices) is hidden}
            if chosen:
                label = "hidden matrices" if hidden else group.get("name", "other parameters")
                yield rest | {
                    "name": label,
                    "params": list(chosen.values()),
                    "names": list(chosen),
                    "hidden": hidden,
                }


@hookimpl
def lswt_components() -> list[type]:
    """Offer Muon."""
    return [Muon]
