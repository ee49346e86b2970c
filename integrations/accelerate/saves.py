"""What enable() has asked for, and what saves and finds states accordingly, in this process."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ckpt
from ckpt.errors import CorruptError, UnsupportedError

from ..huggingface.open_bundle import OpenBundle, writing_to
from ..huggingface.saved_again import is_saved_again
from ..huggingface.session import Session
from . import accelerate_private as private
from . import hooked_files, places
from .places import Place
from .retention import Retention

logger = logging.getLogger("ckpt")

_ADVICE = "If it is called by the main process alone: enable(ranks='main')"
_NOT_OURS = ("XLA", "MEGATRON_LM")
_PARTS = ("FSDP", "DEEPSPEED")  # each rank holds a part


class StateSaves:
    """
    Args:
        options: see ckpt.Options.
        main_alone: whether only the main process saves.
    """

    def __init__(self, options: ckpt.Options | None, main_alone: bool) -> None:
        self.options = options
        self._main_alone = main_alone
        self._session: Session | None = None
        self._newest: dict[Path, ckpt.PendingSave] = {}  # that may be in flight
        self._said: set[str] = set()
        self._retention = Retention()

    # ---- saving ----------------------------------------------------------------------------------------------------

    def why_not(self, accelerator: Any) -> str | None:
        """Why accelerate is to save by itself; None: it need not."""
        kind = private.distributed_type(accelerator)
        if kind in _NOT_OURS:
            return f"the kind of training is {kind}"
        if accelerator.project_configuration.save_on_each_node:
            return "save_on_each_node is set"
        return None

    def refuse_others(self, accelerator: Any) -> None:
        """
        Raises:
            CheckpointError: this process is not to save, and its part of the state would be lost.
        """
        if self._main_alone and not accelerator.is_main_process:
            raise ckpt.CheckpointError(
                f"save_state() was called by process {accelerator.process_index}, and {private.ADAPTER} was enabled with "
                "ranks='main', so that only the main process saves: enable it without, if all processes call it"
            )

    def say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("accelerate saves by itself, and the training waits for it, because %s", reason)

    def place_of(self, accelerator: Any, output_dir: Any) -> tuple[Place, bool]:
        """Where a state goes, the same on all ranks; and whether the directory is to get its name last.

        Raises:
            ValueError: accelerate's next number is taken.
        """
        session = self._session_for(accelerator)
        automatic = accelerator.project_configuration.automatic_checkpoint_naming
        place = places.next_place(accelerator) if automatic else places.place_at(output_dir)
        in_flight = self._in_flight(place.path)
        if in_flight is not None and not automatic:
            in_flight.exception(session.options.drain_timeout_s)  # what lies there is about to be replaced

        def look() -> tuple[bool, str | None]:
            return in_flight is not None or place.path.exists(), places.why_in_place(place)

        is_taken, in_place = session.decide(look)
        if automatic and is_taken:
            places.refuse_taken(place)
        if automatic and accelerator.is_main_process:
            self._say_lower(place)
        if in_place is not None and accelerator.is_main_process:
            self._say_in_place(place, in_place)
        return place, in_place is None

    def _say_lower(self, place: Place) -> None:
        """Accelerate counts from 0 after a load, and takes the highest number for the newest."""
        highest = places.highest_beside(place)
        if highest > (place.number or 0) and "lower" not in self._said:
            self._said.add("lower")
            logger.warning(
                "'%s' is saved where there is number %d, which load_state() takes for newer, and total_limit keeps longer: set "
                "accelerator.project_configuration.iteration = %d behind load_state()",
                place.path,
                highest,
                highest + 1,
            )

    def _say_in_place(self, place: Place, reason: str) -> None:
        kind = reason.partition(" ")[0]
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(
                "'%s' %s: only the state's files there are replaced when all is durable, and what hooks write is there at "
                "once, whether the save succeeds or not",
                place.path,
                reason,
            )

    @contextlib.contextmanager
    def saving(self, accelerator: Any, place: Place, named_last: bool) -> Iterator[OpenBundle]:
        """Meanwhile accelerate is to write into the directory of what this gives. Then all of it goes to the background.

        Raises:
            CheckpointError: as BundleCheckpointer.begin().
        """
        session = self._session_for(accelerator)
        step = int(accelerator.step) if place.number is None else place.number
        bundle = session.begin(place.root, place.name, step=step, named_last=named_last)
        bundle.suppose_frozen(private.models_of(accelerator), private.optimizers_of(accelerator))
        try:
            with writing_to(bundle):
                yield bundle
            if named_last:
                bundle.write_now(functools.partial(hooked_files.note, bundle, session.rank))
        except BaseException as error:
            bundle.fail(error)
            bundle.commit()
            raise
        self._note(place.path, bundle.commit())

    def keep(self, accelerator: Any, place: Place, limit: int | None) -> None:
        """Once the newest save is durable, older ones than so many go; on the main process."""
        if limit is None or not accelerator.is_main_process:
            return
        self._retention.behind(self._newest[place.path], place.path, limit, self._session_for(accelerator).bundles)

    def _note(self, path: Path, pending: ckpt.PendingSave) -> None:
        self._newest = {known: save for known, save in self._newest.items() if not save.done()}
        self._newest[path] = pending

    def _in_flight(self, path: Path) -> ckpt.PendingSave | None:
        found = self._newest.get(path)
        return None if found is None or found.done() else found

    # ---- loading ---------------------------------------------------------------------------------------------------

    def find(self, accelerator: Any, input_dir: Any) -> str | None:
        """The directory to load, once nothing of this job is in flight, verified.

        Args:
            input_dir: None: the newest of those that accelerate has numbered that is good.

        Returns:
            None: accelerate is to say that there is none.

        Raises:
            CorruptError: it is damaged or incomplete; if it was not named, all are.
        """
        if not self._main_alone:
            return self._find(accelerator, input_dir)
        from accelerate.utils import broadcast_object_list

        said: list[Any] = [None, None]
        cause: Exception | None = None
        if accelerator.is_main_process:
            try:
                said[0] = self._find(accelerator, input_dir)
            except Exception as error:  # whatever it is: the others are waiting
                cause = error
                said[1] = error if isinstance(error, ckpt.CheckpointError) else _as_told(error)
        if accelerator.num_processes > 1:
            broadcast_object_list(said)
        if cause is not None:
            raise cause
        if said[1] is not None:
            raise said[1]
        found: str | None = said[0]
        return found

    def _find(self, accelerator: Any, input_dir: Any) -> str | None:
        session = self._session_for(accelerator)
        session.bundles.wait_quietly()
        self._retention.wait()
        if input_dir is not None:
            place = places.place_at(os.path.expanduser(input_dir))
            return str(place.path) if self._is_good(session, place.root, place.name) else None
        root = Path(os.path.abspath(accelerator.project_dir))
        session.bundles.find(root, f"{private.FOLDER}/none")  # what a crash has left unnamed gets its name
        names = session.decide(lambda: [path.name for path in reversed(places.numbered_in(root / private.FOLDER))])
        worst: CorruptError | None = None
        for name in names:
            try:
                if self._is_good(session, root, f"{private.FOLDER}/{name}"):
                    return str(root / private.FOLDER / name)
            except CorruptError as error:
                worst = worst or error
                logger.warning("'%s' is not a good checkpoint, an older one is looked for: %s", name, error)
        if worst is not None:
            raise worst
        return None

    def _is_good(self, session: Session, root: Path, name: str) -> bool:
        """False: there is none.

        Raises:
            CorruptError: it is damaged or incomplete, and accelerate has not saved it again by itself since.
        """
        try:
            return session.bundles.find(root, name) is not None
        except CorruptError:
            if not session.decide(functools.partial(is_saved_again, root / name)):
                raise
        logger.warning("'%s' is not verified: it was saved again without %s", root / name, private.ADAPTER)
        return True

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None) -> None:
        session = self._usable()
        if session is not None:
            try:
                session.bundles.wait(timeout)
            finally:
                self._retention.wait()  # for those behind what is done

    def close(self) -> ckpt.CheckpointError | None:
        """Waits for what is in flight, and ends; the next save begins anew. The error of the newest save, if it failed."""
        session, self._session = self._usable(), None
        if session is None:
            return None
        try:
            session.bundles.wait_quietly()
            self._retention.wait()  # which needs the session
        except ckpt.CheckpointError:
            pass  # close() says what it is
        try:
            session.close()
        except ckpt.CheckpointError as error:
            return error
        return None

    def _usable(self) -> Session | None:
        """None, too, in a process that was forked: what belongs to its parent is left alone."""
        return self._session if self._session is not None and self._session.owner == os.getpid() else None

    def _session_for(self, accelerator: Any) -> Session:
        if self._main_alone and private.distributed_type(accelerator) in _PARTS:
            raise UnsupportedError(
                f"{private.ADAPTER} was enabled with ranks='main', and with {private.distributed_type(accelerator)} each rank "
                "holds a part of the model: enable it without, and call save_state() on all ranks"
            )
        session = self._usable()
        if session is None:
            make = functools.partial(Session, what="save_state()", advice=_ADVICE)
            session = self._session = make(self.options, alone=self._main_alone or accelerator.num_processes == 1)
        return session


def _as_told(error: Exception) -> ckpt.CheckpointError:
    """To the other processes, which may not be able to make one like it."""
    return ckpt.CheckpointError(f"the main process: {type(error).__name__}: {error}")
