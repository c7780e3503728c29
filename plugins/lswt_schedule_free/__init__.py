"""Schedule-Free AdamW: weight averaging in place of a decaying learning rate (Defazio et al. 2024,
arXiv 2405.15682).
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
    eps); x = (1-c) x + c z``, with c the step's share of the sum of squared learning rates (eq. 3
    to 5 and Algorithm 1); weight decay is taken at y.

    Gradients and the training loss are at y. Evaluation, generation and the model in a checkpoint
    use the average x, which ``eval_parameters`` puts in place; the checkpoint also holds y and z,
    so that a run resumes bitwise. Use it with ``schedule.use = "constant"`` and a warm-up.
    """

    name = "schedule-free"
    libraries = ("schedulefree",)
    citation = """@inproceedings{defazio2024road,
  title = {The Road Less Scheduled},
  author = {Defazio, Aaron and Yang, Xingyu Alice and Mehta, Harsh and Mishchenko, Konstantin and
    Khaled, Ahmed and Cutkosky, Ashok},
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
        self._set_train_mode()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the new parameters are y, like all others."""
        super().add_param_group(param_group)
        self._set_train_mode()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        return self._synced_inner().step(closure)

    @contextmanager
    def eval_parameters(self) -> Iterator[None]:
        """Parameters are x inside, and y again afterwards, bitwise."""
        params = [p for group in self.param_groups for p in group["params"] if p in self.state]
        for p in params:
            self.state[p]["y"] = p.detach().clone()
        self._synced_inner().eval()
        try:
            yield
        finally:
            self._restore_y()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. One saved inside of ``eval_parameters`` contains y, which becomes the
        parameters.
        """
        super().load_state_dict(state_dict)
        self._restore_y()

    def _synced_inner(self) -> Any:
        """The package's optimizer, sharing state and groups, which load_state_dict replaces."""
        self._inner.state, self._inner.param_groups = self.state, self.param_groups
        return self._inner

    @torch.no_grad()
    def _restore_y(self) -> None:
        for p, state in self.state.items():
            if "y" in state:
                p.copy_(state.pop("y"))
        self._set_train_mode()

    def _set_train_mode(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True


@hookimpl
def lswt_components() -> list[type]:
    """Offer Schedule-Free AdamW."""
    return [ScheduleFree]
