"""Checkpoints of torch.distributed.checkpoint (DCP) in directories that a user names. For adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt.commit.agreement import Refusal, find_refusal
from ckpt.commit.apart import all_files, set_apart
from ckpt.commit.conversation import RankConversation
from ckpt.commit.directory_target import DirectoryTarget
from ckpt.commit.layout_exchange import LayoutExchange
from ckpt.commit.publication import Publication
from ckpt.commit.replica_check import digest_of
from ckpt.commit.target import SaveCall, SavedFile
from ckpt.coordinator import Coordinator, make_coordinator
from ckpt.coordinator.torch_store import of_group
from ckpt.directory.dcp_directory import DcpDirectory
from ckpt.directory.manifest import SHARDED
from ckpt.errors import CheckpointError, DeadlineError, PeerError, StorageError, UnsupportedError
from ckpt.formats.dcp_file import DcpFile
from ckpt.options import Options
from ckpt.plan.frozen_marks import FrozenHint, hint_of
from ckpt.saving.file_in_flight import FileInFlight
from ckpt.saving.frozen_file import settle
from ckpt.saving.pending import PendingSave
from ckpt.saving.submit import start
from ckpt.saving.task import SaveTask
from ckpt.session import SaveSession
from ckpt.sharded.entries import EntryFinder, is_stateful
from ckpt.sharded.metadata import MetadataWriter
from ckpt.sharded.planning import ShardedPlanner

_MOST_LIMITS = 16  # directories of which it is remembered what direct I/O demands there
_UNSUPPORTED = UnsupportedError.__name__


class DcpCheckpointer(SaveSession):
    """Saves sharded states, each to a directory that the caller names, where readers of torch.distributed.checkpoint find it.

    In a job of several ranks each makes one, and all make the same calls in the same order. A directory may be saved to again:
    readers find the former checkpoint there, whole, until the new one is durable on all ranks, and then that.

    Args:
        options: see Options. Each save waits for its place in flight, and failures are told by the saves alone: `when_busy` and
            `max_failed_saves` have no effect.
        group: the process group whose ranks save together; None: all ranks of torch.distributed, if that is initialised.
        alone: this process saves for itself, whatever torch.distributed says.

    Raises:
        CheckpointError: the ranks cannot agree; PeerError: not all of them came.
        ValueError: this process is not in the group.
    """

    def __init__(self, *, options: Options | None = None, group: Any = None, alone: bool = False) -> None:
        given = dataclasses.replace(options or Options(), when_busy="wait", max_failed_saves=0)
        made = _coordinator(group, alone)
        super().__init__(given, made, owned=True, what="this DcpCheckpointer", stream="dcp")
        self._conversation = RankConversation(made, f"{self._stream}-save", self.options.commit_timeout_s)
        finder = EntryFinder(self.rank, self.world_size)
        self._format = DcpFile(ShardedPlanner(finder, self.rank, self.world_size))
        self._layouts = LayoutExchange(MetadataWriter(self.options.metadata_compat))
        self._lock = threading.Lock()
        self._directories: dict[Path, tuple[DcpDirectory, int]] = {}  # guarded by _lock; and the saves in flight to each
        self._limits: dict[Path, tuple[int, int]] = {}  # what direct I/O was found to demand below these directories
        weakref.finalize(self, _release_all, self._directories).atexit = False  # then the kernel does it, after the drain

    def save(
        self, directory: str | os.PathLike[str], state: Mapping[str, Any], *, lazy: Any = None, frozen: Any = None
    ) -> PendingSave:
        """Saves a state dict to `directory`, in the background.

        The ranks tell each other in a round trip that they have planned it, and what of it must be the same: nothing is begun
        if one of them cannot save it.

        Args:
            state: as `sharded=` of Checkpointer.save(). Of what is the same on all ranks, tensors that are no DTensors too, one
                rank's is saved; their bytes are not compared.
            lazy: as in `ckpt.save`.
            frozen: as in Checkpointer.save().

        Raises:
            UnsupportedError: the state of a rank is not of this kind, or ranks have other keys or values; on all of them.
            InUseError, StorageError, DeviceError, ClosedError: it could not be begun here; PeerError: on another rank.

        What goes wrong later is raised by the result's `result()`, and logged.
        """
        self._check_usable()
        path = Path(os.path.abspath(os.fspath(directory)))
        call = SaveCall(self._saves, 0, f"'{path}'", where=path, directory=path)
        self._saves += 1  # whatever happens: all ranks count their calls
        task = SaveTask(path, on_done=functools.partial(self._note_done, call.number))
        agreement = _Agreement(self, call)
        try:
            state = _with_state_dicts(state)
            agreement.has_states = True
            self._begin(task, call, state, lazy, agreement, hint_of(frozen))
        except BaseException as error:
            if not agreement.reached:
                if (explained := agreement.explain(error)) is error:
                    raise
                raise explained from error
            self._attend(task, call, error)
            if not isinstance(error, (StorageError, DeadlineError)):
                raise
            task.fail(error.with_traceback(None))  # whose frames would keep the state alive
        self._remember(task)
        return PendingSave(task)

    def _begin(
        self, task: SaveTask, call: SaveCall, state: Any, lazy: Any, agreement: _Agreement, hint: FrozenHint | None
    ) -> None:
        place = self._enter(call.directory)
        try:
            place.claim()
            with self._lock:
                target, limits = place.take_name(self.rank), self._limits.get(call.directory.parent)
            file = FileInFlight(target, limits=limits, with_directory=True, number=call.number, made=self._format)
            self._baselines.follow(file, call.directory.parent, SHARDED, hint)
            if self._frozen_files.is_for(hint):
                apart = place.take_name(self.rank, "_frozen")
                set_apart(file, apart, self._frozen_files, f"{call.directory.parent}/{SHARDED}", None, self._format)

            def publish(error: BaseException | None) -> Path:
                try:
                    error = settle([file], error)
                    saved = dataclasses.replace(call, files=all_files([SavedFile(file, SHARDED)]))
                    done = self._publish(task, saved, place, error)
                    self._layouts.note_published()
                    return done
                finally:
                    self._note_limits(file)
                    file.forget_structure()
                    self._leave(place)

            start(
                self._runtime,
                self._finisher,
                task,
                [(file, state, True)],
                publish,
                lazy=lazy,
                options=self.options,
                ready=lambda: agreement.reach(file),
            )
        except BaseException:
            if not task.handed_over:
                self._leave(place)
            raise

    def _publish(self, task: SaveTask, call: SaveCall, place: DcpDirectory, error: BaseException | None) -> Path:
        return Publication(self._conversation, DirectoryTarget(call, place, self.rank, self._layouts), task).run(error)

    def _attend(self, task: SaveTask, call: SaveCall, error: BaseException) -> None:
        """Lets the other ranks know of a save that was agreed upon and could not be begun here."""
        if task.handed_over:
            self._pending.append(task)
        elif self.world_size > 1:
            said = CheckpointError(str(error) or type(error).__name__)  # words: the error's frames hold the state
            place = DcpDirectory(call.directory, locks=False)
            attended = SaveTask(call.directory)
            self._finisher.attend(attended, lambda _: self._publish(task, call, place, said))
            self._pending.append(attended)

    # ---- directories -----------------------------------------------------------------------------------------------

    def _enter(self, path: Path) -> DcpDirectory:
        with self._lock:
            place, users = self._directories.get(path) or (DcpDirectory(path, locks=self.rank == 0), 0)
            self._directories[path] = place, users + 1
            return place

    def _leave(self, place: DcpDirectory) -> None:
        with self._lock:
            found, users = self._directories.get(place.path, (None, 0))
            if found is not place:  # all were released
                return
            self._directories[place.path] = place, users - 1
            if users == 1:
                del self._directories[place.path]
                place.release()

    def _note_limits(self, file: FileInFlight) -> None:
        if (limits := file.found_limits()) is not None:
            with self._lock:
                if len(self._limits) >= _MOST_LIMITS:
                    self._limits.clear()
                self._limits[file.target.parent.parent] = limits

    def _release(self) -> None:
        with self._lock:
            _release_all(self._directories)


class _Agreement:
    """Of all ranks, on one save, before any of it is begun.

    Attributes:
        reached: all go on. Else nothing is owed to the others once explain() has returned.
        has_states: what has a state dict has given it. What goes wrong before is no matter of what is saved, or by whom.
    """

    def __init__(self, session: DcpCheckpointer, call: SaveCall) -> None:
        self._session, self._call = session, call
        self.reached = self.has_states = False
        self._asked = False

    def reach(self, file: FileInFlight) -> None:
        """
        Raises:
            UnsupportedError: ranks have other keys or values, or one cannot save its state.
            PeerError: another rank cannot begin it, or does not answer.
        """
        digest = dataclasses.astuple(digest_of(file.pickle, file.sizes, 0))
        refusal = self._exchange({"what": self._call.what, "kind": "", "text": "", "digest": list(digest)})
        if refusal is not None:
            raise (UnsupportedError if refusal["kind"] == _UNSUPPORTED else PeerError)(refusal["text"])
        self.reached = True

    def explain(self, error: BaseException) -> BaseException:
        """What this rank raises because of what went wrong before all agreed; the others are told."""
        is_unfit = self.has_states and isinstance(error, Exception) and not isinstance(error, CheckpointError)
        text = str(error) or type(error).__name__
        if not self._asked:
            kind = _UNSUPPORTED if is_unfit else "CheckpointError"
            with contextlib.suppress(CheckpointError):
                self._exchange({"what": self._call.what, "kind": kind, "text": text, "digest": []})
        return UnsupportedError(text) if is_unfit else error

    def _exchange(self, own: dict[str, Any]) -> Refusal | None:
        """What keeps the ranks from saving, the same on all of them."""
        self._asked = True
        session = self._session
        if session.world_size == 1:
            return None
        key = f"{session._stream}-begin/{self._call.number}"
        return find_refusal(session._coordinator, key, own, _judge, session.options.timeout_s)


def _with_state_dicts(state: Any) -> Any:
    if not isinstance(state, Mapping):
        return state
    return {key: value.state_dict() if is_stateful(value) else value for key, value in state.items()}


def _judge(answers: list[dict[str, Any]]) -> Refusal | None:
    kinds = sorted((answer["kind"] in ("", _UNSUPPORTED), rank) for rank, answer in enumerate(answers) if answer["kind"])
    if kinds:  # an error before what is only not supported
        answer = answers[kinds[0][1]]
        return {"kind": answer["kind"], "text": f"rank {kinds[0][1]} cannot save {answer['what']}: {answer['text']}"}
    for rank, answer in enumerate(answers):
        if answer["what"] != answers[0]["what"]:
            text = f"rank {rank} saves {answer['what']} where rank 0 saves {answers[0]['what']}"
            return {"kind": CheckpointError.__name__, "text": f"{text}: all ranks must make the same saves"}
        if answer["digest"] != answers[0]["digest"]:
            text = f"rank {rank} has other keys, values, shapes or placements than rank 0"
            return {"kind": _UNSUPPORTED, "text": text}
    return None


def _coordinator(group: Any, alone: bool) -> Coordinator:
    import torch.distributed as dist

    if alone or not dist.is_available() or not dist.is_initialized():
        return make_coordinator("local")
    if group is None or group is dist.group.WORLD:
        return make_coordinator("torch" if dist.get_world_size() > 1 else "local")
    if dist.get_rank(group) < 0:
        raise ValueError("this process does not belong to the process group whose ranks are to save together")
    return of_group(group) if dist.get_world_size(group) > 1 else make_coordinator("local")


def _release_all(directories: dict[Path, tuple[DcpDirectory, int]]) -> None:
    while directories:
        directories.popitem()[1][0].release()
