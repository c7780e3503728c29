"""Compile the kernel of queries' gradients for GPUs, without one, and print as JSON what each
takes: shared memory of a block and, of a thread, registers and memory for those that do not fit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from lswt_core.plugin_api import query_gradient_kernel
from lswt_core.plugin_api.query_gradient import differentiate_queries

# The head's width, the number of keys, which tiles divide or do not, and a cap.
CASES = (
    (torch.bfloat16, 64, 256, 0.0),
    (torch.bfloat16, 64, 257, 15.0),
    (torch.bfloat16, 256, 256, 0.0),
    (torch.float16, 128, 257, 15.0),
    (torch.float32, 64, 256, 0.0),
    (torch.float32, 128, 257, 15.0),
)


class Driver:
    """What Triton asks of a device before it launches a kernel."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiling:
    """Compiles a kernel for the arguments it is called with, and keeps it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.compiled = kernel, None

    def __getitem__(self, grid: tuple[int]) -> Any:
        def compile_only(*arguments: Any, **options: Any) -> None:
            self.compiled = self.kernel.warmup(*arguments, grid=grid, **options)

        return compile_only


def differentiate(dtype: torch.dtype, width: int, keys: int, cap: float) -> None:
    """Call the operator as a memory of grouped heads does."""
    q, k = (
        torch.empty(2, size, heads, width, dtype=dtype) for size, heads in ((256, 4), (keys, 2))
    )
    differentiate_queries(q, q, k, k, q, torch.empty(2, 4, 256), cap)


def resources(binary: bytes) -> dict[str, int]:
    """REG and STACK of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}


def main(arch: int) -> None:
    """All cases for one architecture."""
    triton.runtime.driver.set_active(Driver(arch))
    kernel = Compiling(query_gradient_kernel.query_gradient_kernel)
    query_gradient_kernel.query_gradient_kernel = kernel
    for case in CASES:
        differentiate(*case)
        usage = resources(kernel.compiled.asm["cubin"])
        print(json.dumps({"case": str(case), "SHARED": kernel.compiled.metadata.shared, **usage}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
