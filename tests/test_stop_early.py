"""Asked to stop while it still prepares its text, a run ends soon, with no part of a cache left,
and can be started again.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from runs import command, start, surroundings, write_recipe

SLOW = """
import os
import time
from lswt_bytes import Bytes
from lswt_core.hooks import hookimpl

class Slow(Bytes):
    "Bytes that take their time."

    name = "slow"

    def fingerprint(self):
        return "slow"

    def encode(self, texts):
        print("reading", flush=True)
        time.sleep(float(os.environ["PAUSE"]))
        return super().encode(texts)

@hookimpl
def lswt_components():
    return [Slow]
"""
LONG = 400_000  # characters: a few files are tokenised at a time


@pytest.mark.slow
def test_asked_to_stop_while_tokenising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAUSE", "0.5")
    recipe = write_recipe(tmp_path)
    for file in range(40):
        tmp_path.joinpath("corpus", f"long-{file}.txt").write_text(f"line {file}\n" * (LONG // 8))
    tmp_path.joinpath("slow.py").write_text(SLOW)
    words = command(
        recipe, "--out", "run", "--plugin", "slow.py", "--unchecked", "tokenizer.use=slow"
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=surroundings(recipe), cwd=tmp_path, **streams) as process:  # type: ignore[call-overload]
        printed = ""
        for line in process.stdout:
            printed += line
            # the held-out text and some of the other
            if line == "reading\n" and printed.count("reading\n") == 4:
                process.send_signal(signal.SIGINT)
    assert process.returncode == 75, printed
    assert "--resume" in printed, printed
    assert printed.count("reading\n") < 9
    left = [path.name for path in tmp_path.joinpath("cache").iterdir()]
    # the held-out text is whole
    assert len(left) <= 1 and not any(name.endswith(".part") for name in left)
    monkeypatch.setenv("PAUSE", "0")
    again = start(
        recipe,
        "--out",
        "run",
        "--plugin",
        "slow.py",
        "--unchecked",
        "tokenizer.use=slow",
        "--resume",
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "starting from the beginning" in again.stdout, again.stdout + again.stderr
