"""Whether CUDA devices order copies as saving in the background relies on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Literal, cast

from ckpt import _native
from ckpt import devices as torch_devices
from ckpt.errors import DeviceError

Verdict = Literal["passed", "failed", "inconclusive", "late"]


@dataclasses.dataclass(frozen=True)
class DeviceCheck:
    """
    Attributes:
        verdict: "passed"; "failed": a rule was broken, or the driver refused a call; "inconclusive": nothing was shown, because
            nothing went wrong where it should have; "late": the device had not done it in time.
        reason: why it has not passed; empty if it has.
        seconds: that it took.
    """

    device: int
    verdict: Verdict
    reason: str
    seconds: float


def check_devices(devices: Iterable[int] | None = None, *, timeout_s: float = 5.0) -> list[DeviceCheck]:
    """Tries out whether CUDA devices do what `Options.device_lazy` relies on.

    On scratch memory (10 MiB of each device, and of pinned host memory): a copy to the host that waits for an event behind a
    write brings what was written; a write that waits for an event behind a copy does not change what the copy brings; on the
    default stream and on another one. Without the waits both must go wrong, else the verdict is "inconclusive": that is so
    where all streams share one queue of the hardware (CUDA_DEVICE_MAX_CONNECTIONS=1). Then copies of odd sizes, there and back.
    Takes timeout_s a device at most. Saves and training may go on meanwhile, graph captures too; then it is "inconclusive".

    Args:
        devices: their numbers, as torch has them; None: the current one.
        timeout_s: seconds for each. Scratch memory of a device that is late is never given back.

    Raises:
        DeviceError: there is no CUDA driver, or no such device.
        ValueError: timeout_s is not positive.
    """
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be a positive number of seconds, but is {timeout_s!r}")
    if not torch_devices.are_possible():
        raise DeviceError("this build of torch knows no CUDA devices; install one that does")
    found = []
    for device in (torch_devices.at_work() or [0]) if devices is None else devices:
        began = time.monotonic()
        verdict, reason = _native.check_device(device, timeout_s, torch_devices.in_use.driver)
        found.append(DeviceCheck(device, cast(Verdict, verdict), reason, time.monotonic() - began))
    return found
