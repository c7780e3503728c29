"""A published checkpoint: its manifest, how it is verified, and how it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, StringConstraints
from safetensors.torch import load_file
from torch import Tensor

from lswt_core.errors import CheckpointError

FORMAT = 1
MANIFEST = "MANIFEST.json"

# a base name: nothing outside the directory
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Record(BaseModel):
    """What a manifest says of one file."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    bytes: Annotated[int, Ge(0)]
    sha256: str


class Manifest(BaseModel):
    """The last file a save writes: with it, a checkpoint is complete."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: int = FORMAT
    step: Annotated[int, Ge(0)]
    files: dict[FileName, Record]
    sha256: str = ""  # of all the rest

    def sealed(self) -> Manifest:
        """The same with its own hash."""
        return self.model_copy(update={"sha256": seal(self.model_dump())})


class Saved:
    """A checkpoint that was verified."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.step = manifest.step

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group, on the CPU."""
        # Copies: the library maps the file, and a pruned checkpoint would keep its disk space as
        # long as a tensor lives.
        return {
            name: tensor.clone()
            for name, tensor in load_file(self._file(f"{group}.safetensors")).items()
        }

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
    """What the checkpoint of a step is called."""
    return f"step-{step:08d}"


def seal(manifest: Mapping[str, Any]) -> str:
    """The hash of all of a manifest but the hash itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify(path: Path, *, contents: bool = True) -> Saved:
    """Check a checkpoint directory against its manifest; raises CheckpointError with the file and
    what is wrong with it.

    ``contents=False`` compares sizes alone and reads no file but the manifest.
    """
    try:
        manifest = _read_manifest(path)
        for name, record in manifest.files.items():
            _check_file(path / name, record, contents)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return Saved(path, manifest)


def _read_manifest(path: Path) -> Manifest:
    """A manifest that is unharmed and belongs to this directory."""
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
    if content.get("sha256") != seal(content):
        raise CheckpointError(f"{where} is damaged: it does not match its own hash")
    try:
        manifest = Manifest.model_validate(content)
    except ValueError as error:
        raise CheckpointError(f"{where} is not a checkpoint's manifest: {error}") from error
    if directory_name(manifest.step) != path.name:
        raise CheckpointError(f"{where} belongs to step {manifest.step}, not to this directory")
    return manifest


def _check_file(path: Path, record: Record, contents: bool) -> None:
    """Raise CheckpointError unless a file is what its manifest says."""
    where = f"{path.parent}: {path.name}"
    if not path.is_file():
        raise CheckpointError(f"{where} is missing")
    if (size := path.stat().st_size) != record.bytes:
        raise CheckpointError(
            f"{where} is damaged: it has {size:,} bytes instead of {record.bytes:,}"
        )
    if contents:
        with path.open("rb") as file:
            found = file_digest(file, "sha256").hexdigest()
        if found != record.sha256:
            raise CheckpointError(f"{where} is damaged: its content does not match its hash")
