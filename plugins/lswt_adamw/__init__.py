"""AdamW, the baseline of every comparison of optimizers (Loshchilov and Hutter 2019, arXiv
1711.05101).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.optimizer import require_bounds


class AdamW(Optimizer, torch.optim.AdamW):
    """torch's own AdamW. ``fused`` updates all parameters in one kernel; false runs one kernel an
    operation.
    """

    name = "adamw"
    citation = """@inproceedings{loshchilov2019decoupled,
  title = {Decoupled Weight Decay Regularization},
  author = {Loshchilov, Ilya and Hutter, Frank},
  booktitle = {International Conference on Learning Representations},
  year = {2019},
  note = {arXiv 1711.05101}
}"""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: Annotated[float, Gt(0)] = 3e-4,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.95,
        eps: Annotated[float, Gt(0)] = 1e-8,
        weight_decay: Annotated[float, Ge(0)] = 0.1,
        fused: bool = True,
    ) -> None:
        require_bounds(
            type(self), lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay
        )
        groups = list(groups)
        on_meta = any(parameter.is_meta for parameter in parameters_of(groups))
        super().__init__(
            groups,
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            weight_decay=weight_decay,
            fused=fused and not on_meta,  # torch refuses fused kernels on the meta device
        )


def parameters_of(groups: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The parameters of groups, which are dicts, tensors or (name, tensor)."""
    for group in groups:
        for parameter in group["params"] if isinstance(group, dict) else [group]:
            yield parameter[1] if isinstance(parameter, tuple) else parameter


@hookimpl
def lswt_components() -> list[type]:
    """Offer AdamW."""
    return [AdamW]
