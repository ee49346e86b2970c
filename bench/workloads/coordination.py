"""How long the ranks of a job need to agree: gather of 300 bytes from each at rank 0, then a verdict of 300 bytes to all.

Rank 0 is real: it runs the coordinator that a job runs. The other ranks are simulated by two processes that make, for each of
their ranks in turn, the very calls that such a rank makes (post the answer; wait for the verdict and read it), over one
connection for each process, or one file system client. So the requests and their bytes are those of a real job, but

* they come from two connections on this machine rather than from as many as there are ranks, over a network: the memory and the
  descriptors of a server with 16,384 connections are not in the picture;
* the ranks of one process pay their round trips one after the other, where real ranks pay them at the same time: the
  numbers are upper bounds in this respect;
* server, rank 0 and clients share the cores of this machine;
* the greeting at the construction of a coordinator is left out.

    python -m bench.run --workload coordination
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench.measure.report import Report
from bench.measure.sampling import Sample, Settings, clock, note
from ckpt.coordinator.base import Coordinator
from ckpt.coordinator.shared_directory import FOLDER, FileCoordinator
from ckpt.coordinator.torch_store import StoreCoordinator

STORE_RANKS = (64, 512, 4096, 16384)
FILE_RANKS = (64, 512, 4096)
PAYLOAD = bytes(300)
CLIENTS = 2
TIMEOUT_S = 300.0
SESSION = "s-bench"


def measure_coordination(settings: Settings, report: Report) -> None:
    with settings.workspace() as directory:
        cases = [("torch", ranks) for ranks in STORE_RANKS] + [("file", ranks) for ranks in FILE_RANKS]
        for kind, ranks in cases:
            size = max(CLIENTS + 1, settings.sized(ranks))
            samples = rounds_of(kind, size, directory, settings.rounds_or(5))
            for quantity in ("agreed_s", "gathered_s"):
                column = [Sample(sample.started_s, {quantity: sample.values[quantity]}) for sample in samples]
                per_rank_us = min(sample.main for sample in column) / size * 1e6
                how = (
                    "clock on rank 0 from telling the clients to begin until "
                    + ("all ranks have read the verdict" if quantity == "agreed_s" else "gather() has returned")
                    + f"; {CLIENTS} processes act for {size - 1} ranks"
                )
                case = f"{kind}, {size} ranks"
                report.add("coordination", case, "s", column, nbytes=2 * size * len(PAYLOAD), how=how, per_rank_us=per_rank_us)


def rounds_of(kind: str, size: int, directory: Path, rounds: int) -> list[Sample]:
    """One more round beforehand does not count."""
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    with tempfile.TemporaryDirectory(dir=directory) as place, clients(kind, size, place, server.port, rounds + 1):
        coordinator = rank_zero(kind, size, Path(place), server)
        server.wait([f"ready/{number}" for number in range(CLIENTS)])
        samples = []
        for number in range(-1, rounds):
            note(f"coordination: {kind}, {size} ranks, round {number + 1}/{rounds}")
            started_s = clock()
            server.set(f"go/{number}", "")
            gathered = coordinator.gather(f"bench/{number}", PAYLOAD, TIMEOUT_S)
            gathered_s = clock() - started_s
            coordinator.broadcast(f"bench/{number}", PAYLOAD, TIMEOUT_S)
            server.wait([f"done/{number}/{client}" for client in range(CLIENTS)])
            agreed_s = clock() - started_s
            if gathered != [PAYLOAD] * size:
                raise AssertionError("the answers are not those that were sent")
            if number >= 0:
                samples.append(Sample(started_s, {"agreed_s": agreed_s, "gathered_s": gathered_s}))
        return samples


def rank_zero(kind: str, size: int, place: Path, store: Any) -> Coordinator:
    """A coordinator that has greeted nobody."""
    if kind == "torch":
        coordinator: Any = StoreCoordinator(store, 0, 1)
        coordinator._session = SESSION
    else:
        coordinator = FileCoordinator(place, 0, 1)
        coordinator._session = place / FOLDER / SESSION
        for name in ("posts", "words"):
            (coordinator._session / name).mkdir(parents=True)
    coordinator.world_size = size
    assert isinstance(coordinator, Coordinator)
    return coordinator


@contextlib.contextmanager
def clients(kind: str, size: int, place: str, port: int, rounds: int) -> Iterator[None]:
    processes = []
    for number in range(CLIENTS):
        arguments = [kind, str(size), place, str(port), str(rounds), str(number)]
        processes.append(subprocess.Popen([sys.executable, "-m", "bench.workloads.coordination", *arguments]))
    try:
        yield
        for process in processes:
            if process.wait(TIMEOUT_S) != 0:
                raise AssertionError("a client failed")
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ---- a client process ------------------------------------------------------------------------------------------------


def post_and_hear(
    kind: str, size: int, place: Path, store: Any
) -> tuple[Callable[[int, str], None], Callable[[int, str], bytes]]:
    """What a rank does: posts its answer, and reads the verdict."""
    rank: Any = rank_zero("torch", size, place, store) if kind == "torch" else FileCoordinator(place, 0, 1)
    rank.world_size = size
    if kind == "file":
        rank._session = place / FOLDER / SESSION

    def post(number: int, key: str) -> None:
        rank.rank = number
        rank.gather(key, PAYLOAD, TIMEOUT_S)

    def hear(number: int, key: str) -> bytes:
        rank.rank = number
        return bytes(rank.broadcast(key, None, TIMEOUT_S))

    return post, hear


def act(kind: str, size: int, place: Path, port: int, rounds: int, client: int) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    post, hear = post_and_hear(kind, size, place, store)
    mine = range(1 + client, size, CLIENTS)
    store.set(f"ready/{client}", "")
    for number in range(-1, rounds - 1):
        store.wait([f"go/{number}"])
        for rank in mine:
            post(rank, f"bench/{number}")
        for rank in mine:
            if hear(rank, f"bench/{number}") != PAYLOAD:
                raise AssertionError("the verdict is not what was said")
        store.set(f"done/{number}/{client}", "")


if __name__ == "__main__":
    kind, size, place, port, rounds, client = sys.argv[1:]
    act(kind, int(size), Path(place), int(port), int(rounds), int(client))
