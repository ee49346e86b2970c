"""The CheckpointIO that Lightning is given. What it is called for is in `plugins/io/checkpoint_io.py` of lightning.fabric."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import ckpt
from ckpt import names
from ckpt.errors import CheckpointError, DeadlineError, FailedSavesError, StorageError

from .figures import Figures
from .patch import patch_lightning
from .pending_paths import Pending, PendingPaths
from .places import is_torch_file, local_path, stock_io
from .sharded import NamedLater, ShardedSaves

logger = logging.getLogger("ckpt")

_WAITED_FOR = "hpc_ckpt_"  # what Lightning saves just before it has Slurm end the job and queue it again


class LazyCheckpointIO:
    """Saves the checkpoints of a Trainer, or of a Fabric, in the background. See the package for what that means.

    Args:
        options: see `ckpt.Options`. `when_busy` has no effect: each save waits for its place in flight.
        log_figures: whether the trainer's loggers are told what each save has cost, as `checkpoint/...`, when the next one
            begins or fit() ends.
        closure_first: classes of optimizers, beside those of torch.optim, whose step() calls the closure that it is given once
            and before it writes anything. With others nothing leaves while forward and backward run, because Lightning lets
            step() call them.

    Raises:
        UnsupportedError: this version of Lightning lacks what is needed.
        ImportError: Lightning is not installed.
    """

    def __init__(
        self,
        options: ckpt.Options | None = None,
        *,
        log_figures: bool = False,
        closure_first: Sequence[type[torch.optim.Optimizer]] = (),
    ) -> None:
        self.options = dataclasses.replace(options or ckpt.Options(), when_busy="wait")
        self.log_figures = log_figures
        self.closure_first = tuple(closure_first)
        self._prepare()

    def _prepare(self) -> None:
        patch_lightning(type(self), ours_of)
        self._paths = PendingPaths(self._note, self.options.drain_timeout_s)
        self._sharded = ShardedSaves(self.options)
        self._figures = Figures()
        self._is_lazy = False  # inside a save that training goes on behind
        self._copies = False  # inside one behind which something else writes to the tensors
        self._failed_in_a_row = 0
        self._last_failed: BaseException | None = None
        self._swept: set[str] = set()
        self._trainer: Any = None
        self._ended: tuple[Any, int] | None = None  # a trainer whose training is over, and after how many steps

    def __getstate__(self) -> dict[str, Any]:
        """For processes that Lightning spawns. What is in flight stays here."""
        kept = ("options", "log_figures", "closure_first")
        return {name: value for name, value in self.__dict__.items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    # ---- what Lightning calls --------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Begins to save. It returns when the file is durable if nobody trains behind it.

        Raises:
            TypeError: with storage_options, as Lightning's own.
            FailedSavesError: `Options.max_failed_saves` in a row have failed.
            CheckpointError: it could not be begun; or it was waited for, and has failed.
        """
        if storage_options is not None:
            raise TypeError("LazyCheckpointIO takes no storage_options: it saves to local paths, and leaves URLs to Lightning")
        own = local_path(path)
        if own is None:
            stock_io(path).save_checkpoint(checkpoint, path)
            return
        if not self._is_lazy and (error := self._too_many_failures()) is not None:  # else all ranks have agreed on it
            raise error
        self.begin(own, lambda: self._save(checkpoint, own))

    def _save(self, checkpoint: dict[str, Any], path: Path) -> Pending:
        self._make_ready(path)
        lazy = False if self._copies else None
        if path.is_symlink():
            self._paths.wait()  # none that is older takes the name later
        if not path.is_symlink():
            return ckpt.save(checkpoint, path, lazy=lazy, options=self.options)
        # Lightning replaces a link; what it leads to is another checkpoint, and the last one until this is durable.
        hidden = names.hidden_directory(path)
        return NamedLater([ckpt.save(checkpoint, hidden, lazy=lazy, options=self.options)], hidden, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Loads what is there when all that was begun before has ended, and verifies every byte.

        Raises:
            FileNotFoundError: there is nothing.
            CheckpointError: it is damaged; or the newest save to it has failed, and what is there is older.
        """
        own = local_path(path)
        self.settle(own)
        if own is None or not own.is_file() or not is_torch_file(own):
            if own is not None and not own.exists():
                raise FileNotFoundError(f"Checkpoint file not found: {path}")
            more = {} if map_location is None else {"map_location": map_location}
            return stock_io(path).load_checkpoint(path, weights_only=weights_only, **more)
        self.refuse_older(own)
        trusted = weights_only is False or (weights_only is None and _trusts_all())
        return ckpt.load(own, map_location="cpu" if map_location is None else map_location, weights_only=not trusted)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes it when the newest save that was begun before is durable; never if that fails."""
        own = local_path(path)
        if own is None:
            stock_io(path).remove_checkpoint(path)
        else:
            self._paths.remove(str(own))

    def teardown(self) -> None:
        """Waits for all that is in flight. What fails now is logged: where no error was on its way, finish() came before."""
        try:
            self._end()
        except CheckpointError:
            logger.exception("the newest checkpoint did not become durable")

    def _end(self) -> None:
        with contextlib.ExitStack() as ending:
            ending.callback(self.tell_figures)
            ending.callback(self._sharded.close)
            self.wait()

    # ---- for users -------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Waits until every save is durable, and what waited for it, as removals and links, is done.

        Raises:
            CheckpointError: the newest save has failed; DeadlineError: it took longer than `Options.drain_timeout_s`.
        """
        self._paths.wait()
        error, self._last_failed = self._last_failed, None
        if error is not None:
            raise error

    # ---- for what is replaced in Lightning -------------------------------------------------------------------------

    def begin(self, path: Path, make: Any, failures: tuple[type[CheckpointError], ...] = (StorageError, DeadlineError)) -> None:
        """A save, by whatever makes it; it is waited for unless training goes on behind it.

        Args:
            failures: errors of `make` that count as if the save had failed behind the training's back.
        """
        try:
            pending = self._paths.begin(str(path), make)
        except failures as refused:
            if not self._is_lazy:
                raise
            logger.error("the save to '%s' could not be begun: %s", path, refused)
            failed: concurrent.futures.Future[Path] = concurrent.futures.Future()
            failed.set_exception(refused.with_traceback(None))
            pending = self._paths.begin(str(path), lambda: failed)
        if not self._is_lazy or path.name.startswith(_WAITED_FOR):
            self._paths.wait()
            if (error := pending.exception()) is not None:
                self._last_failed = None
                raise error

    def settle(self, path: Path | None) -> None:
        """Nothing is under way behind this, and what is loaded, from there, may be written to the tensors."""
        ckpt.fence()
        self._paths.wait()
        if path is not None and not path.exists():
            names.remove_abandoned(path.parent)  # a crash may have left it without its name

    def finish(self, strategy: Any) -> None:
        """The end of a training without an error, on all ranks: none goes on before the newest save of all of them is durable.

        Raises:
            CheckpointError: it is not, on all ranks.
        """
        self._agree(strategy, self._end)

    def note_end(self, trainer: Any) -> None:
        """Until it takes a step nobody trains behind what it saves, as in on_fit_end(), and nobody waits for it."""
        self._ended = weakref.ref(trainer), trainer.global_step

    def has_ended(self, trainer: Any) -> bool:
        return self._ended is not None and self._ended[0]() is trainer and self._ended[1] == trainer.global_step

    def settle_together(self, strategy: Any, path: Any) -> None:
        """Before a checkpoint is loaded, on all ranks.

        Raises:
            CheckpointError: the newest save to it has failed, on all ranks.
        """
        own = local_path(path)

        def settled() -> None:
            self.settle(own)
            if own is not None:
                self.refuse_older(own)

        self._agree(strategy, settled)

    def agree_to_save(self, strategy: Any) -> None:
        """Before all ranks save.

        Raises:
            FailedSavesError: too many have failed in a row on rank 0, on all ranks.
        """
        found = self._too_many_failures() if strategy.is_global_zero else None
        told = strategy.broadcast(None if found is None else str(found))
        if told is not None:
            self._failed_in_a_row = 0
            raise FailedSavesError(told) from (None if found is None else found.__cause__)

    def _agree(self, strategy: Any, act: Callable[[], object]) -> None:
        """Raises everywhere what it raises on rank 0."""
        own: CheckpointError | None = None
        try:
            act()
        except CheckpointError as error:
            own = error
        told = strategy.broadcast(None if own is None else str(own))
        if own is not None:
            raise own
        if told is not None:
            raise CheckpointError(f"on rank 0: {told}")

    def refuse_older(self, path: Path) -> None:
        """
        Raises:
            CheckpointError: the newest save to it has failed.
        """
        if (error := self._paths.failure_of(str(path))) is not None:
            raise CheckpointError(
                f"the newest save to '{path}' failed ({error}): what is there is older. Load another checkpoint, or this one "
                "by ckpt.load()"
            ) from error

    @contextlib.contextmanager
    def training_goes_on(self, trainer: Any = None, copies: bool = False) -> Iterator[None]:
        """Around a save behind which the training goes on."""
        before = self._is_lazy, self._copies
        self._is_lazy, self._copies = True, copies or self._copies
        if trainer is not None:
            self._trainer = weakref.ref(trainer)
        try:
            yield
        finally:
            self._is_lazy, self._copies = before

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Around saves behind which something writes to the tensors, without a fence."""
        before, self._copies = self._copies, True
        try:
            yield
        finally:
            self._copies = before

    def save_sharded(self, strategy: Any, state: dict[str, Any], rest: dict[str, Any], path: Path) -> None:
        """All ranks save a directory together. `rest` is rank 0's alone."""
        if not self._is_lazy:
            self.agree_to_save(strategy)
        if strategy.global_rank == 0:
            with contextlib.suppress(StorageError):  # it will come again, and be told to all ranks
                self._make_ready(path)
        hidden = Path(strategy.broadcast(str(names.hidden_directory(path))))
        lazy = False if self._copies else None
        # Where one rank cannot begin it, the others hear of a rank that has failed, and all have to go on, or none.
        make = functools.partial(self._sharded.save, state, rest, hidden, path, strategy.global_rank, lazy)
        self.begin(path, make, (CheckpointError,))

    def exists(self, path: Any) -> bool:
        """As if nothing was under way. Of paths that are not local, False."""
        own = local_path(path)
        return own is not None and self._paths.exists(str(own))

    def link(self, path: Any, target: Any) -> None:
        own, leads_to = local_path(path), local_path(target)
        if own is not None and leads_to is not None:
            self._paths.link(str(own), str(leads_to))

    def tell_figures(self) -> None:
        trainer = self._trainer() if self._trainer is not None else None
        if self.log_figures and trainer is not None:
            self._figures.tell(trainer)

    # ---- failures --------------------------------------------------------------------------------------------------

    def _make_ready(self, path: Path) -> None:
        self.tell_figures()
        directory = str(path.parent)
        names.make_directory(path.parent)
        if directory not in self._swept:
            self._swept.add(directory)
            names.remove_abandoned(path.parent)

    def _note(self, pending: Any, error: BaseException | None) -> None:
        """On a thread of the library, for one save after the other."""
        if error is None:
            self._failed_in_a_row, self._last_failed = 0, None
        else:
            self._failed_in_a_row += 1
            self._last_failed = error
        if self.log_figures:
            self._figures.note(pending, error)

    def _too_many_failures(self) -> FailedSavesError | None:
        """Counted anew behind it."""
        limit = self.options.max_failed_saves
        if not limit or self._failed_in_a_row < limit:
            return None
        self._failed_in_a_row, cause = 0, self._last_failed
        found = FailedSavesError(
            f"the last {limit} checkpoints could not be saved, the newest with: {cause}. Training would go on without "
            "checkpoints; mend the cause, or set Options.max_failed_saves=0 to go on regardless"
        )
        found.__cause__ = cause
        return found


def _trusts_all() -> bool:
    """What torch.load() takes weights_only=None for."""
    return os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "").lower() in ("1", "y", "yes", "true")


def ours_of(strategy: Any) -> LazyCheckpointIO | None:
    from .lightning_private import plugin_of

    found = plugin_of(strategy)
    return found if isinstance(found, LazyCheckpointIO) else None
