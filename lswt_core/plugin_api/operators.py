"""Names of custom operators."""

from __future__ import annotations

import re

import torch


def operator_name(module: str, name: str) -> str:
    """``namespace::name`` for an operator that a module (its ``__name__``) registers.

    No other copy of the module has it: the code of an exported model is a copy, and a module may be
    loaded twice. torch drops an operator whose name is registered again, and the first copy's calls
    then fail with ``std::bad_alloc``.
    """
    namespace = re.sub(r"\W", "_", module)
    taken = getattr(torch.ops, namespace)
    while hasattr(taken, name):
        name += "_"
    return f"{namespace}::{name}"
