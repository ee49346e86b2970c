"""Reading a file that all ranks need: each reads a part of it from storage, and the ranks send each other these parts.

    prepare   each rank: opens the file, makes room for its records, plans who sends what
    read      each rank: its share of the file, with the CRC-32 of that
    agree     all: what went wrong, which file it was, the CRC-32s of the shares. A failure anywhere ends it here, on all
    send      all: broadcasts, those of different ranks in turn. Large parts go from their place in memory to their place
    check     each rank: the CRC-32 of every record in its memory

So N ranks take from storage what one would. These are collectives of torch.distributed: all ranks of the group have to make the
same calls, in the thread that trains.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ckpt import _native
from ckpt.errors import CheckpointError, CorruptError, PeerError
from ckpt.loading.archive import Archive
from ckpt.loading.host_memory import bytes_of
from ckpt.loading.record_memory import sizes_alone
from ckpt.loading.unpickle import Contents
from ckpt.restore.process_group import TEXT, RankGroup

Place = torch.UntypedStorage | torch.Tensor
Prepare = Callable[[], tuple[Archive, Mapping[str, Place]]]

_PAGE = 4096  # shares begin at multiples of it, so that no block is read twice
_BATCH_BYTES = 16 << 20  # of one broadcast
_IN_FLIGHT = 4  # broadcasts at a time: the links of one rank are busy while another packs
_LARGE = 1 << 20  # parts from this size are sent from where they lie


class Filled(NamedTuple):
    """What read_together_into() has done: `crc32` is that of the file."""

    archive: Archive
    destinations: Mapping[str, Place]
    crc32: int


def read_together(
    open_archive: Callable[[], Archive], map_location: Any = None, group: Any = None, device: torch.device | None = None
) -> tuple[Contents, int]:
    """All records of a file, as read_whole() gives them, and the CRC-32 of the file. A collective.

    Args:
        open_archive: opens the file on this rank. Whatever it raises, the other ranks are told; so what may go wrong on one
            of them before this call can be raised here.
        map_location: as in `torch.load`; nothing is unpickled yet.
        group: of torch.distributed; default: its default group.
        device: see RankGroup.

    Raises:
        as read_together_into().
    """

    to_meta = str(map_location) == "meta"

    def prepare() -> tuple[Archive, Mapping[str, Place]]:
        archive = open_archive()
        tensors = [] if to_meta else archive.storage_names()
        return archive, archive.allocate([*archive.small_names(), *tensors])

    archive, filled, crc = read_together_into(prepare, group, device)
    storages = {name: place for name, place in filled.items() if isinstance(place, torch.UntypedStorage)}
    small = {name: bytes_of(storages.pop(name)) for name in archive.small_names()}
    if to_meta:
        storages = sizes_alone(archive)
    archive.close()
    return Contents(archive, small, storages), crc


def read_together_into(prepare: Prepare, group: Any = None, device: torch.device | None = None) -> Filled:
    """Fills memory of this rank with records of a file, of which it reads only its share. A collective.

    The bytes of all records that are wanted are checked on every rank, if the file has checksums of its own. What lies between
    records is not: for that, compare the CRC-32 of the file, which tells what was read, not what has arrived.

    Args:
        prepare: opens the file and says where its records are to go: storages or dense tensors on the host with room for
            them, by name; on all ranks the same names. Whatever error it raises, the other ranks are told; a rank that leaves
            by Ctrl-C says nothing, and the others wait until it has ended or the group's timeout has passed.
        group: of torch.distributed; default: its default group.
        device: see RankGroup.

    Raises:
        PeerError: another rank could not read its share (`ranks`: which; all ranks are still in step, and may go on with
            another file), or a collective failed (`ranks` is empty; the group is of no use any more).
        CorruptError: a record fails its CRC-32, or the ranks see different files.
        CheckpointError: the ranks want different records; torch.distributed is not initialised.
        What prepare() and reading raise on this rank. After any of these, destinations are in any state.
    """
    ranks = RankGroup(group, device)
    try:
        share = ReadShare(prepare, ranks)
    except Exception as error:
        _tell_failure(ranks, error)
        raise
    answers = ranks.gather(share.said)
    _compare(share.archive, answers)
    if ranks.size > 1:
        _send(ranks, share)
    share.archive.check(share.destinations)
    crc = 0
    for answer, (begin, end) in zip(answers, share.bounds, strict=True):
        crc = _native.crc32_combine(crc, answer["crc"], end - begin)
    return Filled(share.archive, share.destinations, crc)


class ReadShare:
    """What this rank has read, and all that sending needs: nothing is left that can fail on this rank alone."""

    def __init__(self, prepare: Prepare, ranks: RankGroup) -> None:
        self.archive, self.destinations = prepare()
        self.bounds = cut(self.archive.size, ranks.size)
        self.batches = plan(self.archive, self.destinations, self.bounds) if ranks.size > 1 else []
        packed = [batch.nbytes for batch in self.batches if batch.must_be_packed(ranks)]
        self.buffers = [
            torch.empty(max(packed), dtype=torch.uint8, device=ranks.device) for _ in range(min(_IN_FLIGHT, len(packed)))
        ]
        self.said = {
            "failure": None,
            "file": [self.archive.size, self.archive.directory_crc32],
            "wanted": _native.crc32(json.dumps(sorted(self.destinations)).encode()),
            "crc": self.archive.fill_share(self.destinations, *self.bounds[ranks.rank]),
        }


def cut(size: int, ranks: int) -> list[tuple[int, int]]:
    """A file in shares of nearly the same size, some of them empty if it is small."""
    begins = [size * rank // ranks // _PAGE * _PAGE for rank in range(ranks)]
    return list(itertools.pairwise([*begins, size]))


# ---- what the ranks tell each other ----------------------------------------------------------------------------------


def _tell_failure(ranks: RankGroup, error: Exception) -> None:
    text = str(error) or type(error).__name__
    try:
        ranks.gather({"failure": text[:TEXT]})
    except PeerError as silence:  # the error itself says more
        error.__context__ = silence


def _compare(archive: Archive, answers: list[dict[str, Any]]) -> None:
    """
    Raises:
        PeerError, CorruptError, CheckpointError: see read_together_into(); the same on all ranks but those that failed.
    """
    failed = {rank: answer["failure"] for rank, answer in enumerate(answers) if answer["failure"] is not None}
    if failed:
        rank, cause = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise PeerError(f"rank {rank}{more} could not read its share of '{archive.path}': {cause}", failed)
    if strays := _differing(answers, "file"):
        raise CorruptError(
            f"'{archive.path}' is another file on rank {strays} than on rank 0: all ranks must see the same directory"
        )
    if strays := _differing(answers, "wanted"):
        raise CheckpointError(
            f"rank {strays} wants other records of '{archive.path}' than rank 0: ranks that read a file together must load "
            "the same parts of it, into targets of the same kind; or set Options.replicated_readers='each'"
        )


def _differing(answers: list[dict[str, Any]], what: str) -> str:
    strays = [str(rank) for rank, answer in enumerate(answers) if answer[what] != answers[0][what]]
    return ", ".join(strays[:4]) + (" and more" if len(strays) > 4 else "")


# ---- who sends what --------------------------------------------------------------------------------------------------


class Batch:
    """What goes with one broadcast: parts of destinations, which the rank `owner` has read.

    Attributes:
        parts: tensors of bytes over the memory of the destinations, which they keep alive.
    """

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.parts: list[torch.Tensor] = []
        self.nbytes = 0

    def add(self, part: torch.Tensor) -> None:
        self.parts.append(part)
        self.nbytes += part.nbytes

    def must_be_packed(self, ranks: RankGroup) -> bool:
        return ranks.staged or len(self.parts) > 1


def plan(archive: Archive, destinations: Mapping[str, Place], bounds: list[tuple[int, int]]) -> list[Batch]:
    """The batches in the order of sending: the same on all ranks that want the same records of the same file."""
    begins = [begin for begin, _ in bounds]
    queues = [_Queue(owner) for owner in range(len(bounds))]
    for record, name in sorted((archive.records[name], name) for name in destinations):
        whole = _as_bytes(destinations[name], record.size)
        done = 0
        while done < record.size:
            owner = bisect.bisect_right(begins, record.offset + done) - 1
            here = min(bounds[owner][1] - record.offset, record.size) - done
            queues[owner].add(whole.narrow(0, done, here))
            done += here
    turns = itertools.zip_longest(*(queue.batches for queue in queues))  # so that all links have something to do
    return [batch for turn in turns for batch in turn if batch is not None]


class _Queue:
    """The batches of one rank; small parts gather in one until it is full."""

    def __init__(self, owner: int) -> None:
        self.batches: list[Batch] = []
        self._owner = owner
        self._open: Batch | None = None

    def add(self, part: torch.Tensor) -> None:
        for piece in part.split(_BATCH_BYTES):
            if piece.nbytes >= _LARGE:
                self._new().add(piece)
                continue
            if self._open is None or self._open.nbytes + piece.nbytes > _BATCH_BYTES:
                self._open = self._new()
            self._open.add(piece)

    def _new(self) -> Batch:
        self.batches.append(Batch(self._owner))
        return self.batches[-1]


def _as_bytes(place: Place, nbytes: int) -> torch.Tensor:
    storage = place.untyped_storage() if isinstance(place, torch.Tensor) else place
    first = place.data_ptr() - storage.data_ptr() if nbytes else 0
    if first + nbytes > storage.nbytes():  # torch would give the storage new memory
        raise ValueError(f"a record of {nbytes} bytes is to go where there is room for {storage.nbytes() - first}")
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, first, (nbytes,), (1,))


# ---- sending ---------------------------------------------------------------------------------------------------------


class _Flight(NamedTuple):
    batch: Batch
    work: Any
    buffer: torch.Tensor | None  # None: it goes from place to place


def _send(ranks: RankGroup, share: ReadShare) -> None:
    """Every batch from its owner to all others."""
    spare = list(share.buffers)
    flights: deque[_Flight] = deque()
    with ranks.explained():
        for batch in share.batches:
            if len(flights) == _IN_FLIGHT:
                _land(ranks, flights.popleft(), spare)
            flights.append(_launch(ranks, batch, spare))
        while flights:
            _land(ranks, flights.popleft(), spare)


def _launch(ranks: RankGroup, batch: Batch, spare: list[torch.Tensor]) -> _Flight:
    buffer = spare.pop() if batch.must_be_packed(ranks) else None
    if buffer is None:
        return _Flight(batch, ranks.start_broadcast(batch.parts[0], batch.owner), None)
    sent = buffer.narrow(0, 0, batch.nbytes)
    if batch.owner == ranks.rank:
        for part, room in zip(batch.parts, _rooms(batch, sent), strict=True):
            room.copy_(part)
    return _Flight(batch, ranks.start_broadcast(sent, batch.owner), buffer)


def _land(ranks: RankGroup, flight: _Flight, spare: list[torch.Tensor]) -> None:
    flight.work.wait()
    if flight.buffer is None:
        return
    if flight.batch.owner != ranks.rank:
        for part, room in zip(flight.batch.parts, _rooms(flight.batch, flight.buffer), strict=True):
            part.copy_(room)
    spare.append(flight.buffer)


def _rooms(batch: Batch, buffer: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One for each part, one behind the other."""
    return buffer.narrow(0, 0, batch.nbytes).split([part.nbytes for part in batch.parts])
