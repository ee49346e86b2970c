"""One rank of a job that puts a coordinator through its paces; test_coordinator.py starts it and reads what it reports.

    coordinator_worker.py IMPLEMENTATION DIRECTORY SCENARIO...      one rank of MPI
    coordinator_worker.py --jobs JOB...                             jobs side by side, each a JSON list:
                                                                    [implementation, ranks, nodes, directory, port, scenarios]

In the second form every rank is forked from a process that has imported torch, which takes longer than most of the rest.
Every scenario is run by all ranks, in the same order, and appends a line to DIRECTORY/<rank>.jsonl. A rank that fails one ends,
and its job with it, in the second form: the others may be stopped, or wait for it for minutes. They say in DIRECTORY/<rank>.txt
where they stand; so do all that are left after JOB_S seconds, which the environment says.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from dist.coordinator_calls import SHORT_S, TIMEOUT_S, expect_given_up, expect_missing, meet, payload_of
from dist.coordinator_nodes import DYING, OF_NODES, messages
from dist.exchange import exchange
from support import patience, wait_until

from ckpt.coordinator import Coordinator, make_coordinator
from ckpt.coordinator.waiting import Pace
from ckpt.errors import ClosedError

ROUNDS = 1000
JOB_S = float(os.environ["JOB_S"]) if "JOB_S" in os.environ else patience(75.0)
FAILED = 1  # exit status of a rank

DIRECTORY = Path()


def footprint(c: Coordinator) -> int:
    """How many keys, files or messages there are."""
    if c.name == "torch":
        return int(torch.distributed.distributed_c10d._get_default_store().num_keys())
    if c.name == "file":
        return sum(len(files) for _, _, files in os.walk(DIRECTORY / ".coordination"))
    if c.name == "mpi":
        return sum(len(kept) for kept in (c._answers, c._words, c._sending, c._receiving, c._given_up))  # type: ignore[attr-defined]
    return 0


def usage() -> tuple[int, int]:
    return psutil.Process().num_fds(), threading.active_count()


# ---- scenarios -------------------------------------------------------------------------------------------------------


def order(c: Coordinator) -> None:
    gathered = c.gather("order/1", payload_of(c.rank, "1"), TIMEOUT_S)
    assert gathered == ([payload_of(rank, "1") for rank in range(c.world_size)] if c.rank == 0 else None)
    assert c.broadcast("order/1", b"verdict" if c.rank == 0 else None, TIMEOUT_S) == b"verdict"
    assert c.broadcast("order/an odd key: ä/\\?*", b"" if c.rank == 0 else None, TIMEOUT_S) == b""
    meet(c, "order/" + "long" * 100)
    assert exchange(c, "order/empty", b"", TIMEOUT_S) == [b""] * c.world_size


def large(c: Coordinator, key: str = "large/1") -> None:
    def big(rank: int) -> bytes:
        return random.Random(rank).randbytes(5_000_000 + rank)

    def digests(payloads: list[bytes]) -> list[str]:
        return [hashlib.sha256(payload).hexdigest() for payload in payloads]

    gathered = c.gather(key, big(c.rank), TIMEOUT_S)
    if gathered is not None:
        assert digests(gathered) == digests([big(rank) for rank in range(c.world_size)])
    word = c.broadcast(key, big(100) * 2 if c.rank == 0 else None, TIMEOUT_S)
    assert word == big(100) * 2


def at_exit(c: Coordinator) -> None:
    """No thread starts, as while the interpreter ends."""
    meet(c, "at_exit/before")
    with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't create new thread")):
        large(c, "at_exit/1")
        meet(c, "at_exit/after")


def many(c: Coordinator) -> None:
    """Thousands of keys leave nothing behind."""
    counts = []
    for number in range(ROUNDS):
        gathered = c.gather(f"many/{number}", b"%d:%d" % (c.rank, number), TIMEOUT_S)
        if gathered is not None:
            assert gathered == [b"%d:%d" % (rank, number) for rank in range(c.world_size)]
        word = c.broadcast(f"many/{number}", b"%d" % number if c.rank == 0 else None, TIMEOUT_S)
        assert word == b"%d" % number
        if number in (20, ROUNDS - 1):
            counts.append((footprint(c), *usage()))
    # a few keys at most may be on their way, and a connection more when two threads have waited at once
    assert all(now <= then + 2 * c.world_size for then, now in zip(*counts, strict=True)), counts
    assert counts[1][0] <= 20 + 4 * c.world_size, counts


def apart(c: Coordinator) -> None:
    """The others are done with posting before rank 0 begins, and rank 0 is done before they begin to listen."""
    numbers = range(8)
    if c.rank == 0:
        c.gather("apart.posted/0", b"", TIMEOUT_S)
    for number in numbers:
        gathered = c.gather(f"apart/{number}", b"%d:%d" % (c.rank, number), TIMEOUT_S)
        assert c.rank or gathered == [b"%d:%d" % (rank, number) for rank in range(c.world_size)]
    if c.rank == 0:
        for number in numbers:
            c.broadcast(f"apart/word-{number}", b"%d" % number, TIMEOUT_S)
        c.broadcast("apart.spoken/0", b"", TIMEOUT_S)
    else:
        c.gather("apart.posted/0", b"", TIMEOUT_S)
        c.broadcast("apart.spoken/0", None, TIMEOUT_S)
        assert [c.broadcast(f"apart/word-{number}", None, TIMEOUT_S) for number in numbers] == [b"%d" % n for n in numbers]
    meet(c, "apart/end")


def missing(c: Coordinator) -> None:
    """A rank that comes too late is named on every rank, and disturbs nothing afterwards."""
    last = c.world_size - 1
    meet(c, "missing/before")
    kept = footprint(c)
    for attempt in range(3):
        if c.rank == last:
            assert c.broadcast(f"missed/{attempt}", None, TIMEOUT_S) == b"now"
        error = expect_missing((last,), lambda key=f"missing/{attempt}": exchange(c, key, b"%d" % c.rank, SHORT_S))
        assert error.payloads == {rank: b"%d" % rank for rank in range(last)}
        if c.rank == 0:
            c.broadcast(f"missed/{attempt}", b"now", TIMEOUT_S)
        meet(c, f"missing/after-{attempt}")
    meet(c, "missing/end")
    meet(c, "missed/end")
    assert footprint(c) <= kept + 2 * c.world_size, "late answers stay behind"


def silent(c: Coordinator) -> None:
    """Rank 0 comes too late."""
    if c.rank == 0:
        assert c.gather("silent.over/1", b"", TIMEOUT_S) is not None
        c.broadcast("silent/1", b"too late", TIMEOUT_S)
    else:
        expect_missing((0,), lambda: c.broadcast("silent/1", None, SHORT_S))
        c.gather("silent.over/1", b"", TIMEOUT_S)
    meet(c, "silent/2")


def threads(c: Coordinator) -> None:
    """Two threads with streams of their own, in no step with each other."""
    failures: list[BaseException] = []

    def work(stream: str) -> None:
        try:
            for number in range(60):
                meet(c, f"{stream}/{number}")
        except BaseException as error:
            failures.append(error)

    others = [threading.Thread(target=work, args=(stream,)) for stream in ("one", "two")]
    for other in others:
        other.start()
    work("three")
    for other in others:
        other.join()
    assert not failures, failures


def training(c: Coordinator) -> None:
    """A background thread agrees, and waits for long, while the main thread uses the process group and its store."""
    failures: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            for number in range(100):
                meet(c, f"training/{number}")
            if c.rank == 0:
                done.wait(TIMEOUT_S)
            c.broadcast("training/waits", b"" if c.rank == 0 else None, TIMEOUT_S)
        except BaseException as error:
            failures.append(error)

    committer = threading.Thread(target=work)
    committer.start()
    started = time.monotonic()
    for number in range(150):
        tensor = torch.full((1000,), float(c.rank + number))
        torch.distributed.all_reduce(tensor)
        assert tensor[0] == sum(rank + number for rank in range(c.world_size))
        if number % 50 == 0:
            group = torch.distributed.new_group()  # goes through the store that the coordinator must not hold up
            torch.distributed.barrier(group)
    elapsed = time.monotonic() - started
    done.set()
    committer.join()
    assert not failures, failures
    assert elapsed < patience(10), "training was held up"


def idle(c: Coordinator) -> None:
    """Waiting is sleeping: looks are at least 5 ms apart, but for the first few, and little is done besides."""
    meet(c, "idle/before")
    gc.collect()
    with counted_looks() as looks:
        before, began = time.process_time(), time.monotonic()
        if c.rank == 1:
            time.sleep(2.5)
        c.gather("idle/1", b"", TIMEOUT_S)
        if c.rank == 0:
            used, elapsed = time.process_time() - before, time.monotonic() - began
            c.broadcast("idle/1", b"", TIMEOUT_S)
        else:
            c.broadcast("idle/1", None, TIMEOUT_S)
            used, elapsed = time.process_time() - before, time.monotonic() - began
    assert elapsed > 1
    assert len(looks) < 60 + elapsed / 0.005, f"{len(looks)} looks in {elapsed:.2f} s"
    assert used < elapsed / 5, f"{used * 1000:.0f} ms of processor in {elapsed:.2f} s: it does not sleep"


@contextlib.contextmanager
def counted_looks() -> Iterator[list[Pace]]:
    """One item for each look of a loop that polls."""
    looks: list[Pace] = []
    rest = Pace.rest

    def counted(self: Pace, found: bool = False) -> bool:
        looks.append(self)
        return rest(self, found)

    Pace.rest = counted  # type: ignore[method-assign]
    try:
        yield looks
    finally:
        Pace.rest = rest  # type: ignore[method-assign]


def stopped(c: Coordinator) -> None:
    """The last rank is stopped; when it goes on, what it does late harms nobody."""
    last = c.world_size - 1
    pids = [int(pid) for pid in exchange(c, "stopped/pids", b"%d" % os.getpid(), TIMEOUT_S)]
    if c.rank == last:
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        while psutil.Process(pids[last]).status() != psutil.STATUS_STOPPED:
            time.sleep(0.002)
    try:
        expect_missing((last,), lambda: exchange(c, "stopped/1", b"", SHORT_S))
    finally:
        if c.rank == 0:
            os.kill(pids[last], signal.SIGCONT)
    for number in range(5):
        meet(c, f"stopped/{number + 2}")


def stopped_zero(c: Coordinator) -> None:
    """Rank 0 is stopped, and with it whatever it serves: the deadlines of the others hold."""
    pids = [int(pid) for pid in exchange(c, "stopped-zero/pids", b"%d" % os.getpid(), TIMEOUT_S)]
    c.gather("stopped-zero/1", b"", TIMEOUT_S)
    if c.rank == 0:
        # It reads an answer perhaps before who gave it knows that it has been sent; a rank of its node hears that from it.
        wait_until(lambda: len([*DIRECTORY.glob("posted-*")]) == c.world_size - 1, TIMEOUT_S, "the others")
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        (DIRECTORY / f"posted-{c.rank}").touch()
        while psutil.Process(pids[0]).status() != psutil.STATUS_STOPPED:
            time.sleep(0.002)
        try:
            expect_missing((0,), lambda: c.broadcast("stopped-zero/1", None, SHORT_S))
        finally:
            (DIRECTORY / f"missed-{c.rank}").touch()
            if c.rank == 1:
                wait_until(lambda: len([*DIRECTORY.glob("missed-*")]) == c.world_size - 1, TIMEOUT_S, "the others")
                os.kill(pids[0], signal.SIGCONT)
    for number in range(5):
        meet(c, f"stopped-zero/{number + 2}")


def close(c: Coordinator) -> None:
    """The last word of rank 0 is read although it closes at once."""
    if c.rank == 0:
        c.gather("close/1", b"", TIMEOUT_S)
        c.broadcast("close/1", b"last", TIMEOUT_S)
    else:
        c.gather("close/1", b"", TIMEOUT_S)
        time.sleep(0.1 * c.rank)
        assert c.broadcast("close/1", None, TIMEOUT_S) == b"last"
    started = time.monotonic()
    c.close()
    c.close()
    assert time.monotonic() - started < patience(3)
    if c.name == "local":
        return
    try:
        c.gather("close/2", b"", TIMEOUT_S)
    except ClosedError:
        return
    raise AssertionError("it is still open")


def interrupted(c: Coordinator) -> None:
    """Rank 0 gives up waiting for a rank that does not come; what it says then is heard, also where it closes at once."""
    if c.rank == 0:
        expect_given_up(c, lambda: c.gather("interrupted/1", b"", TIMEOUT_S), after_s=0.2)
        expect_given_up(c, lambda: c.gather("interrupted/2", b"", TIMEOUT_S))
        expect_given_up(c, lambda: exchange(c, "interrupted/3", b"", TIMEOUT_S))
        assert c.broadcast("interrupted/4", b"given up", TIMEOUT_S) == b"given up"
    else:
        if c.rank < c.world_size - 1:
            c.gather("interrupted/1", b"", TIMEOUT_S)
        time.sleep(0.4 if c.rank == 1 else 0.0)
        assert c.broadcast("interrupted/4", None, TIMEOUT_S) == b"given up"
    close_soon(c)


def interrupted_others(c: Coordinator) -> None:
    """All but rank 0 give up waiting for it; what they post then arrives."""
    if c.rank == 0:
        answers = [payload_of(rank, "2") for rank in range(c.world_size)]
        assert c.gather("interrupted-others/2", answers[0], TIMEOUT_S) == answers
        assert exchange(c, "interrupted-others/3", answers[0], TIMEOUT_S) == answers
    else:
        expect_given_up(c, lambda: c.broadcast("interrupted-others/1", None, TIMEOUT_S), after_s=0.2)
        expect_given_up(c, lambda: c.broadcast("interrupted-others/1", None, TIMEOUT_S))
        c.gather("interrupted-others/2", payload_of(c.rank, "2"), TIMEOUT_S)
        expect_given_up(c, lambda: exchange(c, "interrupted-others/3", payload_of(c.rank, "2"), TIMEOUT_S))
    close_soon(c)


def interrupted_alone(c: Coordinator) -> None:
    """Who waits for nobody is not disturbed."""
    c.interrupt()
    if c.world_size == 1:
        meet(c, "interrupted-alone/1")
        assert c.broadcast("interrupted-alone/2", b"word", TIMEOUT_S) == b"word"
    close_soon(c)
    c.interrupt()


def close_soon(c: Coordinator) -> None:
    started = time.monotonic()
    c.close()
    assert time.monotonic() - started < patience(3)


def killed(c: Coordinator) -> None:
    """The last rank dies: all others say so. Then rank 0 dies."""
    last = c.world_size - 1
    meet(c, "killed/1")
    if c.rank == last:
        report("killed")
        os.kill(os.getpid(), signal.SIGKILL)
    expect_missing((last,), lambda: exchange(c, "killed/2", b"", SHORT_S))
    c.gather("killed.aware/1", b"", SHORT_S) if c.rank else None
    if c.rank == 0:
        expect_missing((last,), lambda: c.gather("killed.aware/1", b"", SHORT_S))
        report("killed")
        os.kill(os.getpid(), signal.SIGKILL)
    expect_missing((0,), lambda: c.broadcast("killed/3", None, 2 * SHORT_S + 1), 2 * SHORT_S + 1)


SCENARIOS: dict[str, Callable[[Coordinator], None]] = {
    scenario.__name__: scenario
    for scenario in (
        *(order, large, at_exit, apart, many, missing, silent, threads, training, idle, stopped, stopped_zero, messages),
        *(close, interrupted, interrupted_others, interrupted_alone, killed),
    )
}
NEED_TWO = {"apart", "missing", "silent", "idle", "stopped", "stopped_zero", "interrupted", "interrupted_others", "killed"}
NEED_NODES = {"messages"}  # known ones: MPI has no use for them
NEED_NEW = {"interrupted", "interrupted_others", "interrupted_alone", "killed"}  # a coordinator: the one before is closed


# ---- the program -----------------------------------------------------------------------------------------------------


def report(scenario: str, error: str = "", **more: Any) -> None:
    line = json.dumps({"scenario": scenario, "error": error, "seconds": time.monotonic() - report_started, **more})
    with open(DIRECTORY / f"{RANK}.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def start(which: str) -> Coordinator:
    if which == "torch" and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return make_coordinator(which, directory=DIRECTORY)


def main(which: str, names: list[str]) -> bool:
    """Whether all went well."""
    global report_started, RANK
    c: Coordinator | None = None
    for name in names:
        report_started = time.monotonic()
        try:
            if c is None or name in NEED_NEW:
                c = start(which)
                RANK = c.rank
                assert c.name == which
            if c.rank == DYING.get(name):
                report(name)
            (SCENARIOS | OF_NODES)[name](c)
        except BaseException:
            report(name, traceback.format_exc())
            return False
        report(name)
    return True


def place_of(rank: int, size: int, nodes: int) -> dict[str, str]:
    """What torchrun says to a rank of its node; the nodes have as many ranks each."""
    ranks = size // nodes
    return {"LOCAL_RANK": str(rank % ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": str(rank // ranks)}


def start_job(which: str, size: int, nodes: int, directory: str, port: int, names: list[str]) -> list[int]:
    """Forks the ranks of a job."""
    global RANK
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= place_of(rank, size, nodes)
            RANK = rank
            run_rank(which, directory, names)
        children.append(pid)
    return children


def run_rank(which: str, directory: str, names: list[str]) -> None:
    """Does not return."""
    global DIRECTORY
    DIRECTORY = Path(directory)
    with open(DIRECTORY / f"{RANK}.txt", "ab", buffering=0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    faulthandler.dump_traceback_later(JOB_S, exit=True)
    faulthandler.register(signal.SIGTERM, chain=True)
    well = main(which, names)
    if not well or {"killed", *DYING} & {*names}:
        os._exit(0 if well else FAILED)  # the ends of MPI and gloo wait for the dead
    sys.exit()


def run_jobs(jobs: list[list[Any]]) -> None:
    ranks = {pid: job for job, request in enumerate(jobs) for pid in start_job(*request)}
    while ranks:
        pid, status = os.wait()
        job = ranks.pop(pid)
        if os.waitstatus_to_exitcode(status) == FAILED:
            for other in [other for other, its in ranks.items() if its == job]:
                os.kill(other, signal.SIGTERM)
                os.kill(other, signal.SIGCONT)


report_started = 0.0
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", -1))

if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--jobs":
        run_jobs([json.loads(job) for job in sys.argv[2:]])
    else:
        run_rank(sys.argv[1], sys.argv[2], sys.argv[3:])
