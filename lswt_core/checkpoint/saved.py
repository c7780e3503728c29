"""Reading a published checkpoint: its manifest, verification, tensors and documents."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, StringConstraints
from safetensors import safe_open
from torch import Tensor

from lswt_core.checkpoint.files import DTYPES, PIECES
from lswt_core.errors import CheckpointError

FORMAT = 1
MANIFEST = "MANIFEST.json"
DTYPE_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}

# a base name, so that no path leads out of the directory
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Record(BaseModel):
    """A file's entry in a manifest."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    bytes: Annotated[int, Ge(0)]
    sha256: str


class Manifest(BaseModel):
    """The table of a checkpoint's files, written last: with it, the checkpoint is complete."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: int = FORMAT
    step: Annotated[int, Ge(0)]
    files: dict[FileName, Record]
    sha256: str = ""  # of all other fields

    def sealed(self) -> Manifest:
        """A copy with its own hash."""
        return self.model_copy(update={"sha256": hash_manifest(self.model_dump())})


class StoredPiece(NamedTuple):
    """A tensor in a safetensors file, and where it lies in the whole."""

    path: Path
    name: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]  # of the whole

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the tensor."""
        return self.sizes == self.shape

    def read(self, *part: slice) -> Tensor:
        """The tensor, or a part of it; memory-mapped."""
        with safe_open(self.path, "pt") as file:
            if not part:
                return file.get_tensor(self.name)
            return file.get_slice(self.name)[part]


def read_places(path: Path) -> dict[str, StoredPiece]:
    """What a safetensors file holds, by name."""
    stored = {}
    with safe_open(path, "pt") as file:
        places = json.loads((file.metadata() or {}).get(PIECES, "{}"))
        for name in file.keys():  # noqa: SIM118 no mapping
            piece = file.get_slice(name)
            sizes = tuple(piece.get_shape())
            place = places.get(name, {"offsets": [0] * len(sizes), "shape": sizes})
            stored[name] = StoredPiece(
                path,
                name,
                DTYPE_OF_NAME[piece.get_dtype()],
                sizes,
                tuple(place["offsets"]),
                tuple(place["shape"]),
            )
    return stored


class StoredTensors(Mapping[str, Tensor]):
    """The tensors in some safetensors files, read at every access: memory-mapped, or put together
    from the pieces of several ranks. Raises CheckpointError if pieces are missing.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.pieces: dict[str, list[StoredPiece]] = {}
        for path in paths:
            for name, stored in read_places(path).items():
                self.pieces.setdefault(name, []).append(stored)
        for name, pieces in self.pieces.items():
            shape = pieces[0].shape
            if sum(math.prod(piece.sizes) for piece in pieces) != math.prod(shape):
                raise CheckpointError(
                    f"{pieces[0].path.parent}: the pieces of {name!r} do not make up its"
                    f" {list(shape)}"
                )

    def __getitem__(self, name: str) -> Tensor:
        first, *others = self.pieces[name]
        if first.is_whole:
            return first.read()
        whole = torch.empty(first.shape, dtype=first.dtype)
        for piece in (first, *others):
            begin = zip(piece.offsets, piece.sizes, strict=True)
            whole[tuple(slice(o, o + n) for o, n in begin)] = piece.read()
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


class Saved:
    """A verified checkpoint."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.step = manifest.step

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group, on the CPU, put together where several ranks wrote them."""
        # copied: a memory-mapped tensor would keep the disk space of a pruned checkpoint
        return {name: tensor.clone() for name, tensor in self.lazily(group).items()}

    def lazily(self, group: str) -> StoredTensors:
        """The tensors of a group, each read when it is asked for."""
        return StoredTensors(self.files_of(group))

    def files_of(self, group: str) -> list[Path]:
        """The files of a group: one, or one of each rank that wrote some of it."""
        name = re.compile(rf"{re.escape(group)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
        files = [file for file in self.manifest.files if name.fullmatch(file)]
        return [self._file(file) for file in files or [f"{group}.safetensors"]]

    def holds(self, name: str) -> bool:
        """Whether there is a JSON document of that name."""
        return f"{name}.json" in self.manifest.files

    def document(self, name: str) -> Any:
        """A JSON document."""
        return json.loads(self._file(f"{name}.json").read_bytes())

    def _file(self, name: str) -> Path:
        if name not in self.manifest.files:
            raise CheckpointError(
                f"checkpoint {self.path} has no {name}; it has {', '.join(self.manifest.files)}"
            )
        return self.path / name


def directory_name(step: int) -> str:
    """The directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def hash_manifest(manifest: Mapping[str, Any]) -> str:
    """The hash of a manifest without its own hash."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify(path: Path, *, hashed: Container[int] | None = None) -> Saved:
    """Verify a checkpoint directory against its manifest. Raises CheckpointError, naming the file
    and the fault. Of files whose numbers in the manifest are not among ``hashed`` only the sizes
    are compared; None: all are hashed.
    """
    try:
        manifest = _read_manifest(path)
        for number, (name, record) in enumerate(manifest.files.items()):
            _check_file(path / name, record, hashed is None or number in hashed)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return Saved(path, manifest)


def _read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a directory. Raises CheckpointError."""
    where = f"{path}: {MANIFEST}"
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{where} is missing: the checkpoint is incomplete")
    try:
        content = json.loads((path / MANIFEST).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged, it is not JSON: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{where} is damaged: it has no format version")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{where} has format {content['format']!r}, this lswt-core reads {FORMAT}: use the"
            " version that wrote it"
        )
    if content.get("sha256") != hash_manifest(content):
        raise CheckpointError(f"{where} is damaged: it does not match its own hash")
    try:
        manifest = Manifest.model_validate(content)
    except ValueError as error:
        raise CheckpointError(f"{where} is not a checkpoint's manifest: {error}") from error
    if directory_name(manifest.step) != path.name:
        raise CheckpointError(f"{where} belongs to step {manifest.step}, not to this directory")
    return manifest


def _check_file(path: Path, record: Record, contents: bool) -> None:
    """Raise CheckpointError unless a file matches its manifest entry."""
    where = f"{path.parent}: {path.name}"
    if not path.is_file():
        raise CheckpointError(f"{where} is missing")
    size = path.stat().st_size
    if size != record.bytes:
        raise CheckpointError(
            f"{where} is damaged: it has {size:,} bytes instead of {record.bytes:,}"
        )
    if contents:
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        if digest != record.sha256:
            raise CheckpointError(f"{where} is damaged: its content does not match its hash")
