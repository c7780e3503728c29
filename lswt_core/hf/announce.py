"""Makes the library's models known to transformers' Auto classes once transformers loads those
classes.

``import lswt_core`` has to be quick, and transformers takes seconds to import; so nothing is
imported here, but the moment transformers' own tables of models are, ours are added to them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OURS = {  # a table of transformers -> the module of ours that registers itself there when it is imported
    "transformers.models.auto.configuration_auto": "lswt_core.hf.configuration",
    "transformers.models.auto.modeling_auto": "lswt_core.hf.modeling",
}


class Announcer(MetaPathFinder):
    """Waits for transformers' tables."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leave finding to the others, and have our module imported once theirs has run."""
        if name not in OURS or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_announce(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(OURS[name])

            spec.loader.exec_module = execute_and_announce  # type: ignore[method-assign]
        return spec


def announce() -> None:
    """Add our models to transformers' tables: now, to those that are loaded, and to the others when
    they will be.
    """
    if not any(isinstance(finder, Announcer) for finder in sys.meta_path):
        sys.meta_path.insert(0, Announcer())
    for theirs, ours in OURS.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
