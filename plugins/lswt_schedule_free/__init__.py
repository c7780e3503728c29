"""AdamW that needs no falling rate, because the weights it is judged by are an average (Defazio et
al. 2024, arXiv 2405.15682).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt

from lswt_core.errors import PluginError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.optimizer import require_bounds


class ScheduleFree(Optimizer):
    """AdamWScheduleFree of the authors' package: ``y = (1-b1) z + b1 x; z -= lr g(y) / (sqrt(v) +
    eps); x = (1-c) x + c z``, with c the step's share of all squared peak rates so far (eq. 3 to 5
    and Algorithm 1); decay is taken at y.

    Gradients and the training loss are at y. Evaluations, samples and the model in a checkpoint are
    at x, the average, which ``averaged`` puts in place; y goes into the checkpoint beside z, so
    that a resumed run goes on from the same bits. It means to be used with ``schedule.use =
    "constant"`` and a warm-up.
    """

    name = "schedule-free"
    libraries = ("schedulefree",)
    citation = """@inproceedings{defazio2024road,
  title = {The Road Less Scheduled},
  author = {Defazio, Aaron and Yang, Xingyu Alice and Mehta, Harsh and Mishchenko, Konstantin and Khaled, Ahmed and Cutkosky, Ashok},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  note = {arXiv 2405.15682}
}"""

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        lr: Annotated[float, Gt(0)] = 2.5e-3,
        beta1: Annotated[float, Gt(0), Lt(1)] = 0.9,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
        eps: Annotated[float, Gt(0)] = 1e-8,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
    ) -> None:
        try:
            from schedulefree import AdamWScheduleFree
        except ImportError as error:
            raise PluginError(
                f"optimizer {self.name!r} needs a missing package ({error}): pip install"
                " 'lswt-core[optimizers]'"
            ) from error
        require_bounds(
            type(self), lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay
        )
        self._inner = AdamWScheduleFree(
            groups, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay
        )
        super().__init__(self._inner.param_groups, self._inner.defaults)
        self._stand_at_y()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the new parameters are y, like all others."""
        super().add_param_group(param_group)
        self._stand_at_y()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        return self._linked().step(closure)

    @contextmanager
    def eval_parameters(self) -> Iterator[None]:
        """Parameters are x; on leaving they are y again, to the bit."""
        kept = [p for group in self.param_groups for p in group["params"] if p in self.state]
        for p in kept:
            self.state[p]["y"] = p.detach().clone()
        self._linked().eval()
        try:
            yield
        finally:
            self._return_to_y()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; one that was saved inside of ``averaged`` brings its y, which
        becomes the parameters.
        """
        super().load_state_dict(state_dict)
        self._return_to_y()

    def _linked(self) -> Any:
        """The package's optimizer on our state; a loaded state is another object."""
        self._inner.state, self._inner.param_groups = self.state, self.param_groups
        return self._inner

    @torch.no_grad()
    def _return_to_y(self) -> None:
        for p, state in self.state.items():
            if "y" in state:
                p.copy_(state.pop("y"))
        self._stand_at_y()

    def _stand_at_y(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True


@hookimpl
def lswt_components() -> list[type]:
    """Offer Schedule-Free AdamW."""
    return [ScheduleFree]
