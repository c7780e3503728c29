"""``python -m peak_memory RUN OUT``: exports a run, and prints how many bytes of memory that took
at most, without the pages of files, which the system may drop.
"""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

from lswt_core import export_run

STATUS = Path("/proc/self/status")


def allocated() -> int:
    """The bytes of this process that are no pages of files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


def main(run: str, out: str) -> None:
    import lswt_core.hf.export  # noqa: F401 what is imported is no part of the peak

    before, done, seen = allocated(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(allocated())

    watching = threading.Thread(target=watch)
    watching.start()
    export_run(run, out, max_file_size="10MB")
    done.set()
    watching.join()
    print(max(seen) - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
