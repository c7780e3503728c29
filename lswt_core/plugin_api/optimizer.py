"""For optimizers: state in full precision that survives saving, and updates of parameters in
buckets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.compilation import raise_recompile_limit
from lswt_core.plugin_api.sharded_tensor import local_tensor

BUCKET = 1 << 24  # elements, 64 MB in float32: enough to keep any device busy
BUCKET_CPU = 1 << 18  # all that an update of so many touches stays in a core's cache
GROUP_NUMBERS = ("lr", "weight_decay")  # of a parameter group, that compiled code takes as tensors


class ParameterSlice(NamedTuple):
    """A parameter, or a flat slice of it, with its gradient and state."""

    p: Tensor
    gradient: Tensor
    state: dict[str, Any]


class BucketOptimizer(Optimizer, ABC):
    """An optimizer whose update is element-wise: it is given parameters, or flat slices of them, in
    buckets of about equal size.

    Moments (Adam's first and second moment, a momentum) are created by ``zeros``; ``moments`` may
    store them in a narrower dtype than they are computed in.
    """

    moments: torch.dtype = torch.float32
    # ``update_wide`` as compiled code, once ``compile_update`` was called
    compiled_update: Callable[[dict[str, Any], list[ParameterSlice]], None] | None = None

    @abstractmethod
    def prepare(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """Return a parameter's state, created at its first step, with its step counters advanced.
        Called once a step.
        """

    @abstractmethod
    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        """Update parameters and the moments in their states in place; gradients and moments are in
        float32 or wider.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            slices: list[ParameterSlice] = []
            for p in group["params"]:
                if p.grad is not None:
                    slices += split_for_cache(self.local_slice(group, p, p.grad))
            for bucket in group_into_buckets(slices):
                self.update_bucket(group, bucket)
        return loss

    def compile_update(self) -> None:
        """For ``compile_kernels`` of an optimizer whose ``update`` reads no numbers that change but
        ``group["lr"]``: compile it, one pass over memory instead of one an operation. ``update``
        then gets 0-dim tensors on the CPU as ``group["lr"]`` and ``group["weight_decay"]``, since
        compiled code would be made anew for every number.
        """
        self.compiled_update = torch.compile(
            self.update_wide, fullgraph=True, dynamic=False, **raise_recompile_limit()
        )

    def update_bucket(self, group: dict[str, Any], slices: list[ParameterSlice]) -> None:
        """Update a bucket, by compiled code if there is any."""
        if self.compiled_update is None:
            self.update_wide(group, slices)
            return
        numbers = {key: torch.tensor(group[key], dtype=torch.float64) for key in GROUP_NUMBERS}
        detached = [one._replace(p=one.p.detach()) for one in slices]
        self.compiled_update(numbers, detached)

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, without compiled code."""
        return super().__getstate__() | {"compiled_update": None}

    def local_slice(self, group: dict[str, Any], p: Tensor, gradient: Tensor) -> ParameterSlice:
        """The piece of a parameter that this rank holds, with those of its gradient and moments."""
        state = self.prepare(group, p)
        pieces = {
            key: local_tensor(value) if isinstance(value, Tensor) else value
            for key, value in state.items()
        }
        return ParameterSlice(local_tensor(p), local_tensor(gradient), pieces)

    def update_wide(self, group: dict[str, Any], slices: list[ParameterSlice]) -> None:
        """Call ``update`` with gradients and moments in float32 or wider, and store the moments."""
        wide = [{key: widen_moment(value) for key, value in one.state.items()} for one in slices]
        gradients = [
            one.gradient.to(torch.promote_types(one.gradient.dtype, torch.float32))
            for one in slices
        ]
        self.update(group, [one.p for one in slices], gradients, wide)
        for one, state in zip(slices, wide, strict=True):
            for key, value in one.state.items():
                if isinstance(value, Tensor) and state[key] is not value:
                    value.copy_(state[key])

    def zeros(self, p: Tensor) -> Tensor:
        """A moment's initial value: zeros of p's shape, in float32 or wider unless ``moments`` says
        otherwise.
        """
        dtype = self.moments
        if dtype == torch.float32:
            dtype = torch.promote_types(p.dtype, torch.float32)
        return torch.zeros_like(p, dtype=dtype)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ValueError for an option that cannot differ between groups."""
        options = get_type_hints(type(self).__init__).keys() - {"groups", "return"}
        common = options - self.defaults.keys()
        if given := sorted(common & param_group.keys()):
            raise ValueError(
                f"optimizer {self.name!r} has one {' and one '.join(given)} for all parameters,"
                " none by group"
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtype; torch casts it to the parameters'."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    self.state[p][key] = value.to(p.device) if isinstance(value, Tensor) else value


def require_bounds(optimizer: type[Optimizer], **options: float) -> None:
    """Raise ValueError for an option outside of the bounds in its annotation, as torch's optimizers
    do for theirs.
    """
    hints = get_type_hints(optimizer.__init__, include_extras=True)
    for name, value in options.items():
        for bound in getattr(hints.get(name), "__metadata__", ()):
            if not satisfies(value, bound):
                raise ValueError(
                    f"invalid {name} of optimizer {optimizer.name!r}: {value}, but it has {bound}"
                )


def satisfies(value: Any, bound: Any) -> bool:
    """Whether a number is within a bound; NaN never is."""
    match bound:
        case Gt(gt=limit):
            return bool(value > limit)
        case Ge(ge=limit):
            return bool(value >= limit)
        case Lt(lt=limit):
            return bool(value < limit)
        case Le(le=limit):
            return bool(value <= limit)
    raise TypeError(f"{bound} is no bound of a number")


def add_scaled_(
    targets: list[Tensor], values: tuple[Tensor, ...] | list[Tensor], factor: float | Tensor
) -> None:
    """Add ``values`` times a factor to ``targets``; a tensor [] overwrites the values."""
    if isinstance(factor, Tensor):
        torch._foreach_mul_(values, factor)
        torch._foreach_add_(targets, values)
    else:
        torch._foreach_add_(targets, values, alpha=factor)


def cast_like(values: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Cast every value to its target's dtype."""
    return [value.to(target.dtype) for value, target in zip(values, targets, strict=True)]


def widen_moment(value: Any) -> Any:
    """Cast a bfloat16 or float16 tensor to float32; return anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


def split_for_cache(whole: ParameterSlice) -> Iterator[ParameterSlice]:
    """Split a parameter on a CPU into slices that fit a core's cache, if it and its state are
    contiguous; yield any other whole.
    """
    moments = {
        key: value
        for key, value in whole.state.items()
        if isinstance(value, Tensor) and value.shape == whole.p.shape
    }
    tensors = (whole.p, whole.gradient, *moments.values())
    fits = whole.p.device.type != "cpu" or whole.p.numel() <= BUCKET_CPU
    if fits or not all(tensor.is_contiguous() for tensor in tensors):
        yield whole
        return
    columns = [tensor.view(-1).split(BUCKET_CPU) for tensor in tensors]
    for p, gradient, *rest in zip(*columns, strict=True):
        yield ParameterSlice(p, gradient, whole.state | dict(zip(moments, rest, strict=True)))


def group_into_buckets(slices: Sequence[ParameterSlice]) -> Iterator[list[ParameterSlice]]:
    """Group slices into buckets of about BUCKET elements, so that an update's temporaries stay
    small.
    """
    bucket: list[ParameterSlice] = []
    for one in slices:
        bucket.append(one)
        limit = BUCKET_CPU if one.p.device.type == "cpu" else BUCKET
        if sum(member.p.numel() for member in bucket) >= limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
