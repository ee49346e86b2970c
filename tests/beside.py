"""A program: runs a command beside processes that do nothing but compute, as on a machine where much else is going on.

    python tests/beside.py COUNT COMMAND [ARGUMENT...]

They end with the command, however it ends, and with this program, even by SIGKILL. The exit status is the command's.
"""

from __future__ import annotations

import subprocess
import sys

# A pipe that only this program can write to: at its end the reader exits, whatever happened to this program.
SPIN = "import os, threading\nthreading.Thread(target=lambda: os._exit(len(os.read(0, 1)))).start()\nwhile True: pass"


def main(count: int, command: list[str]) -> int:
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN], stdin=subprocess.PIPE) for _ in range(count)]
    try:
        return subprocess.run(command).returncode
    finally:
        for process in spinning:
            process.kill()
            process.wait()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    status = main(int(sys.argv[1]), sys.argv[2:])
    sys.exit(status if status >= 0 else 128 - status)
