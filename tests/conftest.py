from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# tests run side by side, and sums depend on the number of threads
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
if not torch.cuda.is_available():
    # Triton's kernels are interpreted; read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# transformers copies the code of exported models to here: not to a directory that processes share
MODULES = tempfile.mkdtemp(prefix="lswt-modules-")
os.environ["HF_MODULES_CACHE"] = MODULES
atexit.register(shutil.rmtree, MODULES, ignore_errors=True)

# a shell that starts the tests in the background ignores these signals, and so would every run
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden/recipes; the difference is the review",
    )


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests live to the end: collections need not go through them


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def process_as_at_first() -> Iterator[None]:
    """The same random numbers whatever ran before; and undo what a library or a run within this
    process sets: environment variables, and no denormal numbers, which hypothesis expects.
    """
    torch.manual_seed(0)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    torch.set_flush_denormal(False)


BUDGETS: dict[str, Any] = {}  # by recipe


@pytest.fixture
def budgets_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure what a recipe takes once in all tests: it is most of what building an arm takes."""
    from lswt_core.ablation import build_arms

    measure: Callable[..., Any] = build_arms.budget

    def remembered(recipe: Any, *context: Any) -> Any:
        key = recipe.dump()
        if key not in BUDGETS:
            BUDGETS[key] = measure(recipe, *context)
        return BUDGETS[key]

    monkeypatch.setattr(build_arms, "budget", remembered)
