"""Runs of an ablation that are started by another command."""

from __future__ import annotations

import shlex

import pytest
import torch

from lswt_core.__main__ import main
from lswt_core.ablation.runs.launcher import launched, parse_launcher
from lswt_core.ablation.runs.surroundings import Surroundings
from lswt_core.ablation.runs.worker import require_like
from lswt_core.device import pick_device
from lswt_core.errors import UsageError

COMMAND = ["python", "-m", "worker", "a recipe.toml"]


def test_the_command_is_words_or_their_quotation() -> None:
    assert launched((), COMMAND) == COMMAND
    assert launched(parse_launcher("srun --gpus=1 {command}"), COMMAND) == [
        *("srun", "--gpus=1"),
        *COMMAND,
    ]
    words = launched(parse_launcher("ssh node 'cd /data && {command}'"), COMMAND)
    assert words[:2] == ["ssh", "node"]
    assert words[2].startswith("cd /data && ")
    assert shlex.split(words[2].removeprefix("cd /data && ")) == COMMAND


@pytest.mark.parametrize("launcher", ["srun --gpus=1", "ssh node '{command}"])
def test_a_launcher_without_the_command_is_refused(
    launcher: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--swap", "ffn=gelu", "--launcher", launcher]
    assert main(["ablate", "quickstart", *words]) == 2
    assert "--launcher" in capsys.readouterr().err


def test_a_run_on_another_machine_is_refused() -> None:
    threads = torch.get_num_threads()
    here = Surroundings.here(pick_device(0), threads)
    require_like(here.device, threads)
    with pytest.raises(UsageError, match="do not compare"):
        require_like("another CPU", threads)
    with pytest.raises(UsageError, match="OMP_NUM_THREADS"):
        require_like(here.device, threads + 1)
