"""SIGTERM, noted when it comes and acted on at the next step, on all ranks at the same one.

CheckpointCallback(preemption=) does that by itself. Who saves with a Checkpointer does it by hand:

    with ckpt.Checkpointer("checkpoints") as checkpointer, Preemption() as preemption:
        for step in range(start, steps):
            ...
            if preemption.is_due():  # asked at each step, on every rank
                checkpointer.save(step + 1, state).result(preemption.left_s())
                preemption.end(step + 1)
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch

from ckpt.quantities import Duration, parse_duration

logger = logging.getLogger("ckpt")

GRACE = "25s"  # torchrun, Slurm and Kubernetes by default kill 30 s after SIGTERM
_LAST_EXCHANGE_S = 5.0  # how long close() waits for the other ranks to take part in the last exchange


class Preempted(SystemExit):
    """Training was asked to end by SIGTERM, and has saved. Exit code 143, as a shell reports a process that SIGTERM ended."""

    def __init__(self, step: int | None) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.step = step  # the steps done; None if the signal came after the last

    def __str__(self) -> str:
        return "SIGTERM" if self.step is None else f"SIGTERM; {self.step} steps are done"


class Preemption:
    """Notes SIGTERM from construction to close(). A context manager; see the module.

    Args:
        grace: how much of the time between the signal and the end of the process may be used for saving: seconds, or a
            duration such as "2min".
        several_ranks: whether the ranks of the default process group have to hear of each other's signals: one number goes
            round at each is_due(), in the background. None: if there are several.

    Raises:
        RuntimeError: not in the main thread, which alone may install a handler; or several ranks without a process group.
        TypeError, ValueError: grace is no duration.
    """

    def __init__(self, grace: Duration = GRACE, several_ranks: bool | None = None) -> None:
        grace_s = parse_duration(grace, "grace")
        if several_ranks is None:
            several_ranks = _has_several_ranks()
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("preemption needs a signal handler, which only the main thread may install")
        self._grace_s = grace_s
        self._shared = SharedFlag() if several_ranks else None
        self._noted_at: float | None = None
        self._previous: Callable[[int, FrameType | None], Any] | int | None = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted_at is None:  # schedulers and launchers may both send one
            self._noted_at = time.monotonic()

    @property
    def noted(self) -> bool:
        return self._noted_at is not None

    def is_due(self) -> bool:
        """Whether to end now. Every rank must ask at the same steps; all get the same answer."""
        if self._shared is None:
            return self.noted
        due = self._shared.exchange(self.noted)
        if due and self._noted_at is None:
            self._noted_at = time.monotonic()
        return due

    def left_s(self) -> float:
        """Seconds of grace that are left."""
        since = 0.0 if self._noted_at is None else time.monotonic() - self._noted_at
        return max(0.0, self._grace_s - since)

    def end(self, step: int | None) -> NoReturn:
        """Ends the process, when all is saved; a handler of SIGTERM in Python that was there before is called first.

        Args:
            step: optimizer steps done; None: all of them.

        Raises:
            Preempted: always.
        """
        self._pass_on()
        raise Preempted(step)

    def _pass_on(self) -> None:
        """Puts back the handler that was there before and, if it is one in Python, lets it have the signal."""
        self.close()
        if callable(self._previous):
            self._previous(signal.SIGTERM, None)

    def close(self) -> None:
        """Puts back the handler that was there before. Safe to call twice."""
        if self._shared is not None:
            self._shared.close()
        if signal.getsignal(signal.SIGTERM) != self._note:
            return  # it has been put back, or somebody else has put another in its place
        if threading.current_thread() is not threading.main_thread():
            logger.warning("the handler of SIGTERM stays: only the main thread could put back the one before")
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)

    def __enter__(self) -> Preemption:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _has_several_ranks() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class SharedFlag:
    """A flag that every rank sees once any rank has raised it.

    One number is reduced over the default process group at each step, in the background, and looked at one step later: nobody
    waits for it, and all ranks see it at the same step.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("preemption on several ranks needs torch.distributed: call init_process_group() before")
        on_host = "cpu:" in dist.get_backend_config()
        self._device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
        self._take: Callable[[], bool] | None = None  # waits for the exchange under way
        self._work: Any = None

    def exchange(self, raised: bool) -> bool:
        """Whether any rank had raised it at the exchange before."""
        seen = self._take() if self._take is not None else False
        self._take = self._start(raised)
        return seen

    def _start(self, raised: bool) -> Callable[[], bool]:
        import torch.distributed as dist

        flag = torch.full((1,), int(raised), dtype=torch.int32, device=self._device)
        self._work = work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        if self._device.type == "cpu":

            def take() -> bool:
                work.wait()
                return bool(flag.item())

            return take
        work.wait()  # makes the stream wait, not the host
        on_host = torch.empty(1, dtype=torch.int32, device="cpu", pin_memory=True)
        on_host.copy_(flag, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def take_copy() -> bool:
            copied.synchronize()
            return bool(on_host.item())

        return take_copy

    def close(self) -> None:
        """Lets the last exchange come to its end, if the other ranks still take part, so that the group can be destroyed."""
        work, self._work, self._take = self._work, None, None
        deadline = time.monotonic() + _LAST_EXCHANGE_S
        while work is not None and not work.is_completed() and time.monotonic() < deadline:
            time.sleep(1e-3)
