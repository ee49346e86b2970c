"""How bytes leave CUDA devices: as lazily as each device has shown to be safe.

    lazy       fetched behind save(), in the background; fences let the streams that compute wait for the copies
    ordered    copied on the caller's own stream, to pinned memory; save() does not wait for that
    host       copied to the host by torch, inside save(), which waits for it

With `Options.device_lazy="auto"` a device begins with "ordered". At its first save it is tried out (`check_devices()`). If it
passes, and three saves have been looked at and were right, it goes up to "lazy"; at once, if GPUs and drivers of its kind are
known to be right. A save whose bytes were others than inside save() takes it one down, for the life of the process.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Collection
from typing import Literal

from ckpt import devices as torch_devices
from ckpt.device_check import DeviceCheck, check_devices
from ckpt.errors import DeviceError

logger = logging.getLogger("ckpt")

Mode = Literal["lazy", "ordered", "host"]
_ORDER: tuple[Mode, ...] = ("host", "ordered", "lazy")
_PROOFS = 3  # saves that are looked at more closely, in each mode
_CAPTURING = "a graph is being captured"  # how the check says so

# (compute capability, major version of the CUDA that torch was built with), as the table of GPUs in docs/compatibility.md
# lists them.
KNOWN: frozenset[tuple[str, int]] = frozenset()


@dataclasses.dataclass
class _Standing:
    """Of one device. `reason` says why it is not lazy, `barred` that it goes up no more."""

    mode: Mode = "ordered"
    reason: str = "it has not been tried out yet"
    barred: bool = False
    checked: DeviceCheck | None = None
    proofs: int = 0


_lock = threading.Lock()  # guards what follows
_standings: dict[int, _Standing] = {}
_check_lock = threading.Lock()  # one check at a time


def mode_of(devices: Collection[int], wish: bool | str) -> tuple[Mode, str]:
    """In which mode a save of these devices leaves, and why not lazily.

    Args:
        wish: as `Options.device_lazy`.
    """
    if wish is True:
        return "lazy", ""
    if wish is False:
        return "host", "Options.device_lazy is False"
    with _lock:
        found = [_standing(device) for device in devices]
        lowest = min(found, key=lambda standing: _ORDER.index(standing.mode), default=_Standing("lazy", ""))
        return lowest.mode, "" if lowest.mode == "lazy" else lowest.reason


def wants_proof(devices: Collection[int], wish: bool | str) -> bool:
    """Whether one of the next saves in its mode is still to be looked at as a whole."""
    with _lock:
        return wish == "auto" and any(_standing(device).proofs < _PROOFS for device in devices)


def try_out(devices: Collection[int]) -> None:
    """Those that have not been, now, unless a graph is being captured. Takes 5 s each at most.

    A device that is still busy with the training's work is waited for first.
    """
    with _check_lock:
        for device in sorted(devices):
            with _lock:
                is_due = _standing(device).checked is None and _standing(device).mode != "host"
            if not is_due or torch_devices.is_capturing():
                continue
            try:
                torch_devices.in_use.synchronize_stream(device)
                found = check_devices([device])[0]
            except (DeviceError, RuntimeError) as error:  # also of what the training has enqueued before
                found = DeviceCheck(device, "failed", str(error), 0.0)
            if found.verdict == "inconclusive" and found.reason.startswith(_CAPTURING):
                continue
            _note_check(found)


def _note_check(found: DeviceCheck) -> None:
    with _lock:
        standing = _standing(found.device)
        standing.checked = found
        if found.verdict != "passed":
            standing.barred = True
            standing.reason = f"its check was {found.verdict}: {found.reason}"
        elif _is_known(found.device):
            _rise(found.device, standing)
        else:
            standing.reason = f"it has passed its check, and {_PROOFS} saves are looked at"
    if found.verdict != "passed":
        logger.warning(
            "CUDA device %d was tried out, and the verdict is %s (%s): saves copy from it on the caller's own stream "
            "instead of in the background; see ckpt.check_devices()",
            found.device,
            found.verdict,
            found.reason,
        )


def note_right(devices: Collection[int], mode: Mode) -> None:
    """A save in this mode was looked at, and its bytes were those of save()."""
    with _lock:
        for device in devices:
            standing = _standing(device)
            if standing.mode != mode or standing.proofs >= _PROOFS:
                continue
            standing.proofs += 1
            passed = standing.checked is not None and standing.checked.verdict == "passed"
            if mode == "ordered" and standing.proofs == _PROOFS:
                if passed and not standing.barred:
                    _rise(device, standing)
                elif not standing.barred:  # not tried out yet: a graph was being captured each time
                    standing.proofs -= 1


def note_wrong(device: int, mode: Mode, reason: str) -> None:
    """A save in this mode had other bytes: from now on the next lower one is taken."""
    with _lock:
        standing = _standing(device)
        if mode == "host" or _ORDER.index(standing.mode) < _ORDER.index(mode):
            return
        _fall(standing, _ORDER[_ORDER.index(mode) - 1], reason)
        now = standing.mode
    logger.warning("CUDA device %d: %s; with device_lazy='auto' its mode is %r from now on", device, reason, now)


def note_unusable(devices: Collection[int], reason: str) -> None:
    """The engine cannot fetch from them: torch must."""
    with _lock:
        fallen = [device for device in devices if _standing(device).mode != "host"]
        for device in fallen:
            _fall(_standing(device), "host", reason)
    for device in fallen:
        logger.warning("CUDA device %d: saves copy from it to the host inside save(), and wait for that: %s", device, reason)


def _standing(device: int) -> _Standing:
    return _standings.setdefault(device, _Standing())


def _is_known(device: int) -> bool:
    try:
        return torch_devices.in_use.platform_of(device) in KNOWN
    except (RuntimeError, DeviceError):
        return False


def _rise(device: int, standing: _Standing) -> None:
    standing.mode, standing.reason, standing.proofs = "lazy", "", 0
    logger.info("CUDA device %d has shown that it keeps the order of its streams: from now on it is saved lazily", device)


def _fall(standing: _Standing, mode: Mode, reason: str) -> None:
    standing.mode, standing.reason, standing.barred, standing.proofs = mode, reason, True, 0


def _forget_after_fork() -> None:
    global _lock, _check_lock
    _lock, _check_lock = threading.Lock(), threading.Lock()
    _standings.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
