"""Parametrisations: how initial values and learning rates depend on a model's width."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Component, Dims, ParameterInfo, Parametrisation, Scaling

Width = Annotated[int, Ge(1)]


class Standard(Parametrisation):
    """The same initial standard deviation, learning rate and weight decay for every width."""

    name = "standard"

    def scaling(self, parameter: ParameterInfo) -> Scaling:
        """1 everywhere."""
        return Scaling()


class MaximalUpdate(Parametrisation):
    """muP, the maximal update parametrisation (Yang et al. 2022, arXiv 2203.03466, table 3), for
    optimizers whose update has the same size whatever the gradient's, as Adam's: the best learning
    rate found at width ``base_d_model`` stays the best at other widths.

    With m = fan-in / fan-in of the base model, a matrix whose fan-in and fan-out both grow with the
    width (hidden) starts at ``init_std / sqrt(m)`` and learns at ``lr / m``; one whose fan-in
    alone grows (to the vocabulary) starts at ``init_std / m`` and learns at ``lr / m``; all others
    are unchanged. The output multiplier of the paper's other tables is folded into initial values
    and learning rates (its lemma J.1). Head width must not change, so attention keeps its scale
    1/sqrt(D). With ``independent_weight_decay``, weight decay grows by m where the learning rate
    falls, so that their product stays (Wortsman et al. 2023, arXiv 2309.14322).
    """

    name = "mup"
    citation = """@article{yang2022tensor,
  title={Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer},
  author={Yang, Greg and Hu, Edward J and Babuschkin, Igor and Sidor, Szymon and Liu, Xiaodong and
    Farhi, David and Ryder, Nick and Pachocki, Jakub and Chen, Weizhu and Gao, Jianfeng},
  journal={arXiv preprint arXiv:2203.03466}, year={2022}}"""

    def __init__(self, *, base_d_model: Width = 256, independent_weight_decay: bool = True) -> None:
        self.base_d_model = base_d_model
        self.independent_weight_decay = independent_weight_decay

    def base_dims(self, dims: Dims) -> Dims:
        """The model of width ``base_d_model``, with heads as wide and as many layers."""
        return narrow(dims, self.base_d_model)

    def scaling(self, parameter: ParameterInfo) -> Scaling:
        """The factors of table 3."""
        if parameter.role != "matrix":
            return Scaling()
        fan_out, fan_in = growth(parameter)
        if fan_in == 1:
            return Scaling()
        init = fan_in**-0.5 if fan_out != 1 else 1 / fan_in
        return Scaling(init, 1 / fan_in, fan_in if self.independent_weight_decay else 1.0)


class Spectral(MaximalUpdate, Parametrisation):
    """The spectral condition for feature learning (Yang, Simon and Bernstein 2023, arXiv
    2310.17813), for Adam-like updates: a matrix and its updates have spectral norms of order
    sqrt(fan-out / fan-in).

    Relative to the base model, the initial standard deviation scales as
    ``min(1, sqrt(fan-out / fan-in)) / sqrt(fan-in)`` and the learning rate as 1 / fan-in. Equal to
    mup where all widths grow alike; it also holds where their proportions change.
    """

    name = "spectral"
    citation = """@article{yang2023spectral,
  title={A Spectral Condition for Feature Learning},
  author={Yang, Greg and Simon, James B and Bernstein, Jeremy},
  journal={arXiv preprint arXiv:2310.17813}, year={2023}}"""

    def __init__(self, *, base_d_model: Width = 256, independent_weight_decay: bool = True) -> None:
        super().__init__(
            base_d_model=base_d_model, independent_weight_decay=independent_weight_decay
        )

    def scaling(self, parameter: ParameterInfo) -> Scaling:
        """The condition's factors for a matrix."""
        if parameter.role != "matrix":
            return Scaling()
        _, fan_in = growth(parameter)
        init = spectral_std(parameter.shape) / spectral_std(parameter.base_shape)
        return Scaling(init, 1 / fan_in, fan_in if self.independent_weight_decay else 1.0)


def growth(parameter: ParameterInfo) -> tuple[float, float]:
    """Fan-out and fan-in of a matrix, each divided by the base model's."""
    fan_out = parameter.shape[-2] / parameter.base_shape[-2]
    return fan_out, parameter.shape[-1] / parameter.base_shape[-1]


def spectral_std(shape: tuple[int, ...]) -> float:
    """The standard deviation at which a random matrix has spectral norm sqrt(fan-out / fan-in), up
    to a constant.
    """
    fan_out, fan_in = shape[-2:]
    return float(min(1.0, (fan_out / fan_in) ** 0.5) * fan_in**-0.5)


def narrow(dims: Dims, d_model: int) -> Dims:
    """The sizes of a model of another width: heads as wide, a feed-forward layer in proportion.
    Raises ValueError if they are no integers.
    """
    n_heads, d_ffn = d_model / dims.d_head, dims.d_ffn * d_model / dims.d_model
    if not (n_heads.is_integer() and n_heads % dims.queries_per_kv == 0 and d_ffn.is_integer()):
        raise ValueError(
            f"a base model of width {d_model} would have {n_heads:g} heads of width {dims.d_head}"
            f" and a feed-forward width of {d_ffn:g}; choose base_d_model so that both are whole"
            " numbers, and heads divisible by the query heads of a key/value head"
        )
    return dims._replace(d_model=d_model, n_heads=int(n_heads), d_ffn=int(d_ffn))


@hookimpl
def lswt_components() -> list[type[Component]]:
    """Offer parametrisations."""
    return [Standard, MaximalUpdate, Spectral]
