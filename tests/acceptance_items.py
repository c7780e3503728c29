"""Items of an acceptance that do what items must not, run in a worker process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import SkipTest


def passing() -> dict[str, object]:
    print("a library prints this on standard output")
    return {"answer": 42, "process": os.getpid()}


def failing() -> dict[str, object]:
    raise ValueError("the kernel is wrong\nand more")


def not_applying() -> dict[str, object]:
    raise SkipTest("there is no such device")


def hanging(note: str) -> dict[str, object]:
    command = "import time; time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", command])
    Path(note).write_text(str(child.pid))
    time.sleep(60)
    return {}


def crashing() -> dict[str, object]:
    os.abort()


def reading(record: str) -> dict[str, object]:
    written = json.loads(Path(record).read_text())
    return {item["name"]: item["status"] for item in written["items"]}
