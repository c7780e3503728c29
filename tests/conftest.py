from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

# tests run side by side, and sums depend on the number of threads
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
if not torch.cuda.is_available():
    # Triton's kernels are interpreted; read when Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

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


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def denormals_as_they_were() -> Iterator[None]:
    """Undo what a run within this process sets: hypothesis expects denormal numbers."""
    yield
    torch.set_flush_denormal(False)
