"""Weight files in HuggingFace's format, written and read a tensor at a time: files of a largest
size with an index, as transformers' ``save_pretrained`` lays them out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from lswt_core.checkpoint.files import safetensors_header, tensor_bytes
from lswt_core.errors import CheckpointError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_PATTERN = "model{suffix}.safetensors"
MAX_FILE_SIZE = "5GB"  # what a machine with little memory maps, and the Hub stores, without trouble
METADATA = {"format": "pt"}  # without which transformers refuses a file


class ConvertedTensors(Mapping[str, Tensor]):
    """The tensors of a state dict, each read from ``stored`` when it is asked for, and widened to
    the state dict's dtype: a table that is frozen is stored in float16.

    ``outlines`` has names, shapes and dtypes, on the meta device. A name is stored without
    ``prefix``. Raises CheckpointError where names or shapes differ, or a number would be rounded.
    """

    def __init__(
        self, outlines: Mapping[str, Tensor], stored: Mapping[str, Tensor], prefix: str
    ) -> None:
        self.outlines, self.stored, self.prefix = outlines, stored, prefix
        differing = {prefix + name for name in stored} ^ outlines.keys()
        if differing:
            raise CheckpointError(
                f"checkpoint and model differ in {', '.join(sorted(differing)[:5])}"
                f" ({len(differing)} tensors)"
            )

    def __getitem__(self, name: str) -> Tensor:
        outline, tensor = self.outlines[name], self.stored[name.removeprefix(self.prefix)]
        widened = torch.promote_types(tensor.dtype, outline.dtype)
        if tensor.shape != outline.shape or widened != outline.dtype:
            raise CheckpointError(
                f"checkpoint and model differ in {name}: {list(tensor.shape)}, {tensor.dtype}"
                f" there, {list(outline.shape)}, {outline.dtype} here"
            )
        return tensor.to(outline.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)


def write_weights(directory: Path, tensors: ConvertedTensors, max_file_size: str | int) -> None:
    """Write all tensors; no more than one is in memory."""
    outlines = tensors.outlines
    split = split_torch_state_dict_into_shards(
        dict(outlines), filename_pattern=FILE_PATTERN, max_shard_size=max_file_size
    )
    for file, names in split.filename_to_tensors.items():
        # the order of the safetensors library: wide types first, which keeps all aligned
        ordered = sorted(names, key=lambda name: (-outlines[name].element_size(), name))
        with directory.joinpath(file).open("xb") as stream:
            stream.write(safetensors_header([(n, outlines[n]) for n in ordered], METADATA))
            for name in ordered:
                stream.write(tensor_bytes(tensors[name]))
    if split.is_sharded:
        index = {
            "metadata": {
                "total_parameters": sum(outline.numel() for outline in outlines.values()),
                **split.metadata,
            },
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        directory.joinpath(INDEX).write_text(text, encoding="utf-8")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors file, or the files that its index names; [] if there is none."""
    index, whole = directory / INDEX, directory / WHOLE
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [directory / name for name in sorted(set(weight_map.values()))]
    return [whole] if whole.is_file() else []


def map_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, memory-mapped: pages of the files, which the system may drop."""
    mapped: dict[str, Tensor] = {}
    for path in weight_files(directory):
        with safe_open(path, "pt") as file:
            mapped |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return mapped


def require_same_bytes(directory: Path, tensors: ConvertedTensors) -> None:
    """Raise CheckpointError unless the files hold these tensors, bit by bit, and no others."""
    written = map_weights(directory)
    wrong = sorted(written.keys() ^ tensors.keys())
    wrong += [name for name in tensors if name in written and differ(written[name], tensors[name])]
    if wrong:
        raise CheckpointError(
            f"the weight files do not hold what the checkpoint does: {', '.join(wrong[:5])}"
            f" ({len(wrong)} tensors); nothing was written"
            "\n  fix: export again; if it happens again, check the disk"
        )


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ in a bit, in shape or in dtype."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    a, b = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return not a.equal(b)
