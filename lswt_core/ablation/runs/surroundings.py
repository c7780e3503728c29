"""What of this machine, and of the environment that a run inherits, its numbers depend on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lswt_core.errors import UsageError

# Environment variables with these prefixes configure libraries that compute. In doubt a run is made
# again.
PREFIXES = (
    "ATEN_",
    "BLIS_",
    "CUBLAS",
    "CUDA_",
    "CUDNN_",
    "DNNL_",
    "GOMP_",
    "HIP",
    "HSA_",
    "KMP_",
    "LSWT_",
    "MIOPEN_",
    "MKL_",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "PYTORCH_",
    "ROCBLAS_",
    "TORCH",
    "TRITON_",
    "VECLIB_",
)
NAMES = ("GLIBC_TUNABLES", "LD_PRELOAD", "NVIDIA_TF32_OVERRIDE")
# These say where files lie, what is printed, or which devices there are, and the runner itself sets
# OMP_NUM_THREADS, which counts as threads.
WITHOUT_EFFECT = {
    "CUDA_CACHE_PATH",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "LSWT_CACHE_DIR",
    "OMP_DISPLAY_ENV",
    "OMP_NUM_THREADS",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_HOME",
    "TORCH_LOGS",
    "TORCH_SHOW_CPP_STACKTRACES",
    "TRITON_CACHE_DIR",
}


class Surroundings(NamedTuple):
    """The part of the machine that a run's numbers depend on."""

    device: str  # the CPU and its instruction set, or the accelerator and its libraries
    threads: int
    environment: tuple[tuple[str, str], ...] = ()  # variables that were set, and their values

    @classmethod
    def here(cls, device: torch.device, threads: int, devices: Sequence[str] = ()) -> Surroundings:
        """Return those of this machine. Raises UsageError if ``devices``, the indices of the
        accelerators to use, are of different models.
        """
        environment = tuple(sorted(numeric_variables(os.environ).items()))
        if device.type != "cuda":
            instructions = torch.backends.cpu.get_cpu_capability()
            return cls(f"{device.type} {instructions}, {cpu_model()}", threads, environment)
        cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
        name = name_of_all(devices or [str(device.index or 0)])
        return cls(f"{name}, CUDA {cuda}, cuDNN {cudnn}", threads, environment)


def numeric_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of an environment that may change a run's numbers."""
    return {
        name: value
        for name, value in environment.items()
        if name not in WITHOUT_EFFECT and (name in NAMES or name.startswith(PREFIXES))
    }


def name_of_all(devices: Sequence[str]) -> str:
    """Return the model of some accelerators; raises UsageError if they are not of one."""
    names = {number: torch.cuda.get_device_name(int(number)) for number in devices}
    if len(set(names.values())) > 1:
        listed = ", ".join(f"{number} is {name}" for number, name in names.items())
        raise UsageError(
            f"--devices: {listed}. Numbers and speed of arms on different models do not compare\n"
            "  fix: name devices of one model"
        )
    return next(iter(names.values()))


def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's model, by which libraries choose kernels, and the C library's version."""
    try:
        lines = [line.partition(":") for line in info.read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    models = [value.strip() for name, _, value in lines if name.strip() == "model name"]
    return f"{models[0] if models else platform.processor()}, {' '.join(platform.libc_ver())}"
