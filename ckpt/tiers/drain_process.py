"""Starts a drain, of a node or to an object store: nobody's child, so that it outlives the training whoever ends that."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Mapping
from pathlib import Path

from ckpt.drain.node import LOCK, began_at
from ckpt.errors import InUseError
from ckpt.storage.directory_lock import DirectoryLock
from ckpt.storage.log_file import last_line, open_log

logger = logging.getLogger("ckpt")

LOG = "drain.log"
_MOST_LOG_BYTES = 1 << 20
_START_TIMEOUT_S = 60.0  # of what starts the drain, which takes milliseconds
# Launchers end the whole tree of processes below a rank. So the drain is not our child, but that of this small program, which
# ends at once: the first process adopts it. A session of its own keeps signals of a terminal from it. The program tells its
# number on its output; the drain itself writes to the log alone. What it reads is what this program has been given: a pipe
# keeps so much when its writer has ended.
_START = """
import subprocess, sys
told = sys.stdin.buffer.read()
stdin = subprocess.PIPE if told else subprocess.DEVNULL
drain = subprocess.Popen(sys.argv[1:], stdin=stdin, stdout=sys.stderr, start_new_session=True)
if told:
    drain.stdin.write(told)
    drain.stdin.close()
sys.stdout.write(str(drain.pid))
"""
_MOST_TOLD_BYTES = 60_000


class DrainProcess:
    """Of one node and run. Any thread may call it.

    Args:
        root: of the run on this node: it has a node.json. Or of a place in an object store: a remote.json.
        options: of the object store. They may be secret: only the drain is told.

    Attributes:
        pid: of the one that was started here last; 0: none was.
    """

    def __init__(self, root: Path, options: Mapping[str, str] | None = None) -> None:
        self._root = root
        self._options = options
        self._starting = threading.Lock()
        self.pid, self._began = 0, -1
        self._told = False

    @property
    def log(self) -> Path:
        return self._root / LOG

    def runs(self) -> bool:
        """Also if somebody else has started it, or it has just been started and has not come far yet."""
        if self.pid and began_at(self.pid) == self._began:
            return True
        try:
            DirectoryLock(self._root, name=LOCK).expect_free(0.0)
        except InUseError:
            return True
        return False

    def ensure(self) -> str:
        """Starts it unless it runs. Returns what is in the way, which is logged once; else an empty text."""
        with self._starting:
            if self.runs():
                return ""
            try:
                self.pid = self._start()
                self._began = began_at(self.pid) or -1
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                return self._tell(f"cannot start the drain of '{self._root}', so nothing is carried from there: {error}")
        return ""

    def last_words(self) -> str:
        """What the drain has said last."""
        return last_line(self.log)

    def _start(self) -> int:
        if not sys.executable:
            raise ValueError("this interpreter does not know its own program; run `python -m ckpt drain` on each node")
        command, told = [sys.executable, "-m", "ckpt", "drain", str(self._root)], b""
        if self._options is not None:
            command, told = [*command, "--options-from-stdin"], json.dumps(dict(self._options)).encode()
            if len(told) > _MOST_TOLD_BYTES:
                raise ValueError(f"the options of the store are too long: {len(told)} bytes")
        log = open_log(self.log, _MOST_LOG_BYTES)
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", _START, *command],
                input=told,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                env=_environment(),
                start_new_session=True,
                timeout=_START_TIMEOUT_S,
                check=False,
            )
        finally:
            os.close(log)
        if done.returncode != 0 or not done.stdout.isdigit():
            raise ValueError(f"'{sys.executable}' has ended with {done.returncode}; '{self.log}' may say why")
        return int(done.stdout)

    def _tell(self, text: str) -> str:
        if not self._told:
            self._told = True
            logger.warning("%s", text)
        return text


def _environment() -> dict[str, str]:
    """That of this process; but what is imported is this very ckpt, and nothing that lies in a working directory."""
    here = str(Path(__file__).absolute().parents[2])
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if here not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):  # it would hide the standard library there
        paths.insert(0, here)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
