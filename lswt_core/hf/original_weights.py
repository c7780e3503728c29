"""Weights of the original authors' checkpoints under our parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lswt_core.errors import CheckpointError
from lswt_core.hf.weight_files import weight_files

RENAMED = (  # substrings of parameter names: original, ours
    ("model.input_embedding.embedding", "vocabulary.table"),
    ("model.input_proj", "vocabulary.input"),
    ("head_proj", "vocabulary.output"),
    ("model.blocks", "blocks"),
    ("model.input_norm", "input_norm.norm"),
    ("model.output_norm", "output_norm.norm"),
    ("att_norm", "attention_norm.norm"),
    ("ffn_norm", "ffn_norm.norm"),
    (".att.proj_q", ".attention.query"),
    (".att.proj_k", ".attention.key"),
    (".att.proj_v", ".attention.value"),
    (".att.proj_o", ".attention.output"),
    (".att.q_norm", ".attention.query_norm"),
    (".att.k_norm", ".attention.key_norm"),
    (".att.registers_k", ".attention.memory.registers.keys"),
    (".att.registers_v", ".attention.memory.registers.values"),
)
ROTARY_BUFFERS = (".inv_freq", "rope_embedding.scale")  # recomputed, not loaded
SHOWN_MISMATCHES = 5


def read_weights(directory: Path, notes: list[str]) -> dict[str, Tensor]:
    """Return an original checkpoint's tensors by our names; appends to ``notes`` what is left out.

    Raises CheckpointError if there is no safetensors file.
    """
    files = weight_files(directory)
    if not files:
        others = ", ".join(path.name for path in sorted(directory.glob("*.bin"))) or "no weights"
        raise CheckpointError(
            f"{directory} holds no .safetensors file but {others}: pickled weights are not read,"
            " since loading them can run code\n"
            "  fix: convert them once, with torch.load(..., weights_only=True) and"
            " safetensors.torch.save_file"
        )
    weights: dict[str, Tensor] = {}
    pooler = 0
    for path in files:
        for name, tensor in load_file(path).items():
            if name.startswith("pooler."):
                pooler += 1
            elif not name.endswith(ROTARY_BUFFERS):
                weights[rename_parameter(name)] = convert_layout(name, tensor)
    if pooler:
        notes.append(f"{pooler} tensors of a reward head (pooler.*) were left out")
    return weights


def rename_parameter(name: str) -> str:
    """Return our name of an original parameter."""
    for original, ours in RENAMED:
        name = name.replace(original, ours)
    return f"model.decoder.{name}"


def convert_layout(name: str, tensor: Tensor) -> Tensor:
    """Transpose registers [1, H, R, D] to our [R, H, D]; return other tensors as they are."""
    return tensor[0].transpose(0, 1).contiguous() if ".registers_" in name else tensor


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype, directory: Path
) -> None:
    """Load weights into the model; raises CheckpointError unless names and shapes match exactly."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    mismatches = [
        f"{name}: {stored.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(expected | stored)
        if expected.get(name) != stored.get(name)
    ]
    if mismatches:
        hidden = len(mismatches) - SHOWN_MISMATCHES
        more = f"\n  and {hidden} more" if hidden > 0 else ""
        raise CheckpointError(
            f"the weights in {directory} do not match its config.json:\n  "
            + "\n  ".join(mismatches[:SHOWN_MISMATCHES])
            + more
        )
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
