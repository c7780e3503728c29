"""Any ``torch.optim.Optimizer`` of an installed package, and some of pytorch_optimizer by name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.optimizer import require_bounds
from lswt_core.plugin_api.wrapped_optimizer import WrappedOptimizer, library_class, with_tuples

LIBRARY = "pytorch_optimizer"


class TorchOptimizer(WrappedOptimizer, Optimizer):
    """An optimizer class of torch or of another installed package.

    ``cls`` is "package.module:Class", e.g. "torch.optim:NAdam"; it must be a subclass of
    ``torch.optim.Optimizer``. ``arguments`` are its other keyword arguments; lists become tuples
    (``betas = [0.9, 0.95]``). Check one that is not torch's own with ``lswt plugins check
    lswt_torch_optim --option cls=...``.
    """

    name = "torch"
    citation = """@inproceedings{paszke2019pytorch,
  title={PyTorch: An Imperative Style, High-Performance Deep Learning Library},
  author={Paszke, Adam and Gross, Sam and Massa, Francisco and others},
  booktitle={NeurIPS}, year={2019}}"""

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        cls: str = "torch.optim:NAdam",
        lr: Annotated[float, Gt(0)] = 1e-3,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        require_bounds(type(self), lr=lr, weight_decay=weight_decay)
        given = with_tuples(arguments or {})
        super().__init__(groups, find_class(cls), lr=lr, weight_decay=weight_decay, **given)


class Soap(WrappedOptimizer, Optimizer):
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv
    2409.11321), as pytorch_optimizer has it. The first update only prepares the preconditioner.
    """

    name = "soap"
    libraries = (LIBRARY,)
    citation = """@article{vyas2024soap,
  title={SOAP: Improving and Stabilizing Shampoo using Adam},
  author={Vyas, Nikhil and Morwani, Depen and Zhao, Rosie and Kwun, Mujin and Shapira, Itai and
    Brandfonbrener, David and Janson, Lucas and Kakade, Sham},
  journal={arXiv preprint arXiv:2409.11321}, year={2024}}"""

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        lr: Annotated[float, Gt(0)] = 3e-3,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.95,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.95,
        weight_decay: Annotated[float, Ge(0)] = 0.01,
        precondition_frequency: Annotated[int, Ge(1)] = 10,
        max_precondition_dim: Annotated[int, Ge(1)] = 10_000,
    ) -> None:
        require_bounds(type(self), lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        require_bounds(
            type(self),
            precondition_frequency=precondition_frequency,
            max_precondition_dim=max_precondition_dim,
        )
        super().__init__(
            groups,
            library_class(self, LIBRARY, "SOAP"),
            lr=lr,
            betas=(beta1, beta2),
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            max_precondition_dim=max_precondition_dim,
        )


class AdEMAMix(WrappedOptimizer, Optimizer):
    """AdEMAMix: Adam with a second, slow average of gradients (Pagliardini et al. 2024, arXiv
    2409.03137), as pytorch_optimizer has it. ``alpha`` and ``beta3`` reach their values over
    ``warmup_steps`` updates; 0: at once.
    """

    name = "ademamix"
    libraries = (LIBRARY,)
    citation = """@article{pagliardini2024ademamix,
  title={The AdEMAMix Optimizer: Better, Faster, Older},
  author={Pagliardini, Matteo and Ablin, Pierre and Grangier, David},
  journal={arXiv preprint arXiv:2409.03137}, year={2024}}"""

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        lr: Annotated[float, Gt(0)] = 1e-3,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
        beta3: Annotated[float, Ge(0), Lt(1)] = 0.9999,
        alpha: Annotated[float, Ge(0)] = 5.0,
        warmup_steps: Annotated[int, Ge(0)] = 0,
        weight_decay: Annotated[float, Ge(0)] = 0.1,
    ) -> None:
        require_bounds(type(self), lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        require_bounds(type(self), beta3=beta3, alpha=alpha, warmup_steps=warmup_steps)
        super().__init__(
            groups,
            library_class(self, LIBRARY, "AdEMAMix"),
            lr=lr,
            betas=(beta1, beta2, beta3),
            alpha=alpha,
            t_alpha_beta3=warmup_steps or None,
            weight_decay=weight_decay,
            weight_decouple=True,
        )


class Mars(WrappedOptimizer, Optimizer):
    """MARS-AdamW: AdamW on variance-reduced gradients (Yuan et al. 2024, arXiv 2411.10438), as
    pytorch_optimizer has it: the approximate form, which needs no second gradient, for all
    parameters.
    """

    name = "mars"
    libraries = (LIBRARY,)
    citation = """@article{yuan2024mars,
  title={MARS: Unleashing the Power of Variance Reduction for Training Large Models},
  author={Yuan, Huizhuo and Liu, Yifeng and Wu, Shuang and Zhou, Xun and Gu, Quanquan},
  journal={arXiv preprint arXiv:2411.10438}, year={2024}}"""

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        lr: Annotated[float, Gt(0)] = 3e-3,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.95,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.99,
        gamma: Annotated[float, Ge(0)] = 0.025,
        weight_decay: Annotated[float, Ge(0)] = 0.1,
    ) -> None:
        require_bounds(type(self), lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        require_bounds(type(self), gamma=gamma)
        super().__init__(
            groups,
            library_class(self, LIBRARY, "MARS"),
            lr=lr,
            betas=(beta1, beta2),
            gamma=gamma,
            weight_decay=weight_decay,
            weight_decouple=True,
            optimize_1d=True,  # lr_1d would not follow the schedule
        )


class CautiousLion(WrappedOptimizer, Optimizer):
    """C-Lion: Lion that leaves out coordinates whose update and gradient differ in sign (Liang et
    al. 2024, arXiv 2411.16085), as pytorch_optimizer has it.
    """

    name = "cautious-lion"
    libraries = (LIBRARY,)
    citation = """@article{liang2024cautious,
  title={Cautious Optimizers: Improving Training with One Line of Code},
  author={Liang, Kaizhao and Chen, Lizhang and Liu, Bo and Liu, Qiang},
  journal={arXiv preprint arXiv:2411.16085}, year={2024}}"""

    def __init__(
        self,
        groups: Iterable[Any],
        *,
        lr: Annotated[float, Gt(0)] = 1e-4,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.99,
        weight_decay: Annotated[float, Ge(0)] = 0.1,
    ) -> None:
        require_bounds(type(self), lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        super().__init__(
            groups,
            library_class(self, LIBRARY, "Lion"),
            lr=lr,
            betas=(beta1, beta2),
            weight_decay=weight_decay,
            weight_decouple=True,
            cautious=True,
        )


def find_class(path: str) -> Any:
    """The optimizer class of "package.module:Class". Raises ValueError for anything else."""
    module, _, name = path.partition(":")
    try:
        optimizer = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cls = {path!r}: {error}; write e.g. 'torch.optim:NAdam', of an installed package"
        ) from error
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise ValueError(f"cls = {path!r} is no subclass of torch.optim.Optimizer")
    return optimizer


@hookimpl
def lswt_components() -> list[type]:
    """Offer optimizers of other packages."""
    return [TorchOptimizer, Soap, AdEMAMix, Mars, CautiousLion]
