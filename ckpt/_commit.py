"""Two-phase commit: a step is a checkpoint when the files of every rank are durable, and not before.

    prepare    every rank: its files have their names, durably; or an error. Rank 0 gathers all of it.
    publish    rank 0, if all are well: manifest, then `latest`. See StepDirectories.publish().
    verdict    rank 0 tells everybody. Only now a rank's result() returns, or it takes its files back.

A rank that does not hear the verdict does not know the outcome, and leaves its files alone: the manifest decides. Every save()
takes part, also one that failed before it began, because the others wait for word from it. Runs on the committer's thread.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import zlib
from base64 import b85decode, b85encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckpt import _manifest, _storage
from ckpt._directory import StepDirectories
from ckpt._file_save import FileSave
from ckpt._manifest import REPLICATED, FileEntry, Manifest
from ckpt._replicas import Digest, digest_of, first_difference, without_devices
from ckpt._shares import Share, join_shares, share_of
from ckpt.coordinator import Coordinator
from ckpt.errors import CheckpointError, NotACheckpointError, PeerError, SkippedError

logger = logging.getLogger("ckpt")

_LARGEST_COMPARED = 4 << 20  # bytes of a pickle that is sent to all ranks to find the first difference


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a step, as far as this rank is concerned."""

    file: FileSave
    kind: str  # as in the manifest
    written: bool  # by this rank, or its share of it; else it is only compared

    @property
    def is_shared(self) -> bool:
        """All ranks write it together, and rank 0 gives it its name."""
        return self.file.sharing is not None


@dataclasses.dataclass(frozen=True)
class Ticket:
    """One call of save(), the same on all ranks."""

    number: int
    step: int
    directory: Path
    parts: tuple[Part, ...] = ()


@dataclasses.dataclass(frozen=True)
class Failure:
    text: str
    ranks: tuple[int, ...]
    skipped: bool = False


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a rank says in the first phase."""

    step: int
    failure: str | None = None
    skipped: bool = False
    files: tuple[FileEntry, ...] = ()
    digests: tuple[Digest, ...] = ()
    shares: tuple[Share, ...] = ()

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @staticmethod
    def from_json(text: bytes) -> Prepared:
        said = json.loads(text)
        files = _manifest.parse_files(said["files"])
        digests = tuple(Digest(**digest) for digest in said["digests"])
        shares = tuple(Share(**share) for share in said["shares"])
        return Prepared(said["step"], said["failure"], said["skipped"], files, digests, shares)


class StepCommitter:
    """
    Args:
        stream: of the keys; no other conversation of this job uses it.
        timeout_s: how long rank 0 waits for the slowest rank, seconds.
    """

    def __init__(self, directories: StepDirectories, coordinator: Coordinator, stream: str, timeout_s: float) -> None:
        self._directories = directories
        self._coordinator = coordinator
        self._stream = stream
        self._timeout_s = timeout_s

    def commit(self, ticket: Ticket, error: BaseException | None) -> Path:
        """
        Args:
            error: what has already gone wrong on this rank.

        Returns:
            The step's directory, which is a checkpoint now.

        Raises:
            PeerError: another rank failed, or does not answer. Or what went wrong here.
        """
        prepared, error = self._prepare(ticket, error)
        if self._coordinator.rank == 0:
            failure, error = self._lead(ticket, prepared, error)
        else:
            failure = self._follow(ticket, prepared)
        if failure is None:
            return ticket.directory
        for part in ticket.parts:
            if part.written and (self._coordinator.rank == 0 or not part.is_shared):
                self._directories.take_back(part.file.target)
        raise error if error is not None else self._as_error(ticket, failure)

    # ---- prepare ---------------------------------------------------------------------------------------------------

    def _prepare(self, ticket: Ticket, error: BaseException | None) -> tuple[Prepared, BaseException | None]:
        """Gives this rank's files their names. An error is a message to the others, too."""
        try:
            if error is not None:
                raise error
            files = tuple(self._place(part) for part in ticket.parts if part.written and not part.is_shared)
            if self._coordinator.world_size == 1:
                return Prepared(ticket.step, files=files), None
            shares = tuple(share_of(part.file) for part in ticket.parts if part.is_shared)
            digests = tuple(_digest(part) for part in ticket.parts if part.kind == REPLICATED)
        except BaseException as caught:
            error = caught.with_traceback(None)
            return Prepared(ticket.step, str(error) or type(error).__name__, isinstance(error, SkippedError)), error
        return Prepared(ticket.step, files=files, digests=digests, shares=shares), None

    def _place(self, part: Part) -> FileEntry:
        self._directories.place(part.file.temporary, part.file.target)
        job = part.file.job
        return FileEntry(part.file.target.name, job.size, job.crc32, part.kind, self._coordinator.rank)

    # ---- rank 0 ----------------------------------------------------------------------------------------------------

    def _lead(self, ticket: Ticket, own: Prepared, error: BaseException | None) -> tuple[Failure | None, BaseException | None]:
        failure, answers = self._gather(ticket, own)
        _storage.crash_point("prepared")
        differing = _find_differing(answers)
        if differing:
            failure = self._explain(ticket, differing)
        manifest = before = None
        if failure is None:
            try:
                before = _read_or_none(ticket.directory)
                files = tuple(file for answer in answers for file in answer.files) + self._join_shares(ticket, answers)
                world = self._coordinator.world_size
                manifest = Manifest(ticket.step, self._directories.take_sequence(), world, files)
                self._directories.publish(manifest, ticket.directory)
            except Exception as caught:
                error = caught.with_traceback(None)
                failure = Failure(f"rank 0 could not publish it: {error}", (0,))
        _storage.crash_point("published")
        if manifest is not None and failure is None:
            # Before the others hear of it: afterwards they may be writing the next save into what is removed here.
            self._directories.tidy(ticket.directory, manifest, before)
            _storage.crash_point("tidied")
        self._announce(self._key(ticket, "verdict", bool(differing)), {"failure": failure and dataclasses.asdict(failure)})
        return failure, error

    def _join_shares(self, ticket: Ticket, answers: Sequence[Prepared]) -> tuple[FileEntry, ...]:
        """Completes the files that all ranks have written, and gives them their names."""
        joined = []
        for number, part in enumerate(part for part in ticket.parts if part.is_shared):
            _storage.crash_point("shares-written")
            crc = join_shares(part.file, [answer.shares[number] for answer in answers])
            self._directories.place(part.file.temporary, part.file.target)
            joined.append(FileEntry(part.file.target.name, part.file.job.size, crc, part.kind))
        return tuple(joined)

    def _gather(self, ticket: Ticket, own: Prepared) -> tuple[Failure | None, list[Prepared]]:
        missing: tuple[int, ...] = ()
        cause = ""
        try:
            payloads = self._coordinator.gather(self._key(ticket, "prepared"), own.to_json(), self._timeout_s) or []
            answers = dict(enumerate(map(Prepared.from_json, payloads)))
        except PeerError as error:
            missing, cause = error.ranks, str(error)
            answers = {rank: Prepared.from_json(payload) for rank, payload in error.payloads.items()}
        except Exception as error:  # whatever it is: the others wait for word
            return Failure(f"rank 0 could not hear the others: {error}", (0,)), []
        failed = {rank: answer for rank, answer in answers.items() if answer.failure is not None}
        if failed:  # a known cause says more than a silence, which may be its consequence
            skipped = all(answer.skipped for answer in failed.values())
            return Failure(_list_failures(failed), tuple(failed), skipped), []
        if cause:
            return Failure(cause, missing), []
        strays = {rank: answer.step for rank, answer in answers.items() if answer.step != ticket.step}
        if strays:
            rank, step = next(iter(strays.items()))
            text = f"rank {rank} saves step {step} where rank 0 saves step {ticket.step}: all ranks must make the same saves"
            return Failure(text, tuple(strays)), []
        return None, [answers[rank] for rank in sorted(answers)]

    def _explain(self, ticket: Ticket, differing: tuple[int, ...]) -> Failure:
        """Asks the ranks whose replicated state is not that of rank 0 for the first difference."""
        ours = _replicated_pickle(ticket)
        sent = b85encode(zlib.compress(ours)).decode() if len(ours) <= _LARGEST_COMPARED else ""
        self._announce(self._key(ticket, "verdict"), {"compare": sent, "ranks": differing})
        try:
            texts = self._coordinator.gather(self._key(ticket, "differences"), b"", self._timeout_s) or []
        except PeerError as error:
            texts = [error.payloads.get(rank, b"") for rank in range(self._coordinator.world_size)]
        except Exception:  # it was for the message only
            texts = []
        first = differing[0]
        found = texts[first].decode(errors="replace") if first < len(texts) else ""
        return Failure(
            f"the replicated state is not the same on all ranks: that of rank {first} differs from that of rank 0"
            + (f", {found}" if found else "")
            + ". Give what differs as the rank's own state",
            differing,
        )

    def _announce(self, key: str, verdict: dict[str, Any]) -> None:
        try:
            self._coordinator.broadcast(key, json.dumps(verdict).encode(), self._timeout_s)
        except CheckpointError as error:  # what is published is published
            logger.error("telling the other ranks the outcome of a save failed: %s", error)

    # ---- the other ranks -------------------------------------------------------------------------------------------

    def _follow(self, ticket: Ticket, own: Prepared) -> Failure | None:
        """
        Raises:
            PeerError: the verdict did not come. The step may have been committed or not.
        """
        self._coordinator.gather(self._key(ticket, "prepared"), own.to_json(), self._timeout_s)
        _storage.crash_point("prepared")
        verdict = self._hear(self._key(ticket, "verdict"))
        if "compare" in verdict:
            text = b""
            if self._coordinator.rank in verdict["ranks"] and verdict["compare"]:
                theirs = zlib.decompress(b85decode(verdict["compare"]))
                text = first_difference(_replicated_pickle(ticket), theirs, self._coordinator.rank, 0).encode()
            self._coordinator.gather(self._key(ticket, "differences"), text, self._timeout_s)
            verdict = self._hear(self._key(ticket, "verdict", again=True))
        failure = verdict["failure"]
        return None if failure is None else Failure(failure["text"], tuple(failure["ranks"]), failure["skipped"])

    def _hear(self, key: str) -> Any:
        # Rank 0 begins to wait for the slowest when its own files are ready, which may be later than ours by as much again; and
        # then it publishes.
        return json.loads(self._coordinator.broadcast(key, None, 3 * self._timeout_s))

    # ---- both ------------------------------------------------------------------------------------------------------

    def _key(self, ticket: Ticket, phase: str, again: bool = False) -> str:
        return f"{self._stream}/{ticket.number}-{phase}{'-again' if again else ''}"

    def _as_error(self, ticket: Ticket, failure: Failure) -> CheckpointError:
        text = f"the save of step {ticket.step} to '{ticket.directory}' was given up by all ranks: {failure.text}"
        return SkippedError(text) if failure.skipped else PeerError(text, failure.ranks)


def _digest(part: Part) -> Digest:
    return digest_of(part.file.pickle, part.file.sizes, part.file.job.layout_crc32 if part.is_shared else 0)


def _find_differing(answers: Sequence[Prepared]) -> tuple[int, ...]:
    return tuple(rank for rank, answer in enumerate(answers) if answer.digests != answers[0].digests)


def _list_failures(failed: dict[int, Prepared]) -> str:
    """The first few ranks and their causes; the same cause once."""
    causes: dict[str, list[int]] = {}
    for rank, answer in sorted(failed.items()):
        causes.setdefault(answer.failure or "", []).append(rank)
    shown = [
        f"rank {', '.join(map(str, ranks[:4]))}{' and more' if len(ranks) > 4 else ''}: {c}" for c, ranks in causes.items()
    ]
    return "; ".join(shown[:3]) + ("; ..." if len(shown) > 3 else "")


def _replicated_pickle(ticket: Ticket) -> bytes:
    return b"".join(without_devices(part.file.pickle) for part in ticket.parts if part.kind == REPLICATED)


def _read_or_none(directory: Path) -> Manifest | None:
    try:
        return _manifest.read(directory)
    except NotACheckpointError:
        return None
