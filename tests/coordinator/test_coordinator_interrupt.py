"""interrupt() where a conforming job cannot show it: a store whose server is stopped, and the end of a process that waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed
from places import PYTHONPATH
from support import patience, stop, wait_until
from test_coordinator import free_port, make_together, without_ranks

from ckpt.coordinator import closing, waiting
from ckpt.coordinator.torch_store import StoreCoordinator
from ckpt.errors import CheckpointError, ClosedError, PeerError

POST_S = 1.0  # instead of 5, so that this does not take so long
LONG_S = 600.0
CONNECTING = timedelta(seconds=5)
PROMPT_S = patience(5.0)
SLACK_S = patience(5.0)
GIVEN_UP = "was given up: this process is closing its checkpoints"

SERVER = """
import sys, torch.distributed
store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""

# Rank 0 has the store in its own process, and a thread that has been waiting in it when the process ends.
ENDING = """
import os, sys, threading, time, torch.distributed
from pathlib import Path
from ckpt.coordinator import make_coordinator
from ckpt.errors import ClosedError
from support import standard_output_for_answers
answers = standard_output_for_answers()

def wait():
    try:
        coordinator.gather("never/1", b"", 600.0) if coordinator.rank == 0 else coordinator.broadcast("never/1", None, 600.0)
    except ClosedError:
        print("given up", file=answers)

torch.distributed.init_process_group("gloo")
coordinator = make_coordinator("torch", directory=Path("unused"))
threading.Thread(target=wait).start()
time.sleep(0.2)
coordinator.interrupt()
coordinator.close()
"""


@pytest.fixture
def server() -> Iterator[tuple[int, int]]:
    """(pid, port) of a process that serves a store."""
    program = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        yield program.pid, int(program.stdout.readline())
    finally:
        program.kill()
        program.communicate()


@pytest.fixture(params=["alone", "by node"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether rank 0 speaks for rank 1, too."""
    for name in os.environ.keys() - without_ranks().keys():
        monkeypatch.delenv(name)
    if request.param == "alone":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


Outcome = Future[tuple["BaseException | None", float]]


def store_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "ckpt-store"}


class Timed:
    """Calls in threads of their own; how each ended, and when, seconds after `started`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self.started = time.monotonic()

    def call(self, work: Callable[[], object]) -> Outcome:
        return self._pool.submit(self._run, work)

    def _run(self, work: Callable[[], object]) -> tuple[BaseException | None, float]:
        try:
            work()
        except CheckpointError as error:
            return error, time.monotonic() - self.started
        return None, time.monotonic() - self.started


def assert_ended(future: Outcome, kind: type[CheckpointError] | None, within_s: float) -> None:
    error, after_s = future.result(30)
    assert type(error) is (kind or type(None)), error
    assert after_s < within_s, f"{error!r} after {after_s:.2f} s"
    assert kind is not ClosedError or GIVEN_UP in str(error)


@pytest.mark.usefixtures("way")
def test_a_store_whose_server_is_stopped(server: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "POST_S", POST_S)
    pid, port = server
    store = torch.distributed.TCPStore("127.0.0.1", port, timeout=CONNECTING, wait_for_workers=False)
    zero, one = make_together([lambda rank=rank: StoreCoordinator(store, rank, 2, timeout_s=10) for rank in range(2)])
    with ThreadPoolExecutor(16) as pool:
        timed = Timed(pool)
        waits = [timed.call(lambda: zero.gather("gathered/1", b"", LONG_S))]
        waits += [timed.call(lambda: one.broadcast("told/1", None, LONG_S))]
        time.sleep(0.2)  # both wait in the server
        stop(pid)
        try:
            waits += [timed.call(lambda: zero.gather("gathered-late/1", b"", LONG_S))]
            posts = [timed.call(lambda: one.gather("posted/1", b"", LONG_S))]
            words = [timed.call(lambda: zero.broadcast("word/1", b"", LONG_S))]
            time.sleep(0.2)
            assert not any(future.done() for future in waits + posts + words)
            timed.started = time.monotonic()
            zero.interrupt()
            one.interrupt()
            posts += [timed.call(lambda: one.gather("posted/2", b"", LONG_S))]
            words += [timed.call(lambda: zero.broadcast("word/2", b"", LONG_S))]
            for future in waits:
                assert_ended(future, ClosedError, PROMPT_S)
            for future in posts:
                assert_ended(future, PeerError, POST_S + SLACK_S)
            for future in words:
                assert_ended(future, CheckpointError, POST_S + SLACK_S)
            timed.started = time.monotonic()
            for future in [timed.call(zero.close), timed.call(one.close)]:
                assert_ended(future, None, closing.LINGER_S + SLACK_S)
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("way", ["alone"], indirect=True)  # else there is one that waits for nothing, and stays
@pytest.mark.usefixtures("way")
def test_the_threads_of_waits_that_were_given_up_end(server: tuple[int, int]) -> None:
    """Also where the server is stopped: one that came back while the interpreter ends would abort the process."""
    pid, port = server
    store = torch.distributed.TCPStore("127.0.0.1", port, timeout=CONNECTING, wait_for_workers=False)
    before = store_threads()
    zero, one = make_together([lambda rank=rank: StoreCoordinator(store, rank, 2, timeout_s=10) for rank in range(2)])
    with ThreadPoolExecutor(4) as pool:
        timed = Timed(pool)
        waits = [timed.call(lambda: zero.gather("gathered/1", b"", LONG_S))]
        waits += [timed.call(lambda: one.broadcast("told/1", None, LONG_S))]
        time.sleep(0.2)
        stop(pid)
        try:
            timed.started = time.monotonic()
            zero.interrupt()
            one.interrupt()
            for future in waits:
                assert_ended(future, ClosedError, PROMPT_S)
            wait_until(lambda: not store_threads() - before, 5.0, "the end of the threads")
        finally:
            os.kill(pid, signal.SIGCONT)
        pool.submit(one.close)
        zero.close()


@pytest.mark.usefixtures("way")
def test_what_is_posted_in_time_after_a_stop_arrives(server: tuple[int, int]) -> None:
    """The server goes on before the time of a post is over."""
    pid, port = server
    store = torch.distributed.TCPStore("127.0.0.1", port, timeout=CONNECTING, wait_for_workers=False)
    zero, one = make_together([lambda rank=rank: StoreCoordinator(store, rank, 2, timeout_s=10) for rank in range(2)])
    with ThreadPoolExecutor(4) as pool:
        stop(pid)
        post = pool.submit(one.gather, "posted/1", b"one", LONG_S)
        word = pool.submit(zero.broadcast, "word/1", b"zero", LONG_S)
        time.sleep(0.2)
        one.interrupt()
        time.sleep(0.2)
        assert not post.done()
        os.kill(pid, signal.SIGCONT)
        assert post.result(5) is None
        assert word.result(5) == b"zero"
        assert zero.gather("posted/1", b"zero", 5.0) == [b"zero", b"one"]
        pool.submit(one.close)
        zero.close()


def test_a_process_whose_wait_was_given_up_ends_well() -> None:
    """In spite of threads that are still in a call of the store, and of a store that ends with the process."""
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables |= {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ENDING],
            env=without_ranks() | variables | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        said, errors = rank.communicate(timeout=patience(60))
        assert (rank.returncode, said) == (0, "given up\n"), errors
