"""The options of a save: one frozen object, no environment variables."""

from __future__ import annotations

import dataclasses
import math

from ckpt.quantities import parse_size

AUTO = "auto"
FIRST_ARENA_BYTES = 512 << 20  # of an arena that sizes itself, before a save from a device has shown what it needs


@dataclasses.dataclass(frozen=True)
class Options:
    """How saves are made. Sizes are bytes or texts such as "4GiB".

    Attributes:
        arena_bytes: size of the staging memory, bytes; default "auto". Holds what writers cannot take from its tensor: small
            ones, everything captured inside save(), what the fence finds unwritten, and all that lies on CUDA devices.
            "auto": 512 MiB, and as much as a save has on devices, as soon as one has more; at most 0.4 of the memory that is
            available when the first save begins, divided among the ranks of the node. `SaveStats.arena_bytes` tells what it
            is. A size is exact. A state larger than the arena works; save() and the fence then wait for the disk, which
            `SaveStats.arena_wait_s` reports, and a warning tells if training waits long for it. At least "1MiB".
        chunk_bytes: unit of a write, bytes, a power of two from "64KiB"; default "4MiB". Smaller: shorter waits for writes
            in progress at a fence. Larger: fewer system calls. Cut down to a quarter of the arena.
        writers: writer threads; default 4. They spend their time in the kernel; more keep a faster disk busy. Each has memory
            for one chunk of its own, beside the arena.
        eager_bytes: tensors in host memory of at most this many bytes are copied inside save(), lazy or not; default "64KiB".
            Each larger lazy one costs up to a page of padding in the file. Of tensors that are fetched from devices
            (device_lazy), a lazy one is never copied inside save(), whatever its size, and costs no padding.
        direct_io: write past the page cache where the file system can; default True. False: through the page cache, which
            costs a copy and memory bandwidth, and leaves the file cached.
        record_alignment: alignment of every record in the file, bytes, a power of two up to 32768; default None: large lazy
            tensors are placed for direct I/O, all others at 64. With a number the file is laid out exactly as
            `torch.save` does (byte for byte, but for the serialization id), and written through the page cache.
        replicated_writers: who writes what is given to `Checkpointer.save(replicated=)` in a job of several ranks: "all"
            (default): each rank its share of the one file, on a file system that all of them see; "rank0": rank 0 alone.
        replicated_readers: how a job of several ranks restores that file: "each" (default): every rank reads it whole; "all":
            each rank reads its share, and the rest comes from the other ranks, through the default process group of
            torch.distributed, whose ranks must be those that restore, into targets of the same kind. What does not lie in host
            memory as in the file (a target on a device, or strided otherwise) goes through a temporary of its size there.
            `Checkpointer.restore()` makes collective calls then: on all ranks, in the thread that trains. With
            NCCL alone a rank that is lost ends the others by torch's watchdog; the backend "cpu:gloo,cuda:nccl" reports it.
        device_lazy: how tensors leave CUDA devices. True: lazy ones are fetched in the background, by a stream of the engine's
            own, to the arena, which is pinned for it (where not even 64 MiB can be pinned, they are copied inside save(), with
            a warning); others are copied on the current stream, and save() does not wait for that. Fences let the current
            stream of each device wait. False: all are copied to the host inside save(), which waits for it. Default "auto": at
            first all are copied on the current stream to the pinned arena, and save() does not wait for that. The first save
            tries the device out (`check_devices()`, 5 s at most). If it passes, and three saves were right, lazy ones are
            fetched in the background from then on. A device that cannot be used so, or whose bytes were once not right in the
            file, is copied from as before, or as with False; `SaveStats.device_mode` and `device_mode_reason` tell. In each
            case save() records up to 4 MiB of what leaves last, and a save whose file has other bytes there fails; with "auto"
            the first three saves in each mode are compared as a whole. Tested with a simulated driver only, so far.
        device_cache: spare memory, bytes, that a fence may use on each CUDA device, with device_lazy; default 0: none. What
            has not left for the host at the fence is copied there, which takes the stream that computes a small part of
            the time of waiting for it, and needs no room in the arena. Taken in the background when the second save
            begins, so that an iteration has shown what the training needs, and less where memory is scarce: what leaves
            less than 5 % of the device, or 512 MiB, free is not taken, and all is given back for good, within 0.1 s, if the
            training comes to need that. A large allocation at once may still fail for it. `SaveStats.device_cached_bytes`
            tells what it was good for. 0 or at least four chunks.
        device_batches: copy many small tensors from a CUDA device by one call of the driver (cuMemcpyBatchAsync, up to 256),
            with device_lazy, where the driver is of 12.8 or newer; default False: a call for each tensor. Saves the host a
            few microseconds for each. Drivers are known that crash or hang over such calls: try it out before relying on it.
        device_rate: bytes a second that leave each CUDA device in the background, at most; default 0: as many as the link
            carries. For jobs whose network card shares that link with the GPU. What a fence waits for is not held back.
        metadata_compat: "2.14": the `.metadata` of `Checkpointer.save(sharded=)` can be read by torch before 2.15, too; default
            None: as the running torch writes it, and torch 2.15 notes something that older ones cannot read.
        reuse: do not write what a file has in common with that of the save before, but let both share its blocks, where the
            file system can (XFS, btrfs); default True. Each file stays whole by itself. Pieces at the same place are compared,
            by their CRC-32 and a hash of 128 bits, so nothing need be declared; sharing begins at the third save that has them.
            For all saves but those of `ckpt.save()`. `SaveStats.reused_bytes` tells what it was good for.
        refresh_every: with `reuse` or `frozen`, every so-many-th save reads and writes everything; default 20. So no more
            checkpoints than that share a block, which a disk might lose. 0: never.
        frozen: where tensors go that save(frozen=) is told of. "together" (default): to the file of all others. "separate": to
            a file of their own beside it, which the saves that follow link into their directories as long as nothing of it
            changes, rather than write it: for file systems that share no blocks (ext4, Lustre). They are tensors of at least
            1 MiB, together of at least 64 MiB, of `state=` and `sharded=`. The file of all others alone is no whole state then:
            torch.load() refuses it, and what reads here takes both. Every `refresh_every`-th save writes both.
        max_in_flight: saves that may be on their way at once; default 2. One more: see when_busy.
        when_busy: "wait" (default): save() waits until an earlier one is durable. "skip": save() returns at once with a
            PendingSave whose result() raises SkippedError. Either way save() lets an earlier one that is durable give back
            the space of what it has replaced.
        verify_capture: checksum every lazy tensor inside save() and again when its bytes are captured, and fail the save if
            they differ; default False. For finding code that writes to tensors before the fence: reads all memory once more,
            and copies what lies on devices (device_lazy) to the host, while save() waits.
        max_failed_saves: a Checkpointer raises FailedSavesError from save() after this many failures in a row; default 3. A
            failed save never stops training before that. 0: never.
        timeout_s: longest wait, seconds, inside save() and the fence; default 1800. A save that cannot be captured in this
            time fails (the tensors may then change; nothing is published). Also the longest that restore() reads one file, and
            waits for the other ranks.
        drain_timeout_s: longest wait, seconds, for saves in flight at close() and at interpreter exit; default 1800. What is
            left then fails with an error.
        commit_timeout_s: longest that rank 0 waits, once its own files are durable, for those of the slowest rank, seconds;
            default 600. A rank that has died, hangs or is slower fails the save on all ranks; those that wait for rank 0
            itself give up after three times as long.
        events: who keeps events.jsonl, a line for each save, commit, restore and removal, in the directory of the checkpoints:
            True: rank 0; "all": each rank; False: nobody. Default "auto": rank 0, but not where a framework names the
            checkpoints (BundleCheckpointer). Nothing depends on the file, and at 32 MiB it begins anew, beside the one before.

    Raises:
        ValueError, TypeError: a value is impossible; the message names the field.
    """

    arena_bytes: int | str = "auto"
    chunk_bytes: int | str = "4MiB"
    writers: int = 4
    eager_bytes: int | str = "64KiB"
    direct_io: bool = True
    record_alignment: int | None = None
    replicated_writers: str = "all"
    replicated_readers: str = "each"
    device_lazy: bool | str = "auto"
    device_cache: int | str = 0
    device_batches: bool = False
    device_rate: int | str = 0
    metadata_compat: str | None = None
    reuse: bool = True
    refresh_every: int = 20
    frozen: str = "together"
    max_in_flight: int = 2
    when_busy: str = "wait"
    verify_capture: bool = False
    max_failed_saves: int = 3
    timeout_s: float = 1800.0
    drain_timeout_s: float = 1800.0
    commit_timeout_s: float = 600.0
    events: bool | str = AUTO

    def __post_init__(self) -> None:
        for name in ("arena_bytes", "chunk_bytes", "eager_bytes", "device_cache", "device_rate"):
            if name == "arena_bytes" and self.arena_bytes == AUTO:
                continue
            object.__setattr__(self, name, parse_size(getattr(self, name), name))
        self._need(self.size("arena_bytes") >= 1 << 20, "arena_bytes", "must be at least '1MiB'")
        chunk = self.size("chunk_bytes")
        self._need(chunk >= 1 << 16 and _is_power_of_two(chunk), "chunk_bytes", "must be a power of two from '64KiB'")
        cache = self.size("device_cache")
        self._need(cache == 0 or cache >= 4 * chunk, "device_cache", "must be 0 or at least four times chunk_bytes")
        self._need_int("writers", 1, 256)
        self._need_int("max_in_flight", 1, 1024)
        self._need_int("max_failed_saves", 0, None)
        is_lazy = self.device_lazy == AUTO or isinstance(self.device_lazy, bool)
        self._need(is_lazy, "device_lazy", "must be 'auto', True or False")
        self._need_int("refresh_every", 0, None)
        for name in ("direct_io", "verify_capture", "device_batches", "reuse"):
            self._need(isinstance(getattr(self, name), bool), name, "must be True or False")
        if self.record_alignment is not None:
            self._need_int("record_alignment", 1, 32768)
            self._need(_is_power_of_two(self.record_alignment), "record_alignment", "must be a power of two")
        self._need(self.frozen in ("together", "separate"), "frozen", "must be 'together' or 'separate'")
        apart = self.frozen == "separate" and self.record_alignment is not None  # readers compute where the next record lies
        self._need(not apart, "frozen", "can be 'separate' only without record_alignment")
        self._need(self.replicated_writers in ("all", "rank0"), "replicated_writers", "must be 'all' or 'rank0'")
        self._need(self.replicated_readers in ("each", "all"), "replicated_readers", "must be 'each' or 'all'")
        self._need(self.metadata_compat in (None, "2.14"), "metadata_compat", "must be None or '2.14'")
        self._need(self.when_busy in ("wait", "skip"), "when_busy", "must be 'wait' or 'skip'")
        are_events = isinstance(self.events, bool) or self.events in (AUTO, "all")
        self._need(are_events, "events", "must be 'auto', 'all', True or False")
        for name in ("timeout_s", "drain_timeout_s", "commit_timeout_s"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            self._need(is_number and value > 0 and math.isfinite(value), name, "must be a positive number of seconds")

    def size(self, name: str) -> int:
        """The named size in bytes, whatever it was given as; of an arena that sizes itself, that at first."""
        if name == "arena_bytes" and self.arena_bytes == AUTO:
            return FIRST_ARENA_BYTES
        return parse_size(getattr(self, name), name)

    def _need(self, fine: bool, name: str, demand: str) -> None:
        if not fine:
            raise ValueError(f"Options.{name} {demand}, but is {getattr(self, name)!r}")

    def _need_int(self, name: str, low: int, high: int | None) -> None:
        value = getattr(self, name)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        upper = "" if high is None else f" and at most {high}"
        self._need(is_int and value >= low and (high is None or value <= high), name, f"must be at least {low}{upper}")


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
