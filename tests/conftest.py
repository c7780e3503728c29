from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run as Python; to be told before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

for number in (signal.SIGINT, signal.SIGHUP):  # a shell that starts the tests in the background ignores them, and a run would too
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


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
    """A run or plan within this process flushes denormal numbers to zero, which hypothesis does not
    expect.
    """
    yield
    torch.set_flush_denormal(False)
