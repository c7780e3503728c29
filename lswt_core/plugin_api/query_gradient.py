"""The gradient of queries alone, for keys and values that need none, as a memory's: three of the
five matrix products of a fused backward pass, which computes those of keys and values as well.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from lswt_core.interfaces import Unsupported
from lswt_core.plugin_api.attention import softmax_scale
from lswt_core.plugin_api.attention_merge import BackwardInputs, Gradients, Kernel
from lswt_core.plugin_api.operators import operator_name

WITH_TRITON = "with Triton's dQ"  # what a kernel's name is followed by
NARROWEST = 16  # of the matrices that Triton multiplies


class QueryGradient(Kernel):
    """A kernel whose gradient of queries alone is Triton's. Raises ImportError, in the backward
    pass, where triton is missing.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.soft_cap = kernel, kernel.soft_cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        return self.kernel.forward(q, k, v, causal)

    def backward(self, inputs: BackwardInputs) -> Gradients:
        """See Kernel."""
        return self.kernel.backward(inputs)

    def query_gradient(self, inputs: BackwardInputs) -> Tensor:
        """See Kernel. A causal block is left to the kernel: remembered keys are visible to all
        queries.
        """
        *tensors, causal = inputs
        if causal:
            return self.kernel.query_gradient(inputs)
        return differentiate_queries(*tensors, self.soft_cap)


class Launch(NamedTuple):
    """Tiles of queries and keys, and how Triton runs a pair of them."""

    queries: int
    keys: int
    warps: int
    stages: int  # tiles of keys in shared memory at once


# By bytes of a number and largest head width: what compiles for sm_80 to sm_120 within a block's
# shared memory (99 KB on the smallest), in half precision with no register spilled, in float32 with
# few. Fixed, because Triton's autotuning waits for the device, and could choose, and so round,
# differently from run to run.
LAUNCHES = {
    2: {64: Launch(128, 64, 8, 3), 128: Launch(128, 32, 8, 3), 256: Launch(64, 16, 8, 2)},
    4: {64: Launch(64, 16, 4, 2), 128: Launch(32, 32, 8, 2)},
}


def launch_for(dtype: torch.dtype, width: int) -> Launch:
    """How the kernel is run for a head width. Raises Unsupported for wider heads or dtypes than
    there are tiles for.
    """
    for widest, launch in LAUNCHES.get(dtype.itemsize, {}).items():
        if width <= widest:
            return launch
    raise Unsupported(
        "gradients of queries alone are computed for heads up to 256 wide in float16 and bfloat16"
        f" and up to 128 in float32, not for {width} in {dtype}"
    )


@library.custom_op(operator_name(__name__, "query_gradient"), mutates_args=())
def differentiate_queries(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    soft_cap: float,
) -> Tensor:
    """As ``Kernel.query_gradient`` of a block that is not causal. An operator, because
    torch.compile need not look into a kernel that it cannot fuse with anything.
    """
    grad, q, k, v, out = map(with_dense_rows, (grad, q, k, v, out))
    rows, n_queries, n_heads, width = q.shape
    n_keys, groups = k.shape[1:3]
    dq = q.new_empty(q.shape)
    launch = launch_for(q.dtype, width)
    tensors = (grad, q, k, v, out, logsumexp, dq)
    # by name: the code that goes with an exported model does without triton
    module = import_module("lswt_core.plugin_api.query_gradient_kernel")
    module.query_gradient_kernel[(-(-n_queries // launch.queries) * rows * n_heads,)](
        *tensors,
        *(tensor.stride()[:3] for tensor in tensors),
        n_queries,
        n_keys,
        n_heads,
        n_heads // groups,
        softmax_scale(q),
        soft_cap,
        WIDTH=width,
        PADDED=max(NARROWEST, 1 << (width - 1).bit_length()),
        TILE_Q=launch.queries,
        TILE_K=launch.keys,
        CAPPED=soft_cap > 0,
        WHOLE_TILES=n_keys % launch.keys == 0,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return dq


@differentiate_queries.register_fake
def query_gradient_shape(grad: Tensor, q: Tensor, *_: Any) -> Tensor:
    """Shape and dtype of the result."""
    return q.new_empty(q.shape)


def with_dense_rows(tensor: Tensor) -> Tensor:
    """A tensor whose last dimension is contiguous; the others may be strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
