"""An optimizer: one of torch's own, with the options a recipe may set."""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer


class Example(Optimizer, torch.optim.NAdam):
    """torch's NAdam with decoupled weight decay. Any torch optimizer can take its place; ``lr``
    is the peak learning rate.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: Annotated[float, Gt(0)] = 1e-3,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.95,
        weight_decay: Annotated[float, Ge(0)] = 0.1,
    ) -> None:
        super().__init__(
            groups,
            lr=lr,
            betas=(beta1, beta2),
            weight_decay=weight_decay,
            decoupled_weight_decay=True,
        )


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
