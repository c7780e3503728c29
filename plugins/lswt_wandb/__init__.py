"""Metrics mirrored to Weights & Biases; offline unless this machine is logged in."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lswt_core.errors import PluginError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import RunInfo, Tracker


class Wandb(Tracker):
    """A run of Weights & Biases. It is opened at the first metric, on the trackers' own thread, so
    that a dead network delays nothing; a resumed run continues under the id kept in its directory.

    ``mode = "auto"`` is online where WANDB_API_KEY or a netrc login exists, else offline: ``wandb
    sync`` uploads such a run.
    """

    name = "wandb"
    libraries = ("wandb",)

    def __init__(
        self,
        run: RunInfo,
        *,
        project: str = "lswt",
        tags: list[str] | None = None,
        entity: str = "",
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
    ) -> None:
        super().__init__(run)
        try:
            from wandb import Settings, init
        except ImportError as error:
            raise PluginError(
                f"track.wandb needs a missing package ({error}): pip install 'lswt-core[wandb]'"
            ) from error
        self._init, self._settings = init, Settings(console="off", silent=True)
        mode_now = _automatic() if mode == "auto" else mode
        self._arguments: dict[str, Any] = {
            "project": project,
            "tags": tags,
            "entity": entity or None,
            "mode": mode_now,
        }
        self._open: Any = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record some numbers; a step that the run had logged before it was resumed is not logged
        again.
        """
        if self._open is None:
            self._open = self._init(
                id=_run_id(self.run.directory),
                resume="allow",
                # else a run of this process that did not finish in time would get these numbers
                reinit="create_new",
                name=self.run.name,
                dir=self.run.directory,
                config=dict(self.run.recipe),
                settings=self._settings,
                **self._arguments,
            )
        if step >= self._open.step:
            self._open.log(dict(metrics), step=step)

    def close(self) -> None:
        """Upload what is left."""
        if self._open is not None:
            self._open.finish()


def _automatic() -> str:
    """Online if a login is found, offline otherwise; WANDB_MODE decides where it is set."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _in_netrc() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def _run_id(directory: Path) -> str:
    """The id under which this run directory is known, made at its first use, and anew where a loss
    of power left an empty file.
    """
    path = directory / "wandb_id"
    known = (
        path.read_text(encoding="utf-8", errors="replace").strip("\0 \n") if path.exists() else ""
    )
    if not known:
        known = secrets.token_hex(4)
        path.write_text(f"{known}\n", encoding="utf-8")
    return known


@hookimpl
def lswt_components() -> list[type]:
    """Offer the Weights & Biases tracker."""
    return [Wandb]
