"""Being asked to stop: at once while there is nothing to save, between steps afterwards, and never
against an inherited wish.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from runs import inside, saved_steps, write_recipe

from lswt_core.errors import Preempted
from lswt_core.train.signals import StopRequest

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers_as_they_were() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_when_the_run_began_stays_so(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), number)
        assert not stop() and signal.getsignal(number) is signal.SIG_IGN
        others = [other for other in SIGNALS if other != number]
        os.kill(os.getpid(), others[-1])
        assert stop() and signal.getsignal(number) is signal.SIG_IGN
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("number", SIGNALS)
def test_asked_to_stop_it_says_so_and_puts_the_handlers_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
    assert signal.getsignal(number) is before


def test_the_first_signal_is_answered_at_once_and_the_second_ctrl_c_leaves(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with StopRequest("stopping soon").listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() and capfd.readouterr().err == "\nstopping soon\n"
        os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == ""
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_while_there_is_nothing_to_save_it_stops_where_it_stands(number: signal.Signals) -> None:
    stop, reached = StopRequest(), []
    with stop.listening(), pytest.raises(Preempted), stop.at_once():
        os.kill(os.getpid(), number)
        reached.append("went on")
    assert stop() and not reached


def test_broad_handlers_of_plugins_do_not_swallow_it() -> None:
    stop = StopRequest()
    with stop.listening(), pytest.raises(Preempted), stop.at_once():
        with suppress(Exception):  # as much code does
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the request was swallowed")


def test_one_that_came_before_is_heard() -> None:
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted), stop.at_once():
            pytest.fail("the request was forgotten")


SLOW = """
import os, signal
from lswt_core.hooks import hookimpl
from lswt_schedules import Constant


class Slow(Constant):
    "A schedule whose maker is asked to stop, and which then takes for ever."

    name = "slow"

    def __init__(self, horizon):
        super().__init__(horizon)
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass


@hookimpl
def lswt_components():
    return [Slow]
"""


def test_a_signal_ends_a_run_that_is_still_being_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)
    tmp_path.joinpath("slow.py").write_text(SLOW)
    assert (
        inside(monkeypatch, recipe, "--plugin", "slow.py", "schedule.use=slow", "--out", "run")
        == 75
    )
    assert "--resume" in capsys.readouterr().out
    assert saved_steps(tmp_path / "run") == []


def test_a_run_of_very_many_steps_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path)
    asked = StopRequest.__call__
    # stops before its first step
    monkeypatch.setattr(StopRequest, "__call__", lambda stop: asked(stop) or True)
    words = ("train.steps=1000000000", "schedule.use=wsd", "--out", "run")
    assert inside(monkeypatch, recipe, *words) == 75
