"""The checkpoints of a run: saving one atomically, pruning old ones, finding the newest."""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from lswt_core.checkpoint.files import DTYPES, Files, Written
from lswt_core.checkpoint.pieces import Piece, piece_of
from lswt_core.checkpoint.saved import (
    MANIFEST,
    FileName,
    Manifest,
    Record,
    Saved,
    directory_name,
    verify,
)
from lswt_core.errors import DISK_FULL, CheckpointError, ResourceError

_PUBLISHED = re.compile(r"step-([0-9]{8,})")
_FILE_NAME: TypeAdapter[str] = TypeAdapter(FileName)


class Store:
    """A directory of checkpoints, written by the one process that holds the RunLock."""

    def __init__(self, directory: Path, *, keep: int = 2, files: Files | None = None) -> None:
        if keep < 2:
            raise ValueError(
                f"keep = {keep}: at least 2 checkpoints are kept, so that a damaged one leaves"
                " another"
            )
        self.directory = directory
        self.keep = keep
        self.files = files or Files()
        self._verified: set[int] = set()  # steps whose content this process has written or hashed

    def steps(self) -> list[int]:
        """The steps of all published checkpoints, oldest first, without verification."""
        if not self.directory.is_dir():
            return []
        steps = []
        for path in self.directory.iterdir():
            match = _PUBLISHED.fullmatch(path.name)
            if match and path.is_dir() and path.name == directory_name(int(match[1])):
                steps.append(int(match[1]))
        return sorted(steps)

    def newest(self, notice: Callable[[str], None]) -> Saved | None:
        """The newest checkpoint that verifies; None if there is none. Newer ones that do not verify
        are reported to ``notice`` and left in place.
        """
        for step in reversed(self.steps()):
            try:
                saved = verify(self.path(step))
            except CheckpointError as error:
                notice(f"checkpoint skipped: {error}")
            else:
                self._verified.add(step)
                return saved
        return None

    def open(self, step: int) -> Saved:
        """A checkpoint in which no rank found a fault. Raises CheckpointError if its files are
        incomplete.
        """
        saved = verify(self.path(step), hashed=())
        self._verified.add(step)
        return saved

    def fault(self, step: int, hashed: Container[int]) -> str:
        """What is wrong with a checkpoint, of whose files those numbers are hashed; "" if it is
        intact.
        """
        try:
            verify(self.path(step), hashed=hashed)
        except CheckpointError as error:
            return str(error)
        return ""

    def save(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor | Piece]],
        documents: Mapping[str, Any],
    ) -> Path:
        """Save groups of tensors and JSON documents as the checkpoint of a step; returns its
        directory. Raises CheckpointError, or ResourceError if the disk is full.

        The checkpoint appears complete or not at all; afterwards all but the newest ``keep`` are
        removed. An existing checkpoint of the step is kept if it verifies, else renamed.
        """
        pieces = {
            group: {name: piece_of(tensor) for name, tensor in members.items()}
            for group, members in groups.items()
        }
        check_tensors(pieces)
        encoded = encode(documents)
        if self.is_intact(step):
            return self.path(step)
        temporary = self._temporary(step)
        try:
            self._prepare()
            self._write(temporary, step, pieces, encoded)
            self.publish(temporary, step)
        except BaseException as error:
            self.abandon(temporary)
            needed = sum(p.tensor.nbytes for members in pieces.values() for p in members.values())
            explained = self.explain(error, step, needed)
            if explained is error:
                raise
            raise explained from error
        return self.path(step)

    def path(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return self.directory / directory_name(step)

    def begin(self, step: int) -> Path:
        """Create a temporary directory for the files of a checkpoint."""
        self._prepare()
        temporary = self._temporary(step)
        self.files.mkdir(temporary)
        return temporary

    def abandon(self, temporary: Path | None) -> None:
        """Remove the files of a checkpoint that failed."""
        if temporary is not None:
            with suppress(OSError):
                self.files.remove_tree(temporary)

    def _temporary(self, step: int) -> Path:
        return self.directory / f".tmp-{step}-{secrets.token_hex(4)}"

    def _prepare(self) -> None:
        """Create the directory; remove temporary directories of processes that died."""
        if not self.directory.is_dir():
            self.files.mkdir(self.directory)
            self.files.fsync_directory(self.directory.parent)
        for leftover in sorted(self.directory.glob(".tmp-*")):
            self.files.remove_tree(leftover)

    def _write(
        self,
        path: Path,
        step: int,
        groups: Mapping[str, Mapping[str, Piece]],
        documents: Mapping[str, bytes],
    ) -> None:
        """Write and fsync all files, the manifest last."""
        self.files.mkdir(path)
        written: dict[str, Written] = {}
        for group, members in groups.items():
            written |= self.write_group(path, f"{group}.safetensors", members)
        self.seal(path, step, written, documents)

    def write_group(self, path: Path, name: str, pieces: Mapping[str, Piece]) -> dict[str, Written]:
        """Write and fsync a file of tensors; returns its entry in the manifest."""
        written = self.files.write_tensors(path / name, pieces)
        self.files.fsync(path / name)
        return {name: written}

    def seal(
        self,
        path: Path,
        step: int,
        written: Mapping[str, Written],
        documents: Mapping[str, bytes],
    ) -> None:
        """Write and fsync the documents, and the manifest of all files."""
        written = dict(written)
        for name, document in documents.items():
            written[f"{name}.json"] = self.files.write_bytes(path / f"{name}.json", document)
            self.files.fsync(path / f"{name}.json")
        records = {name: Record(**file._asdict()) for name, file in written.items()}
        manifest = Manifest(step=step, files=records).sealed()
        self.files.write_bytes(path / MANIFEST, manifest.model_dump_json(indent=1).encode())
        self.files.fsync(path / MANIFEST)
        self.files.fsync_directory(path)

    def publish(self, temporary: Path, step: int) -> None:
        """Rename a complete checkpoint to its final name, and remove old ones."""
        target = self.path(step)
        if target.exists():  # it does not verify, else nothing would have been written
            damaged = f"{target.name}-damaged-{secrets.token_hex(4)}"
            self.files.rename(target, self.directory / damaged)
        self.files.rename(temporary, target)
        self.files.fsync_directory(self.directory)
        # sizes only: content was hashed while it was written, and would be read from the page cache
        verify(target, hashed=())
        self._verified.add(step)
        self._prune()

    def _prune(self) -> None:
        """Remove checkpoints older than the newest ``keep`` that verify."""
        steps = self.steps()
        intact = 0
        while steps and intact < self.keep:
            intact += self.is_intact(steps.pop())
        for step in steps:
            # renamed first, so that no half-removed directory has a checkpoint's name
            obsolete = self._temporary(step)
            self.files.rename(self.path(step), obsolete)
            self.files.remove_tree(obsolete)

    def is_intact(self, step: int) -> bool:
        """Whether a checkpoint exists and verifies. Content is hashed once a process."""
        try:
            verify(self.path(step), hashed=() if step in self._verified else None)
        except CheckpointError:
            return False
        self._verified.add(step)
        return True

    def explain(self, error: BaseException, step: int, needed: int) -> BaseException:
        """The error for a save that failed, of so many bytes; anything but an OSError as it is."""
        if not isinstance(error, OSError):
            return error
        where = f"the checkpoint of step {step} cannot be saved in {self.directory}"
        if error.errno not in DISK_FULL:
            return CheckpointError(f"{where}: {error}; earlier checkpoints are untouched")
        existing = self.directory if self.directory.is_dir() else self.directory.parent
        free = shutil.disk_usage(existing).free
        return ResourceError(
            f"{where}: {error.strerror}: it takes {needed:,} bytes, {free:,} are free; earlier"
            " checkpoints are untouched; free some space, or choose another --out"
        )


def check_tensors(groups: Mapping[str, Mapping[str, Piece]]) -> None:
    """Raise CheckpointError for tensors that safetensors cannot store."""
    for group, members in groups.items():
        _check_name(group)
        for name, piece in members.items():
            tensor = piece.tensor
            if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
                raise CheckpointError(
                    f"tensor {name!r} of {group!r} cannot be saved: safetensors has no"
                    f" {tensor.layout} {tensor.dtype}"
                )


def encode(documents: Mapping[str, Any]) -> dict[str, bytes]:
    """Encode documents as JSON. Raises CheckpointError."""
    encoded = {}
    for name, document in documents.items():
        _check_name(name)
        try:
            encoded[name] = json.dumps(document, indent=1, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"document {name!r} cannot be saved as JSON: {error}") from error
    return encoded


def _check_name(name: str) -> None:
    """Raise CheckpointError for a group or document name that is no file name."""
    try:
        _FILE_NAME.validate_python(name)
    except ValueError as error:
        raise CheckpointError(
            f"{name!r} cannot name a file of a checkpoint: use letters, digits, '_', '-' and '.'"
        ) from error
    if f"{name}.json" == MANIFEST:
        raise CheckpointError(f"{name!r} is the name of the manifest")
