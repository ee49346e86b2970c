"""How long the ranks of a job need to agree: gather of 300 bytes from each at rank 0, then a verdict of 300 bytes to all.

Rank 0 is real: it runs the coordinator that a job runs. The other ranks are simulated by two processes that make, for each of
their ranks in turn, the very calls that such a rank makes (post the answer; wait for the verdict and read it), over one
connection for each process, or one file system client. That is the flat way. By node, they make the calls of the leaders
alone: one post with the answers of 8 ranks, one wait. What the ranks of a node do among themselves is the same on every node,
at the same time, and measured apart: "one node", 8 real processes, of which one is rank 0, on this machine. So the requests and
their bytes are those of a real job, but

* they come from two connections on this machine rather than from as many as there are ranks, over a network: the memory and the
  descriptors of a server with 16,384 connections are not in the picture;
* the ranks or leaders of one process pay their round trips one after the other, where real ones pay them at the same time: the
  numbers are upper bounds in this respect;
* server, rank 0 and clients share the cores of this machine;
* what rank 0 does before its verdict is measured apart, see deciding.py;
* the greeting at the construction of a coordinator is left out.

    python -m bench.run --workload coordination
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from bench.measure.report import Report
from bench.measure.sampling import Sample, Settings, clock, note
from bench.workloads.deciding import decisions
from ckpt.coordinator.base import Coordinator
from ckpt.coordinator.shared_directory import FOLDER, FileCoordinator
from ckpt.coordinator.torch_store import StoreCoordinator

STORE_RANKS = (64, 512, 1024, 4096, 16384)
FILE_RANKS = (64, 512, 4096)
DECIDED_RANKS = (1024, 4096, 16384)
NODE_RANKS = 8
PAYLOAD = bytes(300)
CLIENTS = 2
TIMEOUT_S = 300.0
SESSION = "s-bench"


def measure_coordination(settings: Settings, report: Report) -> None:
    with settings.workspace() as directory:
        cases = [("torch", ranks) for ranks in STORE_RANKS] + [("file", ranks) for ranks in FILE_RANKS]
        for kind, ranks in cases:
            size = max(CLIENTS + 1, settings.sized(ranks))
            for ranks_per_node in (1, NODE_RANKS):
                if size % ranks_per_node == 0:
                    samples = rounds_of(kind, size, ranks_per_node, directory, settings.rounds_or(5))
                    add_lines(
                        report, f"{kind}{way_of(ranks_per_node)}, {size} ranks", size, samples, "simulated", ranks_per_node
                    )
        for kind in ("torch", "file"):
            samples = node_rounds(kind, directory, settings.rounds_or(5))
            add_lines(report, f"one node, {kind}, {NODE_RANKS} ranks", NODE_RANKS, samples, "real processes", NODE_RANKS)
        for ranks in DECIDED_RANKS:
            size = max(1, settings.sized(ranks))
            note(f"coordination: rank 0 decides, {size} ranks")
            with tempfile.TemporaryDirectory(dir=directory) as place:
                samples = decisions(size, Path(place), settings.rounds_or(5))
            how = "clock on rank 0 from the return of gather() to the call of broadcast(), of a save of a small file a rank"
            report.add("coordination", f"rank 0 decides, {size} ranks", "s", samples, nbytes=0, how=how)


def way_of(ranks_per_node: int) -> str:
    return "" if ranks_per_node == 1 else " by node"


def add_lines(report: Report, case: str, size: int, samples: list[Sample], others: str, ranks_per_node: int) -> None:
    for quantity in ("agreed_s", "gathered_s"):
        column = [Sample(sample.started_s, {quantity: sample.values[quantity]}) for sample in samples]
        per_rank_us = min(sample.main for sample in column) / size * 1e6
        how = (
            "clock on rank 0 from telling the others to begin until "
            + ("all ranks have read the verdict" if quantity == "agreed_s" else "gather() has returned")
            + f"; the other {size - 1} ranks: {others}"
        )
        more = {"per_rank_us": per_rank_us, "ranks_per_node": ranks_per_node}
        report.add("coordination", case, "s", column, nbytes=2 * size * len(PAYLOAD), how=how, **more)


def rounds_of(kind: str, size: int, ranks_per_node: int, directory: Path, rounds: int) -> list[Sample]:
    """One more round beforehand does not count."""
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    everybody = [str(number) for number in range(CLIENTS)]
    with tempfile.TemporaryDirectory(dir=directory) as place:
        arguments = [
            [kind, str(size), str(ranks_per_node), place, str(server.port), str(rounds + 1), each] for each in everybody
        ]
        with clients(arguments):
            coordinator = rank_zero(kind, size, Path(place), server)
            server.wait([f"ready/{each}" for each in everybody])
            name = f"{kind}{way_of(ranks_per_node)}, {size} ranks"
            return measured(coordinator, server, everybody, rounds, name)


def node_rounds(kind: str, directory: Path, rounds: int) -> list[Sample]:
    """Of a job with one node, whose ranks are real."""
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    others = [str(rank) for rank in range(1, NODE_RANKS)]
    with tempfile.TemporaryDirectory(dir=directory) as place:
        arguments = [[f"{kind}-rank", str(NODE_RANKS), rank, place, str(server.port), str(rounds + 1), rank] for rank in others]
        with clients(arguments):
            coordinator = real_rank(kind, 0, NODE_RANKS, Path(place), server)
            try:
                server.wait([f"ready/{each}" for each in others])
                return measured(coordinator, server, others, rounds, f"one node, {kind}")
            finally:
                coordinator.close()


def measured(coordinator: Coordinator, server: Any, others: Sequence[str], rounds: int, name: str) -> list[Sample]:
    samples = []
    for number in range(-1, rounds):
        note(f"coordination: {name}, round {number + 1}/{rounds}")
        started_s = clock()
        server.set(f"go/{number}", "")
        gathered = coordinator.gather(f"bench/{number}", PAYLOAD, TIMEOUT_S)
        gathered_s = clock() - started_s
        coordinator.broadcast(f"bench/{number}", PAYLOAD, TIMEOUT_S)
        server.wait([f"done/{number}/{each}" for each in others])
        agreed_s = clock() - started_s
        if gathered != [PAYLOAD] * coordinator.world_size:
            raise AssertionError("the answers are not those that were sent")
        if number >= 0:
            samples.append(Sample(started_s, {"agreed_s": agreed_s, "gathered_s": gathered_s}))
    return samples


def real_rank(kind: str, rank: int, size: int, place: Path, store: Any) -> Coordinator:
    if kind == "torch":
        return StoreCoordinator(store, rank, size, TIMEOUT_S)
    return FileCoordinator(place, rank, size, TIMEOUT_S)


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
def clients(each: Sequence[Sequence[str]]) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-m", "bench.workloads.coordination", *arguments]) for arguments in each]
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


def simulated_rank(kind: str, size: int, place: Path, store: Any) -> Any:
    """Whose number is set for each call."""
    rank: Any = rank_zero("torch", size, place, store) if kind == "torch" else FileCoordinator(place, 0, 1)
    rank.world_size = size
    if kind == "file":
        rank._session = place / FOLDER / SESSION
    return rank


def act(kind: str, size: int, ranks_per_node: int, place: Path, store: Any, rounds: int, client: int) -> None:
    rank = simulated_rank(kind, size, place, store)
    nodes = [range(first, first + ranks_per_node) for first in range(0, size, ranks_per_node)]
    mine = [[each for each in node if each > 0] for node in nodes[client::CLIENTS]]
    store.set(f"ready/{client}", "")
    for number in range(-1, rounds - 1):
        store.wait([f"go/{number}"])
        for node in filter(None, mine):
            rank.rank = node[0]
            rank.send(f"bench/{number}", dict.fromkeys(node, PAYLOAD), rank.post_deadline(TIMEOUT_S))
        for node in filter(None, mine):
            rank.rank = node[0]
            if rank.broadcast(f"bench/{number}", None, TIMEOUT_S) != PAYLOAD:
                raise AssertionError("the verdict is not what was said")
        store.set(f"done/{number}/{client}", "")


def act_as_rank(kind: str, size: int, rank: int, place: Path, store: Any, rounds: int) -> None:
    coordinator = real_rank(kind, rank, size, place, store)
    store.set(f"ready/{rank}", "")
    for number in range(-1, rounds - 1):
        store.wait([f"go/{number}"])
        coordinator.gather(f"bench/{number}", PAYLOAD, TIMEOUT_S)
        if coordinator.broadcast(f"bench/{number}", None, TIMEOUT_S) != PAYLOAD:
            raise AssertionError("the verdict is not what was said")
        store.set(f"done/{number}/{rank}", "")
    coordinator.close()


def main(kind: str, size: int, number: int, place: Path, port: int, rounds: int, client: int) -> None:
    """
    Args:
        number: of ranks on a node; or, of a real rank, its own.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    if kind.endswith("-rank"):
        act_as_rank(kind.removesuffix("-rank"), size, number, place, store, rounds)
    else:
        act(kind, size, number, place, store, rounds, client)


if __name__ == "__main__":
    kind, size, number, place, port, rounds, client = sys.argv[1:]
    main(kind, int(size), int(number), Path(place), int(port), int(rounds), int(client))
