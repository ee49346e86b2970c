"""A program ends in every way a program can end; what it had begun to save is durable, and it does end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nursery import Ended, Nursery, shared_nursery
from support import patience

import ckpt

Run = Callable[..., Ended]  # of pieces of a program

ROWS = 2000

HEADER = f"""
import faulthandler, logging, os, signal, sys, threading, time
faulthandler.dump_traceback_later({patience(50)}, exit=True)
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
import torch, ckpt
from ckpt import _native
directory = sys.argv[1]
options = ckpt.Options(arena_bytes="1MiB", chunk_bytes="64KiB", writers=2, eager_bytes="4KiB", drain_timeout_s=40)
state = dict(weights=torch.arange(2000 * 256, dtype=torch.float32).reshape(2000, 256), step=1)
"""
SLOW_DISK = "_native.set_fault('pwritev', delay_s=0.01)\n"
SAVE_FILE = "pending = ckpt.save(state, directory + '/a.pt', lazy=True, options=options)\n"
SAVE_STEP = """
checkpointer = ckpt.Checkpointer(directory, options=options)
for step in range(2):
    pending = checkpointer.save(step, state, lazy=True)
"""

# Each way to end, with the exit code that it has without any checkpointing.
ENDINGS = {
    "the last line": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an uncaught error": ("raise ValueError('on purpose')", 1),
    "an error in a loop": ("for step in range(3): 1 / step", 1),
    "an interrupt": ("signal.raise_signal(signal.SIGINT); os._exit(41)", -signal.SIGINT),
    "an atexit call": ("import atexit; atexit.register(lambda: time.sleep(0.1))", 0),
    "everything deleted": ("del state, pending; import gc; gc.collect()", 0),
    "a thread still running": ("threading.Thread(target=time.sleep, args=(0.5,)).start()", 0),
    "a daemon thread": ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", 0),
}

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with shared_nursery() as nursery:
        yield nursery


@pytest.fixture
def run(nursery: Nursery, tmp_path: Path) -> Run:
    return lambda *parts: nursery.run("".join([HEADER, *parts]), str(tmp_path))


def assert_is_the_state(state: Any) -> None:
    assert torch.equal(state["weights"], torch.arange(ROWS * 256, dtype=torch.float32).reshape(ROWS, 256))


def assert_no_crash(done: Ended) -> None:
    for bad in ("terminate called", "Fatal Python error", "Segmentation", "Exception ignored"):
        assert bad not in done.stderr, done.stderr


def test_a_program_of_its_own(tmp_path: Path) -> None:
    """All the others are forked from one that has imported torch; this one is started as a user would start it."""
    program = "".join([HEADER, SLOW_DISK, SAVE_FILE, "sys.exit(3)"])
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(ckpt.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=patience(60))
    assert done.returncode == 3, done.stderr
    assert_no_crash(Ended(done.returncode, done.stdout, done.stderr))
    assert_is_the_state(ckpt.load(tmp_path / "a.pt"))


@pytest.mark.parametrize("how", ENDINGS)
def test_a_file_is_durable_after_the_program_has_ended(how: str, run: Run, tmp_path: Path) -> None:
    ending, code = ENDINGS[how]
    done = run(SLOW_DISK, SAVE_FILE, ending)
    assert done.returncode == code, done.stderr
    assert_no_crash(done)
    assert_is_the_state(ckpt.load(tmp_path / "a.pt"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("how", ["the last line", "sys.exit", "an uncaught error", "an interrupt"])
def test_a_step_is_durable_after_the_program_has_ended(how: str, run: Run, tmp_path: Path) -> None:
    ending, code = ENDINGS[how]
    done = run(SLOW_DISK, SAVE_STEP, ending)
    assert done.returncode == code, done.stderr
    assert_no_crash(done)
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        found = checkpointer.restore()
    assert found is not None and found.step == 1
    assert_is_the_state(found.state)


def test_leaving_the_block_by_an_error_drains_and_lets_the_error_out(run: Run, tmp_path: Path) -> None:
    body = """
with ckpt.Checkpointer(directory, options=options) as checkpointer:
    checkpointer.save(7, state, lazy=True)
    raise ValueError("on purpose")
"""
    done = run(SLOW_DISK, body)
    assert done.returncode == 1
    assert "ValueError: on purpose" in done.stderr
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [7]


def test_the_loop_of_a_real_training_ends_by_an_error(run: Run, tmp_path: Path) -> None:
    body = """
model = torch.nn.Linear(256, 256)
optimizer = torch.optim.Adam(model.parameters())
checkpointer = ckpt.Checkpointer(directory, options=options)
for step in range(100):
    model(torch.ones(4, 256)).square().mean().backward()
    optimizer.step()
    checkpointer.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
    if step == 10:
        raise RuntimeError("on purpose")
"""
    done = run(body)
    assert done.returncode == 1 and "on purpose" in done.stderr
    with ckpt.Checkpointer(tmp_path) as checkpointer:
        found = checkpointer.restore()
    assert found is not None and found.step == found.state["step"] == 10


def test_a_save_from_an_atexit_call_either_works_or_says_no(run: Run, tmp_path: Path) -> None:
    body = """
import atexit
def last():
    try:
        ckpt.save(state, directory + "/a.pt", options=options).result(20)
    except ckpt.CheckpointError as error:
        print("refused", type(error).__name__)
    else:
        print("saved")
"""
    before = run(body.replace("import atexit", ""), "atexit = __import__('atexit'); atexit.register(last)\n")
    assert before.returncode == 0, before.stderr
    assert_no_crash(before)
    assert ("saved" in before.stdout) == (tmp_path / "a.pt").exists()
    assert "saved" in before.stdout or "refused" in before.stdout


def test_a_save_where_no_thread_starts_any_more_says_no(run: Run, tmp_path: Path) -> None:
    """As it is during the calls of atexit since Python 3.12."""
    body = """
def refuse(_):
    raise RuntimeError("can't create new thread at interpreter shutdown")
starting, threading.Thread.start = threading.Thread.start, refuse
for call in (lambda: ckpt.save(state, directory + "/a.pt", options=options), lambda: ckpt.Checkpointer(directory)):
    try:
        call()
    except ckpt.errors.ClosedError as error:
        print("refused:", error)
threading.Thread.start = starting
ckpt.save(state, directory + "/a.pt", options=options).result(20)
"""
    done = run(body)
    assert done.returncode == 0, done.stderr
    assert_no_crash(done)
    assert done.stdout.count("refused: the interpreter is shutting down") == 2, done.stdout
    assert_is_the_state(ckpt.load(tmp_path / "a.pt"))


# ---- storage that does not come back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "save"),
    [("pwritev", SAVE_FILE), ("fdatasync", SAVE_FILE), ("fallocate", SAVE_STEP), ("fdatasync", SAVE_STEP)],
    ids=["file-pwritev", "file-fdatasync", "step-fallocate", "step-fdatasync"],
)
def test_the_drain_has_a_deadline(save: str, call: str, run: Run, tmp_path: Path) -> None:
    body = f"options = ckpt.Options(arena_bytes='8MiB', drain_timeout_s=0.3)\n_native.set_fault('{call}', delay_s=600)\n"
    begin = time.monotonic()
    done = run(body, save)
    assert time.monotonic() - begin < patience(20)
    assert done.returncode == 0, done.stderr
    assert_no_crash(done)
    assert "ERROR:ckpt:" in done.stderr and "given up" in done.stderr


@pytest.mark.parametrize("delay_s", [1.0, 2.28, 2.32, 2.4, 2.6])
def test_storage_comes_back_while_the_program_ends(delay_s: float, run: Run, tmp_path: Path) -> None:
    """Threads wake up at any moment of the interpreter's end, and must not disturb it."""
    body = (
        f"options = ckpt.Options(arena_bytes='8MiB', drain_timeout_s=0.3)\n_native.set_fault('fdatasync', delay_s={delay_s})\n"
    )
    done = run(body, SAVE_FILE, "pending.add_done_callback(lambda _: None)")
    assert done.returncode == 0, done.stderr
    assert_no_crash(done)
    assert not (tmp_path / "a.pt").exists() or ckpt.load(tmp_path / "a.pt")


@pytest.mark.parametrize(("call", "verify"), [("fdatasync", False), pytest.param("pwritev", True, marks=pytest.mark.slow)])
def test_storage_comes_back_when_nothing_but_the_c_library_is_left(call: str, verify: bool, tmp_path: Path) -> None:
    """A writer that could not be waited for goes on among the ruins: modules are cleared, static destructors have run."""
    hold_open = "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.__cxa_atexit(libc.getchar, None, None)\n"  # runs last of all
    body = f"""
options = ckpt.Options(arena_bytes='8MiB', drain_timeout_s=0.3, verify_capture={verify})
_native.set_fault('{call}', delay_s=6)
for _ in range(4000):  # so many that their memory would be unmapped
    _native.set_fault('{call}', 'another file')
"""
    command = [sys.executable, "-c", "".join([hold_open, HEADER, body, SAVE_FILE]), str(tmp_path)]
    root = Path(ckpt.__file__).parents[1]
    unmap = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that a use after free is a fault
    with subprocess.Popen(command, cwd=root, env=unmap, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        assert b"given up" in process.stderr.readline(), "the drain has passed its deadline"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(7)
        process.stdin.close()
        assert process.wait(patience(30)) == 0, process.stderr.read()


def test_an_error_that_nobody_asked_for_is_logged_at_exit(run: Run, tmp_path: Path) -> None:
    done = run("_native.set_fault('pwritev', error=28)\n", SAVE_FILE)
    assert done.returncode == 0
    assert "ERROR:ckpt:" in done.stderr and "No space left" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    ["ckpt.fence()", "pending.result()", "pending.exception()", "checkpointer.wait()", "checkpointer.close()"],
)
def test_ctrl_c_ends_a_wait_at_once(wait: str, run: Run, tmp_path: Path) -> None:
    body = f"""
_native.set_fault("pwritev", skip=1, count=2, delay_s=600)
{SAVE_STEP.replace("range(2)", "range(1)")}
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
begin = time.monotonic()
try:
    {wait}
except KeyboardInterrupt:
    print("interrupted after", time.monotonic() - begin)
_native.clear_faults()
"""
    done = run(body)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("interrupted after"), done.stdout + done.stderr
    # A closing Checkpointer gives its writers some seconds to come back from the kernel.
    assert float(done.stdout.split()[-1]) < patience(20)
    if "close" not in wait:
        with ckpt.Checkpointer(tmp_path) as checkpointer:
            assert checkpointer.steps() == [0], "the save went on, and was drained"


def test_ctrl_c_twice_during_the_drain_ends_the_program(run: Run, tmp_path: Path) -> None:
    body = """
options = ckpt.Options(arena_bytes="8MiB", drain_timeout_s=40)
_native.set_fault("pwritev", delay_s=600)
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
"""
    begin = time.monotonic()
    done = run(body, SAVE_FILE)
    assert time.monotonic() - begin < patience(20), "Ctrl-C did not shorten the drain"
    assert "terminate called" not in done.stderr and "Fatal" not in done.stderr
