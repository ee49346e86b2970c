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
        self._pending: list[tuple[int, dict[int, int], Any]] = []
        for device in sorted(set(plan.devices) - {HOST}):
            records = {index: plan.records[index] for index, where in enumerate(plan.devices) if where == device}
            spans = [(record.storage, record.low, record.nbytes) for record in records.values()]
            sizes = {index: record.nbytes for index, record in records.items()}
            self._pending.append((device, sizes, torch_devices.in_use.start_sums(spans, device)))

    def find_changed(self, written: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """A record whose bytes in the file are others, and its device; None if there is none, or the sums did not come.

        Args:
            written: of each record its sum, and how many bytes are in that. What other ranks have written in part is left out.
        """
        for device, sizes, poll in self._pending:
            found = poll(_PATIENCE_S)
            if found is None:
                return None
            for (index, nbytes), expected in zip(sizes.items(), found, strict=True):
                own, bytes_written = written[index]
                if bytes_written == nbytes and expected % _MODULUS != own:
                    return index, device
        self.complete = True
        return None
