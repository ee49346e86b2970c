"""Whether the bytes of devices that are in a file are those of save(): the device sums them up then, the writers later.

A net for the first saves in each mode (ckpt/device_modes.py). The sum is that of the 64-bit words of a record, modulo 2^64,
which a device finds at the rate of its memory: some 10 ms for 16 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckpt import devices as torch_devices
from ckpt.devices import HOST
from ckpt.plan.save_plan import SavePlan

_PATIENCE_S = 30.0  # for sums of devices that have long ended their copies
_MODULUS = 1 << 64


class DeviceSums:
    """Enqueued on the current stream of each device, for all records that lie there.

    Attributes:
        complete: all of them were there to be compared.

    Raises:
        RuntimeError: torch has no memory for them.
    """

    def __init__(self, plan: SavePlan) -> None:
        self.complete = False
        self._pending: list[tuple[int, Sequence[int], Any]] = []
        for device in sorted(set(plan.devices) - {HOST}):
            indices = [index for index, where in enumerate(plan.devices) if where == device]
            spans = [(record.storage, record.low, record.nbytes) for record in map(plan.records.__getitem__, indices)]
            self._pending.append((device, indices, torch_devices.in_use.start_sums(spans, device)))

    def find_changed(self, written: Sequence[int]) -> tuple[int, int] | None:
        """A record whose bytes in the file are others, and its device; None if there is none, or the sums did not come.

        Args:
            written: of each record.
        """
        for device, indices, poll in self._pending:
            found = poll(_PATIENCE_S)
            if found is None:
                return None
            for index, expected in zip(indices, found, strict=True):
                if expected % _MODULUS != written[index] % _MODULUS:
                    return index, device
        self.complete = True
        return None
