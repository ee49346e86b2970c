"""A nursery whose children have DeepSpeed imported, with all that it imports when the first engine is built."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from nursery import DEADLINE_S, Nursery, freeze, serve, warm_up


class DeepSpeedNursery(Nursery):
    def __init__(self) -> None:
        tests = Path(__file__).parents[1]
        self.socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
                | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            )
        self._lines = self.socket.makefile("rb", buffering=0)
        self.socket.settimeout(DEADLINE_S + 30)


if __name__ == "__main__":
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    from dist import deepspeed_training  # noqa: F401

    warm_up()
    freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        program = serve(requests)
    if program is not None:
        exec(program, {})
