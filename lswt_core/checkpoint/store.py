"""The checkpoints of a run: how one is published, which are kept, which is continued from."""

from __future__ import annotations

import errno
import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from lswt_core.checkpoint.files import DTYPES, Files
from lswt_core.checkpoint.saved import (
    MANIFEST,
    FileName,
    Manifest,
    Record,
    Saved,
    directory_name,
    verify,
)
from lswt_core.errors import CheckpointError, ResourceError

_PUBLISHED = re.compile(r"step-([0-9]{8,})")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_FILE_NAME: TypeAdapter[str] = TypeAdapter(FileName)


class Store:
    """A directory of checkpoints, written by one process (which holds the RunLock)."""

    def __init__(self, directory: Path, *, keep: int = 2, files: Files | None = None) -> None:
        if keep < 2:
            raise ValueError(
                f"keep = {keep}: at least 2 checkpoints are kept, so that a damaged one leaves"
                " another"
            )
        self.directory = directory
        self.keep = keep
        self.files = files or Files()
        self._proven: set[int] = set()  # steps whose content this process has written or hashed

    def steps(self) -> list[int]:
        """The steps of all published checkpoints, oldest first; whether they are sound is not
        looked at.
        """
        if not self.directory.is_dir():
            return []
        matches = (
            _PUBLISHED.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir()
        )
        return sorted(
            int(match[1])
            for match in matches
            if match and match[0] == directory_name(int(match[1]))
        )

    def newest(self, notice: Callable[[str], None]) -> Saved | None:
        """The newest checkpoint that verifies; every newer one that does not is named through
        ``notice`` and left alone.
        """
        for step in reversed(self.steps()):
            try:
                saved = verify(self._path(step))
            except CheckpointError as error:
                notice(f"checkpoint skipped: {error}")
            else:
                self._proven.add(step)
                return saved
        return None

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
    ) -> Path:
        """Save groups of tensors and JSON documents as the checkpoint of a step; returns its
        directory.

        The checkpoint appears complete or not at all, and only then are older ones removed, beyond
        the newest ``keep``. A step that is saved already and verifies is left as it is; one that
        does not verify is set aside under another name.
        """
        _check_tensors(tensors)
        encoded = _encode(documents)
        if self._is_sound(step):
            return self._path(step)
        temporary = self._temporary(step)
        try:
            self._prepare()
            self._write(temporary, step, tensors, encoded)
            self._publish(temporary, step)
            self._prune()
        except BaseException as error:
            with suppress(OSError):
                self.files.remove_tree(temporary)
            if isinstance(error, OSError):
                raise self._explained(error, step, tensors) from error
            raise
        return self._path(step)

    def _path(self, step: int) -> Path:
        return self.directory / directory_name(step)

    def _temporary(self, step: int) -> Path:
        return self.directory / f".tmp-{step}-{secrets.token_hex(4)}"

    def _prepare(self) -> None:
        """Make the directory; remove what a process that died left in it."""
        if not self.directory.is_dir():
            self.files.mkdir(self.directory)
            self.files.fsync_directory(self.directory.parent)
        for leftover in sorted(self.directory.glob(".tmp-*")):
            self.files.remove_tree(leftover)

    def _write(
        self,
        path: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, bytes],
    ) -> None:
        """Everything onto the disk, the manifest last."""
        self.files.mkdir(path)
        written = {}
        for group, members in tensors.items():
            written[f"{group}.safetensors"] = self.files.write_tensors(
                path / f"{group}.safetensors", members
            )
        for name, document in documents.items():
            written[f"{name}.json"] = self.files.write_bytes(path / f"{name}.json", document)
        for name in written:
            self.files.fsync(path / name)
        records = {name: Record(**file._asdict()) for name, file in written.items()}
        manifest = Manifest(step=step, files=records).sealed()
        self.files.write_bytes(path / MANIFEST, manifest.model_dump_json(indent=1).encode())
        self.files.fsync(path / MANIFEST)
        self.files.fsync_directory(path)

    def _publish(self, temporary: Path, step: int) -> None:
        """Give a complete checkpoint its name."""
        target = self._path(step)
        if target.exists():  # and does not verify, else nothing would have been written
            self.files.rename(
                target, self.directory / f"{target.name}-damaged-{secrets.token_hex(4)}"
            )
        self.files.rename(temporary, target)
        self.files.fsync_directory(self.directory)
        # Sizes alone: the content was hashed on its way, and reading it back now would show the
        # page cache, not the disk.
        verify(target, contents=False)
        self._proven.add(step)

    def _prune(self) -> None:
        """Remove what is older than the newest ``keep`` checkpoints that verify."""
        steps = self.steps()
        sound = 0
        while steps and sound < self.keep:
            sound += self._is_sound(steps.pop())
        for step in steps:
            # renamed first, so that no half-removed directory bears a checkpoint's name
            doomed = self._temporary(step)
            self.files.rename(self._path(step), doomed)
            self.files.remove_tree(doomed)

    def _is_sound(self, step: int) -> bool:
        """Whether a checkpoint exists and verifies; content that this process has seen is not
        hashed again.
        """
        try:
            verify(self._path(step), contents=step not in self._proven)
        except CheckpointError:
            return False
        self._proven.add(step)
        return True

    def _explained(
        self, error: OSError, step: int, tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> Exception:
        """What to tell the user about a failed save."""
        where = f"the checkpoint of step {step} cannot be saved in {self.directory}"
        if error.errno not in _DISK_FULL:
            return CheckpointError(f"{where}: {error}; earlier checkpoints are untouched")
        needed = sum(tensor.nbytes for members in tensors.values() for tensor in members.values())
        free = shutil.disk_usage(
            self.directory if self.directory.is_dir() else self.directory.parent
        ).free
        return ResourceError(
            f"{where}: {error.strerror}: it takes {needed:,} bytes, {free:,} are free; earlier"
            " checkpoints are untouched; free some space, or choose another --out"
        )


def _check_tensors(groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse what the format cannot hold before anything is written."""
    for group, members in groups.items():
        _check_name(group)
        for name, tensor in members.items():
            if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
                raise CheckpointError(
                    f"tensor {name!r} of {group!r} cannot be saved: safetensors has no"
                    f" {tensor.layout} {tensor.dtype}"
                )


def _encode(documents: Mapping[str, Any]) -> dict[str, bytes]:
    """Documents as JSON text."""
    encoded = {}
    for name, document in documents.items():
        _check_name(name)
        try:
            encoded[name] = json.dumps(document, indent=1, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"document {name!r} cannot be saved as JSON: {error}") from error
    return encoded


def _check_name(name: str) -> None:
    """Refuse a group or document that cannot name a file of the checkpoint."""
    try:
        _FILE_NAME.validate_python(name)
    except ValueError as error:
        raise CheckpointError(
            f"{name!r} cannot name a file of a checkpoint: use letters, digits, '_', '-' and '.'"
        ) from error
    if f"{name}.json" == MANIFEST:
        raise CheckpointError(f"{name!r} is the name of the manifest")
