"""Metrics in Weights & Biases; offline unless this machine is logged in."""

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
    """A run in Weights & Biases. It is initialised with the first metrics, on the trackers' thread,
    so that a dead network does not delay training. A resumed run continues the wandb run whose id
    is in its directory.

    ``mode`` "auto" is online if there is WANDB_API_KEY or a netrc login, else offline; ``wandb
    sync`` uploads an offline run.
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
        if mode == "auto":
            mode = _default_mode()
        self._arguments: dict[str, Any] = {
            "project": project,
            "tags": tags,
            "entity": entity or None,
            "mode": mode,
        }
        self._wandb_run: Any = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics, except of steps that were logged before the run was resumed."""
        if self._wandb_run is None:
            self._wandb_run = self._init(
                id=_run_id(self.run.directory),
                resume="allow",
                # Do not log into an unfinished wandb run of the same process.
                reinit="create_new",
                name=self.run.name,
                dir=self.run.directory,
                config=dict(self.run.recipe),
                settings=self._settings,
                **self._arguments,
            )
        if step >= self._wandb_run.step:
            self._wandb_run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the upload."""
        if self._wandb_run is not None:
            self._wandb_run.finish()


def _default_mode() -> Any:
    """WANDB_MODE if it is set, else "online" if there is a login, else "offline"."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("WANDB_API_KEY") or _has_netrc_login():
        return "online"
    return "offline"


def _has_netrc_login() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return path.is_file() and netrc.netrc(path).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


def _run_id(directory: Path) -> str:
    """The wandb id of a run directory. Created at first use, and again if a power failure left the
    file empty.
    """
    path = directory / "wandb_id"
    run_id = ""
    if path.exists():
        run_id = path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    if not run_id:
        run_id = secrets.token_hex(4)
        path.write_text(f"{run_id}\n", encoding="utf-8")
    return run_id


@hookimpl
def lswt_components() -> list[type]:
    """Offer the Weights & Biases tracker."""
    return [Wandb]
