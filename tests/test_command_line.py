"""What all commands share: exit codes, help, and the commands that come next."""

from __future__ import annotations

import errno
import re

import pytest
from helpers import ROOT

from lswt_core import errors
from lswt_core.__main__ import build_parser, main
from lswt_core.distributed.world import World
from lswt_core.errors import EXIT_CODES, LswtError, RecipeError, UsageError
from lswt_core.reporting.exit_status import BROKEN_PIPE, INTERRUPTED
from lswt_core.run import main as run
from lswt_core.train.session import Session


def subclasses(base: type[LswtError]) -> set[type[LswtError]]:
    direct = {kind for kind in base.__subclasses__() if kind.__module__ == errors.__name__}
    return direct.union(*map(subclasses, direct))


def test_every_error_has_an_exit_code_with_a_meaning() -> None:
    codes = {kind.exit_code for kind in {LswtError, *subclasses(LswtError)}}
    assert codes | {0, INTERRUPTED, BROKEN_PIPE} == set(EXIT_CODES)
    assert RecipeError.exit_code == UsageError.exit_code == 2


def test_readme_and_help_have_the_same_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "README.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    rows = re.findall(r"\| (\d+) \| (.*?) (?=\|)", section)
    assert {int(code): meaning for code, meaning in rows} == EXIT_CODES
    shown = build_parser().format_help().partition("exit codes:\n")[2]
    assert shown.splitlines() == [f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()]
    with pytest.raises(SystemExit):
        run(["--help"])
    assert shown.strip() in capsys.readouterr().out


@pytest.mark.parametrize("rank", [0, 1])
def test_a_finished_run_names_what_comes_next(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Session, "run", lambda session: 0)
    monkeypatch.setattr(Session, "__init__", lambda session, *about: None)
    monkeypatch.setattr(Session, "world", World(rank, 2), raising=False)
    assert run(["quickstart"]) == 0
    words = [line.split()[3:5] for line in capsys.readouterr().out.splitlines() if "-m" in line]
    expected = [["generate", "runs/quickstart"], ["ablate", "quickstart"]]
    assert words == (expected if rank == 0 else [])


def test_a_full_disk_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(session: Session) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/quickstart/lock")

    monkeypatch.setattr(Session, "run", fill)
    monkeypatch.setattr(Session, "__init__", lambda session, *about: None)
    assert run(["quickstart"]) == 7
    message = capsys.readouterr().err
    assert "runs/quickstart/lock" in message and "Traceback" not in message


def test_the_bare_name_of_a_group_lists() -> None:
    assert build_parser().parse_args(["recipes"]).function.__name__ == "list_recipes"
    with pytest.raises(SystemExit) as left:
        main(["plugins"])
    assert left.value.code == 2
