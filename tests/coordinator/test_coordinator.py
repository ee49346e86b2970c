"""One suite for all coordinators, with real processes: what they promise, also when ranks are late, stopped or dead."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from dist.coordinator_nodes import OF_NODES
from dist.coordinator_worker import NEED_NODES, NEED_TWO, SCENARIOS
from dist.exchange import exchange
from places import PYTHONPATH, TESTS
from support import patience

from ckpt.coordinator import _best, make_coordinator
from ckpt.coordinator.base import Coordinator
from ckpt.coordinator.key_cleanup import MOST_LATE, MOST_UNREAD, KeyCleanup
from ckpt.coordinator.launchers import world_of
from ckpt.coordinator.local import LocalCoordinator
from ckpt.coordinator.shared_directory import FOLDER, FileCoordinator
from ckpt.coordinator.torch_store import StoreCoordinator
from ckpt.errors import CheckpointError, PeerError

WORKER = TESTS / "dist" / "coordinator_worker.py"
DEADLINE_S = 85.0  # for all jobs of an implementation, on an idle machine
Shape = tuple[int, int]  # ranks, and nodes on which as many of them are each
BY_NODE = ("file", "torch")
GROUPS: list[tuple[str, Shape]] = [
    ("local", (1, 1)),
    *((which, shape) for shape in ((4, 4), (4, 2), (2, 1), (1, 1)) for which in BY_NODE),
    *(("mpi", (size, 1)) for size in (4, 2, 1)),
]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_RANK", "SLURM_", "OMPI_", "PMI", "PMIX", "PRTE")

Line = dict[str, Any]


PAIR = (2, 1)
NOTHING = ""  # where a rank has reported nothing
TAIL = 4000  # characters of what it said
STALE_ID = b"2.0123456789abcdef"  # of a rank of a run that has ended


def without_ranks() -> dict[str, str]:
    """An environment that no launcher has touched."""
    return {name: value for name, value in os.environ.items() if not name.startswith(RANK_VARIABLES)}


def why_no_mpi() -> str:
    """Empty if MPI programs can be run."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed"
    return "" if mpirun() else "there is no mpirun"


def mpirun() -> str | None:
    return shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def scenarios(which: str, shape: Shape) -> list[str]:
    """Those that make sense for so many ranks; what closes the coordinator comes last, as the table has it."""
    names = [name for name in SCENARIOS if shape[0] > 1 or name not in {*NEED_TWO, *NEED_NODES}]
    names = [name for name in names if which in BY_NODE or name not in NEED_NODES]
    return [name for name in names if name != "training" or which == "torch"]


# ---- jobs ------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


Reports = dict[Shape, list[dict[str, Line]]]


def run_jobs(which: str, shapes: list[Shape], root: Path, names: list[str] | None = None) -> Reports:
    """What each rank reports, by scenario, for jobs of so many ranks: at once, but those of MPI one after the other."""
    jobs = []
    for size, nodes in shapes:
        directory = place_for(root, (size, nodes))
        directory.mkdir(exist_ok=True)
        for old in [*directory.glob("*.jsonl"), *directory.glob("*.txt")]:
            old.unlink()
        jobs.append([which, size, nodes, str(directory), free_port(), names or scenarios(which, (size, nodes))])
    if which == "mpi":
        # Open MPI ends the whole job when a rank dies, unless it is told not to.
        options = [str(mpirun()), "--allow-run-as-root", "--oversubscribe", "--enable-recovery"]
        for _, size, _, place, _, chosen in jobs:
            run_program([*options, "-n", str(size), sys.executable, str(WORKER), which, str(place), *chosen], root)
    else:
        run_program([sys.executable, str(WORKER), "--jobs", *map(json.dumps, jobs)], root)
    return {shape: read_reports(place_for(root, shape), shape[0]) for shape in shapes}


def place_for(root: Path, shape: Shape) -> Path:
    return root / "x".join(map(str, shape))


def run_program(command: list[str], root: Path) -> None:
    """Whatever it started is gone at the end, also what is stopped."""
    deadline_s = patience(DEADLINE_S)
    with open(root / "output.txt", "a", encoding="utf-8") as output:
        env = without_ranks() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "JOB_S": f"{0.8 * deadline_s}"}
        program = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
        try:
            program.wait(deadline_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()


def read_reports(directory: Path, size: int) -> list[dict[str, Line]]:
    reports = []
    for rank in range(size):
        path = directory / f"{rank}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        said = path.with_suffix(".txt").read_text(errors="replace")[-TAIL:] if path.with_suffix(".txt").exists() else ""
        reports.append({line["scenario"]: line for line in lines} | {NOTHING: {"error": f"no report; it said last:\n{said}"}})
    return reports


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """In memory, where there is such a place: thousands of fsyncs on a disk take their time and prove nothing here."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="coordinators-", dir=place) as made:
        yield Path(made)


Jobs = dict[tuple[str, Shape], "Future[Reports]"]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """What has processes of its own runs beside the rest: it waits more than it works."""
    with ThreadPoolExecutor(4) as made:
        yield made


@pytest.fixture(scope="module")
def jobs(root: Path, pool: ThreadPoolExecutor) -> Jobs:
    """All jobs that conform. Ranks are stopped, killed or idle for much of the time, and processes of ours are forked."""
    futures: Jobs = {}
    for which in ("file", "torch", "mpi", "local"):
        (root / which).mkdir()
        if which == "mpi" and why_no_mpi():
            continue
        shapes = [shape for name, shape in GROUPS if name == which]
        for some in [[shape] for shape in shapes] if which == "mpi" else [shapes]:
            future = pool.submit(run_jobs, which, some, root / which)
            futures |= {(which, shape): future for shape in some}
    return futures


@pytest.fixture(scope="module")
def others(root: Path, pool: ThreadPoolExecutor, jobs: Jobs) -> dict[str, Future[Any]]:
    """The jobs of single tests, behind those."""
    programs: dict[str, Callable[[Path], Any]] = {"crash": crash_and_run_again, "restart": restart_under_torchrun}
    programs |= {f"lost {which}": functools.partial(lose_leaders, which) for which in BY_NODE}
    futures = {}
    for name, program in programs.items():
        (root / name).mkdir()
        futures[name] = pool.submit(program, root / name)
    return futures


def assert_went_well(reports: list[dict[str, Line]], name: str) -> None:
    failed = {rank: lines.get(name, lines[NOTHING])["error"] for rank, lines in enumerate(reports)}
    assert not any(failed.values()), "\n".join(f"rank {rank}: {error}" for rank, error in failed.items() if error)


@pytest.mark.usefixtures("others")  # so that those run meanwhile
@pytest.mark.parametrize(
    ("which", "shape", "name"),
    [(which, shape, name) for which, shape in GROUPS for name in scenarios(which, shape)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else value,
)
def test_conforms(jobs: Jobs, which: str, shape: Shape, name: str) -> None:
    if which == "mpi" and why_no_mpi():
        pytest.skip(why_no_mpi())
    assert_went_well(jobs[which, shape].result()[shape], name)


def crash_and_run_again(place: Path) -> list[dict[str, Line]]:
    """A run that is killed, then one with the same directory and the same keys; returns the reports of the second."""
    assert_went_well(run_jobs("file", [PAIR], place, ["order", "killed"])[PAIR], "killed")
    folder = place_for(place, PAIR) / FOLDER
    assert any(path.name.startswith("s-") for path in folder.iterdir()), "the first run left nothing: this proves nothing"
    (folder / "hello").mkdir(exist_ok=True)
    for rank in (1, 2, 7):
        (folder / "hello" / str(rank)).write_bytes(STALE_ID)
    (folder / "session").write_bytes(b"s-gone".ljust(32) + STALE_ID * 8)
    return run_jobs("file", [PAIR], place, ["order", "close"])[PAIR]


def test_what_a_crashed_run_left_is_ignored_and_removed(others: dict[str, Future[Any]], root: Path) -> None:
    reports = others["crash"].result()
    for name in ("order", "close"):
        assert_went_well(reports, name)
    assert not (place_for(root / "crash", PAIR) / FOLDER).exists()


def lose_leaders(which: str, place: Path) -> dict[str, list[dict[str, Line]]]:
    """What the ranks of a job for each scenario report, by its name; side by side, because most of the time they wait."""
    jobs = []
    for name in OF_NODES:
        (place / name).mkdir()
        jobs.append([which, 4, 2, str(place / name), free_port(), [name]])
    run_program([sys.executable, str(WORKER), "--jobs", *map(json.dumps, jobs)], place)
    return {name: read_reports(place / name, 4) for name in OF_NODES}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("name", OF_NODES)
@pytest.mark.parametrize("which", BY_NODE)
def test_a_node_whose_leader_is_lost(others: dict[str, Future[Any]], which: str, name: str) -> None:
    """Its member goes alone, and rank 0 misses the leader alone."""
    assert_went_well(others[f"lost {which}"].result()[name], name)


def restart_under_torchrun(place: Path) -> None:
    """Two attempts of two ranks, with one store in the agent."""
    options = ["--nproc_per_node=2", "--max-restarts=1", "--monitor-interval=0.1", "--rdzv-backend=c10d"]
    options += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", str(TESTS / "dist" / "elastic_worker.py"), str(place)]
    run_program([sys.executable, "-m", "torch.distributed.run", *options], place)


def test_a_restart_under_torchrun_does_not_see_the_first_attempt(others: dict[str, Future[Any]], root: Path) -> None:
    others["restart"].result()
    said = {path.name: path.read_text() for path in (root / "restart").iterdir()}
    assert {"0.0", "0.1", "1.0", "1.1"} <= said.keys(), said["output.txt"]
    assert said["0.0"] == "0, 0 stale keys"
    assert said["0.1"] == "0 0:0 0:1 0, 0 stale keys"
    assert said["1.0"].startswith("1, ") and said["1.0"] != "1, 0 stale keys", "the second attempt had another store"
    assert said["1.1"] == "1 1:0 1:1 1, 0 stale keys"


# ---- other stores, and older versions of torch -----------------------------------------------------------------------


def make_together(makers: list[Callable[[], Coordinator]]) -> list[Coordinator]:
    """In a thread each: they wait for each other."""
    with ThreadPoolExecutor(len(makers)) as pool:
        return [future.result() for future in [pool.submit(maker) for maker in makers]]


def exchange_together(coordinators: list[Coordinator], key: str, timeout_s: float = 10.0) -> list[Any]:
    def one(c: Coordinator) -> Any:
        try:
            return exchange(c, key, b"%d" % c.rank, timeout_s)
        except PeerError as error:
            return error

    with ThreadPoolExecutor(len(coordinators)) as pool:
        return [*pool.map(one, coordinators)]


def close_together(coordinators: list[Coordinator]) -> None:
    with ThreadPoolExecutor(len(coordinators)) as pool:
        list(pool.map(lambda c: c.close(), coordinators))


@pytest.fixture(scope="module")
def warm_store() -> None:
    """The first server of a process opens a pipe that is never closed."""
    torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize("clone", [True, False], ids=["clone", "no clone"])
@pytest.mark.parametrize("kind", ["tcp", "legacy tcp", "hash", "file"])
@pytest.mark.usefixtures("warm_store", "leaks_nothing")
def test_every_store_of_torch(kind: str, clone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not clone:
        monkeypatch.delattr(torch.distributed.Store, "clone", raising=False)  # older torch has none
    timeout = timedelta(seconds=10)
    if kind.endswith("tcp"):
        server = torch.distributed.TCPStore(
            "127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False, use_libuv=kind == "tcp"
        )
    else:
        server = torch.distributed.HashStore() if kind == "hash" else torch.distributed.FileStore(str(tmp_path / "store"), -1)
    store = torch.distributed.PrefixStore("a/", torch.distributed.PrefixStore("b/", server))
    three = make_together([lambda rank=rank: StoreCoordinator(store, rank, 3, timeout_s=10) for rank in range(3)])
    assert exchange_together(three, "one/1") == [[b"0", b"1", b"2"]] * 3
    errors = exchange_together(three[:2], "one/2", timeout_s=0.3)
    assert [(error.ranks, error.payloads) for error in errors] == [((2,), {0: b"0", 1: b"1"})] * 2
    assert exchange_together(three[2:], "one/2", timeout_s=0.3)[0].ranks == (2,), "the verdict is still there"
    assert exchange_together(three, "one/3") == [[b"0", b"1", b"2"]] * 3
    close_together(three)


def test_a_missing_rank_at_the_beginning_is_named(tmp_path: Path) -> None:
    store = torch.distributed.HashStore()
    started = time.monotonic()
    with pytest.raises(PeerError, match="rank 1 did not answer") as caught:
        StoreCoordinator(store, 0, 2, timeout_s=0.3)
    assert caught.value.ranks == (1,)
    with pytest.raises(PeerError, match="rank 1 did not answer"):
        FileCoordinator(tmp_path, 0, 2, timeout_s=0.3)
    with pytest.raises(PeerError, match="heard nothing from rank 0"):
        FileCoordinator(tmp_path, 1, 2, timeout_s=0.3)
    with pytest.raises(PeerError, match="heard nothing from rank 0"):
        StoreCoordinator(torch.distributed.HashStore(), 1, 2, timeout_s=0.3)
    assert time.monotonic() - started < patience(3)


def test_a_hello_that_is_replaced_gets_a_new_session_file(tmp_path: Path) -> None:
    """Rank 0 waits with a stale hello of rank 1 before it; the real one comes later."""
    hello = tmp_path / FOLDER / "hello"
    hello.mkdir(parents=True)
    (hello / "1").write_bytes(STALE_ID)
    with ThreadPoolExecutor(1) as pool:
        zero = pool.submit(FileCoordinator, tmp_path, 0, 2, 10.0)
        deadline = time.monotonic() + 10
        while not (tmp_path / FOLDER / "session").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        two = [FileCoordinator(tmp_path, 1, 2, timeout_s=10.0)]
        two.insert(0, zero.result())
    assert exchange_together([*two], "one/1") == [[b"0", b"1"]] * 2
    close_together([*two])
    assert not (tmp_path / FOLDER).exists()


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - without_ranks().keys():
        monkeypatch.delenv(name)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'auto', 'local', 'torch', 'mpi', 'file'"):
        make_coordinator("store", directory=tmp_path)


def test_a_coordinator_is_returned_as_it_is(tmp_path: Path) -> None:
    mine = LocalCoordinator()
    assert make_coordinator(mine, directory=tmp_path) is mine


@pytest.mark.usefixtures("no_launcher")
def test_a_name_that_cannot_work_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"init_process_group\(\) first"):
        make_coordinator("torch", directory=tmp_path)
    with pytest.raises(CheckpointError, match="set RANK and WORLD_SIZE"):
        make_coordinator("file", directory=tmp_path)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(CheckpointError, match="install them"):
        make_coordinator("mpi", directory=tmp_path)


def fake_mpi(monkeypatch: pytest.MonkeyPatch, **calls: Any) -> None:
    facts = {"Is_initialized": True, "Is_finalized": False, "Query_thread": 2, "size": 1} | calls
    mpi = types.SimpleNamespace(THREAD_MULTIPLE=3, COMM_WORLD=types.SimpleNamespace(Get_size=lambda: facts["size"]))
    for name in ("Is_initialized", "Is_finalized", "Query_thread"):
        setattr(mpi, name, lambda value=facts[name]: value)
    package = types.ModuleType("mpi4py")
    package.MPI = mpi  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)


@pytest.mark.usefixtures("no_launcher")
def test_mpi_without_threads_or_not_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mpi(monkeypatch)
    with pytest.raises(CheckpointError, match=r'mpi4py\.rc\.thread_level = "multiple"'):
        make_coordinator("mpi", directory=tmp_path)
    fake_mpi(monkeypatch, Is_finalized=True)
    with pytest.raises(CheckpointError, match=r"after MPI.Init\(\)"):
        make_coordinator("mpi", directory=tmp_path)


@pytest.mark.usefixtures("no_launcher")
def test_the_automatic_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _best() == "local"
    assert make_coordinator(directory=tmp_path).name == "local"
    assert not (tmp_path / FOLDER).exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert _best() == "local", "a batch script is one process"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert _best() == "local"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert _best() == "file"
    monkeypatch.setenv("PMI_SIZE", "4")
    fake_mpi(monkeypatch, Is_initialized=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _best() == "file", "there is no mpi4py"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert _best() == "mpi"
    monkeypatch.delenv("PMI_SIZE")
    fake_mpi(monkeypatch, size=4)
    assert _best() == "mpi"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert _best() == "torch"
        chosen = make_coordinator(directory=tmp_path)
        assert (chosen.name, chosen.rank, chosen.world_size) == ("torch", 0, 1)
        assert exchange(chosen, "one/1", b"alone", 1.0) == [b"alone"]
        chosen.close()
    finally:
        torch.distributed.destroy_process_group()


def test_what_launchers_say() -> None:
    assert world_of({}) is None
    assert world_of({"RANK": "2", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) == (2, 8)
    assert world_of({"RANK": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}) == (1, 4)
    assert world_of({"PMI_RANK": "x", "PMI_SIZE": "4"}) is None


# ---- errors and accounts ---------------------------------------------------------------------------------------------


def test_a_peer_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(PeerError("who?", (1, 3), {0: b"a"})))
    assert (str(error), error.ranks, error.payloads) == ("who?", (1, 3), {0: b"a"})


def test_the_account_of_broadcasts() -> None:
    cleanup = KeyCleanup()
    assert [cleanup.spoke(f"a/{number}") for number in range(3)] == [[]] * 3
    cleanup.spoke("b/0")
    assert cleanup.heard("a/3", [2]).words == [], "nobody knows what rank 2 has read"
    assert cleanup.heard("a/4", []).words == ["a/0", "a/1", "a/2"]
    assert not cleanup.all_read
    assert cleanup.heard("b/1", []).words == ["b/0"]
    assert cleanup.all_read
    dropped = [old for number in range(MOST_UNREAD + 3) for old in cleanup.spoke(f"c/{number}")]
    assert dropped == ["c/0", "c/1", "c/2"]


def test_the_account_of_late_answers() -> None:
    cleanup = KeyCleanup()
    assert cleanup.heard("a/0", [1, 2]).boxes == []
    assert cleanup.is_late("a/0")
    assert cleanup.heard("b/0", []).boxes == [], "another stream"
    assert cleanup.heard("a/1", [2, 3]).boxes == []
    assert cleanup.heard("a/2", [3]).boxes == ["a/0"]
    assert cleanup.heard("a/3", []).boxes == ["a/1", "a/2"]
    dropped = [box for number in range(MOST_LATE + 2) for box in cleanup.heard(f"c/{number}", [9]).boxes]
    assert dropped == ["c/0", "c/1"]


def test_a_message_names_few_of_many_ranks() -> None:
    store = torch.distributed.HashStore()
    with pytest.raises(PeerError, match=r"ranks 1, 2, 3, 4, 5, 6, 7, 8 and 11 more did not answer") as caught:
        StoreCoordinator(store, 0, 20, timeout_s=0.1)
    assert caught.value.ranks == tuple(range(1, 20))
