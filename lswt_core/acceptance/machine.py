"""The machine that is accepted: device and versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "lswt-core",
    "torch",
    "triton",
    "transformers",
    "x-transformers",
    "liger-kernel",
    "flash-attn",
)


def describe_machine() -> dict[str, Any]:
    """The device of this process ("type", "name", "count", "memory" in bytes, "capability") and
    "versions".
    """
    import torch

    from lswt_core.device import available_memory, device_count, device_name, pick_device

    device = pick_device(0)
    described: dict[str, Any] = {
        "type": device.type,
        "name": device_name(device) or platform.processor() or platform.machine(),
        "count": device_count(),
        "memory": available_memory(device),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["memory"] = properties.total_memory
        described["capability"] = f"{properties.major}.{properties.minor}"
        described["cuda"] = torch.version.cuda or torch.version.hip
        described["cudnn"] = torch.backends.cudnn.version()
    return {**described, "versions": installed_versions()}


def installed_versions() -> dict[str, str]:
    """Python and what a result may depend on; only what is installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
