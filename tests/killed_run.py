"""``python -m killed_run STEP word ...``: a run whose rank 1 is killed within step STEP."""

from __future__ import annotations

import os
import signal
import sys

from lswt_core.run import main
from lswt_core.train.step import Step

if __name__ == "__main__":
    number, words = int(sys.argv[1]), sys.argv[2:]
    backward = Step.backward_micro_batch

    def kill(self: Step, i: int) -> object:
        if self.number == number and i == 0 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(self, i)

    Step.backward_micro_batch = kill  # type: ignore[method-assign, assignment]
    sys.exit(main(words))
