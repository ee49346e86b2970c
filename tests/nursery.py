"""Processes by the hundred: a nursery imports torch once and forks a child for each program, within milliseconds.

A child runs its program as a script would: it may be killed, and it ends through the interpreter's whole finalisation.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from deadlines import patience
from places import PYTHONPATH

DEADLINE_S = patience(60.0)


class Ended(NamedTuple):
    returncode: int  # the exit code, or minus the signal
    stdout: str
    stderr: str


class Child:
    """One process, from start() to wait()."""

    def __init__(self, nursery: Nursery, output: IO[bytes], errors: IO[bytes]) -> None:
        self.nursery, self._output, self._errors = nursery, output, errors
        self.pid = int(nursery.read_line())

    def kill_after(self, delay_s: float) -> None:
        """Sends SIGKILL unless it ends before."""
        if not self.ends_within(delay_s):
            self.signal(signal.SIGKILL)

    def ends_within(self, delay_s: float) -> bool:
        return bool(select.select([self.nursery.socket], [], [], delay_s)[0])

    def signal(self, number: int) -> None:
        """Not if it has ended. The nursery tells so a moment after; pids are given in turn, so no other has this one yet."""
        if not self.ends_within(0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def said(self) -> str:
        """Its standard output so far. The file's position is the child's own: it is left where it is."""
        return os.pread(self._output.fileno(), 1 << 20, 0).decode(errors="replace")

    def wait(self, deadline_s: float = DEADLINE_S) -> Ended:
        """Kills it at the deadline."""
        self.kill_after(deadline_s)
        status = int(self.nursery.read_line())
        texts = []
        for file in (self._output, self._errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Ended(os.waitstatus_to_exitcode(status), *texts)


class Nursery:
    """The parent of the children; one at a time. A context manager.

    Args:
        optimizer: also import what optimizers need; then a child takes longer to end.
        sharded: and what sharded models need.
        drain: import what a drain needs, and no torch.
    """

    def __init__(self, optimizer: bool = False, sharded: bool = False, drain: bool = False) -> None:
        wishes = [*["--optimizer"] * optimizer, *["--sharded"] * sharded, *["--drain"] * drain]
        self._begin(__file__, *wishes)

    def _begin(self, script: str, *wishes: str, **environment: str) -> None:
        with self._connect() as theirs:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [sys.executable, script, str(theirs.fileno()), *wishes],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": PYTHONPATH} | environment,
            )

    def _connect(self) -> socket.socket:
        """The nursery's end."""
        self.socket, theirs = socket.socketpair()
        self._lines = self.socket.makefile("rb", buffering=0)
        self.socket.settimeout(DEADLINE_S + 30)
        return theirs

    def another(self) -> Nursery:
        """Forked from this one, without imports of its own. It ends before this one, which must have no child now."""
        made = Nursery.__new__(Nursery)
        made._process = None
        with made._connect() as theirs:
            socket.send_fds(self.socket, [json.dumps({}).encode()], [theirs.fileno()])
        return made

    def start(self, program: str, *arguments: str) -> Child:
        output, errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        message = json.dumps({"program": program, "arguments": arguments}).encode()
        socket.send_fds(self.socket, [message], [output.fileno(), errors.fileno()])
        return Child(self, output, errors)

    def run(self, program: str, *arguments: str) -> Ended:
        return self.start(program, *arguments).wait()

    def read_line(self) -> bytes:
        line = self._lines.readline()
        assert line, "the nursery has died"
        return line

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: Any) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self.socket.close()
        assert self._process is None or self._process.wait(DEADLINE_S) == 0, "it has ended badly, or one forked from it"


_roots: dict[tuple[Any, ...], Nursery] = {}


def shared_nursery(kind: type[Nursery] | None = None, parity: int = 0, **wishes: bool) -> Nursery:
    """Forked from one that has imported all once, for all tests of this process.

    Args:
        kind: None: Nursery.
        parity: those of 0 and of 1 are forked from different ones.
    """
    key = (kind, parity, *sorted(wishes.items()))
    if key not in _roots:
        _roots[key] = (kind or Nursery)(**wishes)
    return _roots[key].another()


def end_shared() -> None:
    """Once no test needs them any more."""
    while _roots:
        _roots.popitem()[1].__exit__()


@contextlib.contextmanager
def nurseries_of_ranks(count: int, kind: type[Nursery] | None = None, **wishes: bool) -> Iterator[list[Nursery]]:
    """One for each rank of a job. Sets have another order on odd ranks than on even ones, as on ranks that nobody forks."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(shared_nursery(kind, rank % 2, **wishes)) for rank in range(count)]


def sharding_nurseries(count: int) -> contextlib.AbstractContextManager[list[Nursery]]:
    """For jobs with sharded models."""
    return nurseries_of_ranks(count, optimizer=True, sharded=True)


# ---- scripts, and the ranks of a job ---------------------------------------------------------------------------------


def script(path: Path, *arguments: str, **environment: str) -> str:
    """A program that does what `python path arguments` does."""
    return (
        f"import os, runpy, sys; os.environ.update({environment!r}); sys.argv = {[str(path), *arguments]!r}; "
        f"sys.path.insert(0, {str(path.parent)!r}); runpy.run_path({str(path)!r}, run_name='__main__')"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """A job of several ranks, one in each of these nurseries: they run a script as under torchrun, whose imports take long."""

    def __init__(self, nurseries: list[Nursery], path: Path, *arguments: str) -> None:
        numbers = {"WORLD_SIZE": len(nurseries), "LOCAL_WORLD_SIZE": len(nurseries), "MASTER_PORT": free_port()}
        self.children = [
            nursery.start(script(path, *arguments, **place(rank, **numbers))) for rank, nursery in enumerate(nurseries)
        ]

    def any_has_ended(self) -> bool:
        return any(child.ends_within(0) for child in self.children)

    def wait(self, deadline_s: float = DEADLINE_S) -> list[Ended]:
        """Once one has failed, the others get SIGTERM. Kills all that are left at the deadline."""
        deadline, ended = time.monotonic() + deadline_s, dict[int, Ended]()
        while left := [rank for rank in range(len(self.children)) if rank not in ended]:
            sockets = [self.children[rank].nursery.socket for rank in left]
            ready = select.select(sockets, [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                for rank in left:
                    self.children[rank].signal(signal.SIGKILL)
            for rank in [rank for rank in left if self.children[rank].ends_within(0)]:
                ended[rank] = self.children[rank].wait()
                if ended[rank].returncode != 0:
                    self._end_others(ended)
        return [ended[rank] for rank in range(len(self.children))]

    def _end_others(self, ended: dict[int, Ended]) -> None:
        for rank, child in enumerate(self.children):
            if rank not in ended:
                child.signal(signal.SIGTERM)


def place(rank: int, **numbers: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    numbers |= {"RANK": rank, "LOCAL_RANK": rank}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}


# ---- the nursery's side ----------------------------------------------------------------------------------------------


def import_torch() -> None:
    import torch

    import ckpt

    for name in ckpt.__all__:  # each is imported when it is first asked for
        getattr(ckpt, name)
    torch.set_num_threads(1)


def import_drain() -> None:
    import psutil  # noqa: F401

    import ckpt.cli.main
    import ckpt.drain.drainer  # noqa: F401

    assert "torch" not in sys.modules


def warm_up() -> None:
    """Imports what torch puts off until the first step of an optimizer: another 1,500 modules."""
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()


def import_sharding() -> None:
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401


def freeze() -> None:
    """The children neither copy what they do not change nor walk it when they end."""
    gc.collect()
    gc.freeze()


def serve(number: int) -> str:
    """What comes through the socket of this number. Returns in children only: the program."""
    with socket.socket(fileno=number) as requests:
        others: list[int] = []
        while True:
            message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
            if not message:
                end(others)
            request = json.loads(message)
            pid = os.fork()
            if pid == 0:
                break
            for descriptor in descriptors:
                os.close(descriptor)
            if not request:
                others.append(pid)
                continue
            requests.sendall(b"%d\n" % pid)
            requests.sendall(b"%d\n" % os.waitpid(pid, 0)[1])
    if not request:
        return serve(descriptors[0])
    for standard, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    sys.argv[1:] = request["arguments"]
    return str(request["program"])


def end(others: list[int]) -> NoReturn:
    """Of a nursery, once those have ended that were forked from it. It has nothing to finalise."""
    statuses = [os.waitpid(pid, 0)[1] for pid in others]
    os._exit(1 if any(statuses) else 0)


if __name__ == "__main__":
    import_drain() if "--drain" in sys.argv else import_torch()
    if "--optimizer" in sys.argv:
        warm_up()
    if "--sharded" in sys.argv:
        import_sharding()
    freeze()
    program = serve(int(sys.argv[1]))
    nursery, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    exec(compile(program, "program", "exec"), vars(sys.modules["__main__"]))
