"""The file-system operations of a save, in one object that tests replace to inject faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lswt_core.checkpoint.pieces import Piece
from lswt_core.plugin_api.atomic_write import fsync

DTYPES: dict[torch.dtype, str] = {  # names of the safetensors format
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
}


PIECES = "pieces"  # metadata of a safetensors file: where pieces lie in their tensors


class Written(NamedTuple):
    """Size and hash of a written file; the hash is of the data as passed to the disk."""

    bytes: int
    sha256: str


class Files:
    """File-system operations."""

    def write_tensors(self, path: Path, tensors: Mapping[str, Piece]) -> Written:
        """Write tensors in the safetensors format, copying one at a time to the host. Where there
        are pieces of larger tensors, the header's metadata has "pieces": the ``offsets`` of each,
        and the ``shape`` of the whole, as JSON.

        Tensors that share storage or are not contiguous are stored in full; the safetensors library
        refuses the former, and hashing its file would need a second read.
        """
        # the format allows no padding between tensors; widest types first keeps all aligned
        ordered = sorted(
            tensors.items(), key=lambda item: (-item[1].tensor.element_size(), item[0])
        )
        return _write(path, _safetensors(ordered))

    def write_bytes(self, path: Path, content: bytes) -> Written:
        """Write a new file; raises FileExistsError."""
        return _write(path, [content])

    def fsync(self, path: Path) -> None:
        """Fsync a file."""
        fsync(path)

    def fsync_directory(self, path: Path) -> None:
        """Fsync a directory's entries."""
        fsync(path)

    def mkdir(self, path: Path) -> None:
        """Create a directory; raises FileExistsError."""
        path.mkdir()

    def rename(self, source: Path, target: Path) -> None:
        """Rename a directory within its parent."""
        source.rename(target)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and its content."""
        shutil.rmtree(path)


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """Write a new file and hash its content."""
    digest, size = sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return Written(size, digest.hexdigest())


def _safetensors(named: Sequence[tuple[str, Piece]]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: header length, header, tensors."""
    places = {
        name: {"offsets": piece.offsets, "shape": piece.shape}
        for name, piece in named
        if not piece.is_whole
    }
    metadata = {PIECES: json.dumps(places)} if places else {}
    yield safetensors_header([(name, piece.tensor) for name, piece in named], metadata)
    for _, piece in named:
        yield tensor_bytes(piece.tensor)


def safetensors_header(named: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: the header's length and the header. Of the tensors,
    which follow in this order, only dtypes and shapes are used.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in named:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the data
    return len(encoded).to_bytes(8, "little") + encoded


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers as a safetensors file holds them."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return content.numpy().data
