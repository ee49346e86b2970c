"""A coordinator over MPI: point-to-point messages on a communicator of its own, no collectives but for making that.

Nothing here blocks inside MPI: messages are sent with Isend, looked for with Improbe and received with Irecv, under one lock,
and whoever waits sleeps between looks. What arrives for another key, or for another thread, is kept until it is asked for.
Large messages need both sides to make progress: a thread does that for sends that nobody waits for, and ends when they are out.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Callable
from typing import Any

from ckpt.coordinator.base import Coordinator, given, missing_error, silent_error
from ckpt.coordinator.closing import LINGER_S, OrderlyClose
from ckpt.coordinator.key_cleanup import MOST_UNREAD, KeyCleanup
from ckpt.coordinator.waiting import Deadline, Pace
from ckpt.errors import CheckpointError

_TAG = 1
_PACE_S = (0.0001, 0.005)  # first and longest sleep between looks
_HEADER = struct.Struct("<cH")  # kind, length of the key; then the key and the payload
_ANSWER, _WORD = b"a", b"w"
_unsent: list[Any] = []  # buffers that MPI may still read from when their coordinator is closed


class MPICoordinator(Coordinator):
    """See the module. All ranks of the communicator must make it, together: it is duplicated, and not freed before
    MPI_Finalize, because freeing needs all ranks alive.

    Args:
        communicator: of mpi4py; default: MPI.COMM_WORLD.

    Raises:
        CheckpointError: mpi4py is missing, MPI is not running, or may not be called from several threads.
    """

    name = "mpi"

    def __init__(self, communicator: Any = None) -> None:
        self._mpi = _running_mpi()
        self._communicator = (communicator or self._mpi.COMM_WORLD).Dup()
        self.rank = int(self._communicator.Get_rank())
        self.world_size = int(self._communicator.Get_size())
        self._cleanup = KeyCleanup()
        self._closing = OrderlyClose("the coordinator over MPI")
        self._lock = threading.Lock()  # guards everything below, and every call of MPI
        self._answers: dict[str, dict[int, bytes]] = {}  # on rank 0: key to payloads by rank
        self._words: dict[str, bytes] = {}
        self._given_up: dict[str, None] = {}  # keys of words that came too late, oldest first
        self._sending: list[tuple[Any, bytes]] = []  # requests and their buffers
        self._receiving: list[tuple[int, Any, bytearray]] = []
        self._courier: threading.Thread | None = None

    def gather(self, key: str, payload: bytes, timeout_s: float) -> list[bytes] | None:
        self._closing.check()
        if self.rank != 0:
            self._send([0], _ANSWER, key, payload)
            return None
        if self.world_size == 1:
            return [payload]
        deadline = self._closing.deadline_for(key, timeout_s)
        self._wait(lambda: len(self._answers.get(key, ())) == self.world_size - 1, deadline)
        with self._lock:
            answers = {0: payload} | self._answers.pop(key, {})
            missing = [rank for rank in range(self.world_size) if rank not in answers]
            self._cleanup.heard(key, missing)
        if missing:
            raise missing_error(key, missing, answers, timeout_s)
        return [answers[rank] for rank in range(self.world_size)]

    def broadcast(self, key: str, payload: bytes | None, timeout_s: float) -> bytes:
        self._closing.check()
        if self.rank == 0:
            word = given(payload, key)
            if self.world_size > 1:
                self._cleanup.spoke(key)
                self._send(range(1, self.world_size), _WORD, key, word)
            return word
        self._wait(lambda: key in self._words, self._closing.deadline_for(key, timeout_s))
        with self._lock:
            if key in self._words:
                return self._words.pop(key)
            self._given_up[key] = None
            if len(self._given_up) > MOST_UNREAD:
                del self._given_up[next(iter(self._given_up))]
        raise silent_error(key, self.rank, timeout_s)

    def interrupt(self) -> None:
        self._closing.interrupt.say()

    def close(self) -> None:
        deadline = Deadline(LINGER_S)
        if self._closing.close(self, self._cleanup) is None:
            return
        self._wait(lambda: not self._sending, deadline)
        with self._lock:
            _unsent.extend([*self._sending, *self._receiving])
            self._sending, self._receiving = [], []

    # ---- messages --------------------------------------------------------------------------------------------------

    def _send(self, ranks: Any, kind: bytes, key: str, payload: bytes) -> None:
        name = key.encode()
        message = _HEADER.pack(kind, len(name)) + name + payload
        with self._lock:
            for rank in ranks:
                self._sending.append((self._communicator.Isend([message, self._mpi.BYTE], rank, _TAG), message))
            self._progress()
            if self._sending and self._courier is None:
                self._start_courier()

    def _start_courier(self) -> None:
        """Needs the lock. Where no thread starts, every wait makes progress, and close() waits until all is out.

        Since Python 3.12, none starts once the interpreter ends; saves that are drained then still have to be agreed on.
        """
        courier = threading.Thread(target=self._deliver, name="ckpt-mpi", daemon=True)
        with contextlib.suppress(RuntimeError):
            courier.start()
            self._courier = courier

    def _deliver(self) -> None:
        """The courier: makes progress while anything is on its way out."""
        pace = Pace(Deadline(float("inf")), *_PACE_S)
        while True:
            with self._lock:
                found = self._progress()
                if not self._sending:
                    self._courier = None
                    return
            pace.rest(found)

    def _wait(self, done: Callable[[], bool], deadline: Deadline) -> None:
        """Until done() or the deadline; done() is called with the lock held."""
        pace = Pace(deadline, *_PACE_S)
        while True:
            with self._lock:
                found = self._progress()
                if done():
                    return
            if not pace.rest(found):
                return

    def _progress(self) -> bool:
        """Takes in what has arrived; whether there was anything. Needs the lock."""
        status, found = self._mpi.Status(), False
        while (arrived := self._communicator.Improbe(self._mpi.ANY_SOURCE, _TAG, status)) is not None:
            buffer = bytearray(status.Get_count(self._mpi.BYTE))
            self._receiving.append((status.Get_source(), arrived.Irecv([buffer, self._mpi.BYTE]), buffer))
            found = True
        waiting = []
        for source, request, buffer in self._receiving:
            if request.Test():
                self._sort_in(source, bytes(buffer))
                found = True
            else:
                waiting.append((source, request, buffer))
        self._receiving = waiting
        self._sending = [(request, message) for request, message in self._sending if not request.Test()]
        return found

    def _sort_in(self, source: int, message: bytes) -> None:
        """Keeps a message for whoever asks for it; not if its key is over. Needs the lock."""
        kind, length = _HEADER.unpack_from(message)
        start = _HEADER.size + length
        key, payload = message[_HEADER.size : start].decode(), message[start:]
        if kind == _WORD:
            if key in self._given_up:
                del self._given_up[key]
            else:
                self._words[key] = payload
        elif not self._cleanup.is_late(key):
            self._answers.setdefault(key, {})[source] = payload


def _running_mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        raise CheckpointError(
            f"the coordinator 'mpi' needs mpi4py and an MPI library: {error}; install them (pip install 'lazyckpt[mpi]'), "
            "or choose another coordinator"
        ) from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise CheckpointError("the coordinator 'mpi' needs MPI between MPI_Init and MPI_Finalize; make it after MPI.Init()")
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise CheckpointError(
            "the coordinator 'mpi' calls MPI from several threads, which this MPI was not initialised for: before the first "
            'import of mpi4py.MPI, set mpi4py.rc.thread_level = "multiple"; if the program calls MPI_Init itself, let it call '
            "MPI_Init_thread with MPI_THREAD_MULTIPLE"
        )
    return MPI
