"""What one save has cost, as its PendingSave and those who keep metrics tell it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

_MUCH = 0.05  # of what is saved, or of the time that training was held: below that nobody need do anything
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclasses.dataclass(frozen=True)
class SaveStats:
    """What a save has cost so far. `print(stats)` says it in one line, with what to do if something is amiss.

    Attributes:
        save_s: seconds the caller spent inside save().
        witness_s: of these, seconds for noting bytes by which a write to a lazy tensor is found later.
        fence_s: seconds training was held at fences for this save.
        arena_wait_s: of both, seconds spent waiting for room in the arena: back-pressure.
        bytes_total: size of the files that this process writes, bytes.
        bytes_from_tensors: bytes that writers took from tensor memory: copied neither inside save() nor by a fence.
        bytes_copied_in_save: bytes copied to the arena inside save().
        bytes_copied_at_fence: bytes copied to the arena by a fence.
        bytes_from_devices: bytes fetched from CUDA devices.
        device_cached_bytes: of these, bytes that a fence kept in spare memory of their device (`Options.device_cache`).
        reused_bytes: bytes of the files that were not written: the checkpoint before has them (`Options.reuse`, `frozen`).
        unread_bytes: of these, bytes that were not read either: save() was told that they do not change (`frozen=`).
        device_mode: how bytes left CUDA devices: "lazy", "ordered" (copied on the caller's stream), or "host" (copied to the
            host inside save()); None where there were none, or `Options.device_lazy` is False.
        device_mode_reason: why not lazily.
        probed_bytes: bytes of devices that were recorded inside save(), and found to be the same in the file.
        arena_bytes: size of the staging memory by now.
        arena_pinned: whether bytes from devices went to pinned memory, all of them; False where there were none. The arena may
            be pinned in part: then they have only that part of it.
        direct_io: whether the file was written past the page cache; None until it is known.
        tier_at: by the name of a tier, the instant of `time.monotonic()` at which it was committed there.
        started_at, captured_at, written_at, flushed_at, named_at, durable_at: instants of `time.monotonic()`: save() was
            called; tensors might change; all data was written, and fsync began; it had ended; the files of this process had
            their names; the checkpoint was published and fsynced. None until reached; named_at of steps alone, whose files get
            their names before they are published.
    """

    save_s: float = 0.0
    witness_s: float = 0.0
    fence_s: float = 0.0
    arena_wait_s: float = 0.0
    bytes_total: int = 0
    bytes_from_tensors: int = 0
    bytes_copied_in_save: int = 0
    bytes_copied_at_fence: int = 0
    bytes_from_devices: int = 0
    device_cached_bytes: int = 0
    reused_bytes: int = 0
    unread_bytes: int = 0
    device_mode: str | None = None
    device_mode_reason: str = ""
    probed_bytes: int = 0
    arena_bytes: int = 0
    arena_pinned: bool = False
    direct_io: bool | None = None
    tier_at: Mapping[str, float] = dataclasses.field(default_factory=dict)
    started_at: float | None = None
    captured_at: float | None = None
    written_at: float | None = None
    flushed_at: float | None = None
    named_at: float | None = None
    durable_at: float | None = None

    @property
    def blocked_s(self) -> float:
        """Seconds that training was held for this save, inside save() and at fences."""
        return self.save_s + self.fence_s

    @property
    def captured_s(self) -> float | None:
        """Seconds from the call of save() until the tensors might change; None until then."""
        return self._since_start(self.captured_at)

    @property
    def written_s(self) -> float | None:
        """Seconds from the call of save() until this process's data was written, and its fsync began; None until then."""
        return self._since_start(self.written_at)

    @property
    def flushed_s(self) -> float | None:
        """Seconds from the call of save() until this process's data was fsynced; None until then."""
        return self._since_start(self.flushed_at)

    @property
    def named_s(self) -> float | None:
        """Seconds from the call of save() until this process's files had their names; None until then, and but for steps."""
        return self._since_start(self.named_at)

    @property
    def durable_s(self) -> float | None:
        """Seconds from the call of save() until the checkpoint was published and fsynced; None until then."""
        return self._since_start(self.durable_at)

    def _since_start(self, instant: float | None) -> float | None:
        return None if instant is None or self.started_at is None else max(0.0, instant - self.started_at)

    def __str__(self) -> str:
        held = f"training was held for {_seconds(self.blocked_s)}"
        if self.fence_s:
            held += f" ({_seconds(self.save_s)} in save(), {_seconds(self.fence_s)} at fences)"
        reused = f" ({_size(self.reused_bytes)} of it reused)" if self.reused_bytes else ""
        return "; ".join([f"{_size(self.bytes_total)}{reused} {self._reached()}", held, *self._hints()])

    def _reached(self) -> str:
        if self.durable_s is not None:
            told = self.durable_s > 0 and self.bytes_total >= 1 << 20  # below that, the rate says nothing
            rate = f" ({self.bytes_total / self.durable_s / 1e9:.3g} GB/s)" if told else ""
            return f"durable after {_seconds(self.durable_s)}{rate}"
        for what, seconds in (("flushed", self.flushed_s), ("captured", self.captured_s)):
            if seconds is not None:
                return f"{what} after {_seconds(seconds)}, not durable"
        return "not captured"

    def _hints(self) -> list[str]:
        """What makes it slower than it need be, and what helps."""
        hints = []
        if self.arena_wait_s > _MUCH * self.blocked_s:
            hints.append(
                f"hint: {_seconds(self.arena_wait_s)} of that for room in the arena of {_size(self.arena_bytes)}: raise "
                "Options.arena_bytes, or save less often"
            )
        if self.bytes_copied_at_fence > _MUCH * self.bytes_total:
            hints.append(
                f"hint: {_size(self.bytes_copied_at_fence)} were copied at a fence: they had not left within the iteration"
            )
        if self.direct_io is False:
            hints.append("hint: through the page cache, without direct I/O")
        if self.device_mode not in (None, "lazy"):
            reason = f": {self.device_mode_reason}" if self.device_mode_reason else ""
            hints.append(f"hint: bytes left devices in the mode '{self.device_mode}', not lazily{reason}")
        return hints


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _size(count: int) -> str:
    power = 0 if count < 1024 else min((count.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:.4g} {_UNITS[power]}"
