"""Commands as a user types them, in this process; and directories of checkpoints that they are tried on."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import options

import ckpt
from ckpt.cli.main import main
from ckpt.directory import manifest as manifests
from ckpt.directory.step_names import step_name
from ckpt.storage import temporary_names


class Said(NamedTuple):
    """What a command has answered."""

    code: int
    out: str
    err: str


class Shell:
    """
    Args:
        capture: pytest's capsys.
    """

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *words: str | Path) -> Said:
        self._capture.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:
            code = int(str(error.code))
        return Said(code, *self._capture.readouterr())

    def json(self, *words: str | Path, code: int = 0) -> dict[str, Any]:
        """The document, of a command that must end with this code."""
        said = self(*words, "--json")
        assert said.code == code, said.out + said.err
        document: dict[str, Any] = json.loads(said.out)
        assert document["schema"] == 1 and document["command"] == str(words[0])
        return document


def state(step: int) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((4, 8), float(step)), "bias": torch.arange(8, dtype=torch.int64)},
        "step": step,
    }


def save_steps(directory: Path, *steps: int, keep: int | None = None) -> None:
    with ckpt.Checkpointer(directory, keep=keep, options=options()) as checkpointer:
        checkpointer.restore()
        for step in steps:
            checkpointer.save(step, state(step))
            checkpointer.wait()


def step_in(directory: Path, step: int) -> Path:
    return directory / step_name(step)


def unname_manifest(directory: Path, *, token: str = "") -> Path:
    """As a crash leaves it between the writing of the manifest and its name."""
    final = directory / manifests.NAME
    aside = temporary_names.temporary_by(final, token or f"{'0' * 8}-1-{'0' * 9}")
    return final.rename(aside)


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True)
    return target


_HOLDER = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(lock, fcntl.LOCK_EX)
os.pwrite(lock, b"process 1 on elsewhere", 0)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Meanwhile another process has the lock of the directory, as a job that saves there."""
    words = [sys.executable, "-c", _HOLDER, str(directory / ".lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        yield
        holder.communicate()
