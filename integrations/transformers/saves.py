"""The checkpoints of one Trainer: what is in flight, and what is to be done when it is durable."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ckpt
from ckpt import names
from ckpt.dcp import DcpCheckpointer
from ckpt.metrics import MetricsSink

from ..huggingface.open_bundle import OpenBundle, writing_to
from .rotation import Rotation, collecting
from .strangers import is_checkpoint, of_others

logger = logging.getLogger("ckpt")


class TrainerSave:
    """A checkpoint that a Trainer is putting together.

    Args:
        final: what it is called when it is durable.
        leads: whether this rank is the one to look after what lies there already.
    """

    def __init__(self, bundle: OpenBundle, final: Path, leads: bool) -> None:
        self.bundle = bundle
        self.final = final
        self._rotations: list[Rotation] = []  # that the Trainer wants
        self._before = self._names_there()
        self._leads = leads
        self._pending: ckpt.PendingSave | None = None

    def moved(self, given: Any) -> Any:
        """Where something of the checkpoint lies until it is durable. Other paths, and what is no path, stay as they are."""
        if not isinstance(given, (str, os.PathLike)):
            return given
        path = Path(os.path.abspath(given))
        return str(self.bundle.directory / path.relative_to(self.final)) if path.is_relative_to(self.final) else given

    def is_final(self, given: Any) -> bool:
        """Whether it is the path that the checkpoint is to have."""
        return isinstance(given, (str, os.PathLike)) and os.path.abspath(given) == str(self.final)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Meanwhile what this thread writes to it by the Trainer's functions goes to the bundle, and nothing is removed."""
        with writing_to(self.bundle), collecting() as self._rotations:
            yield

    def take_rotations(self) -> list[Rotation]:
        """Those that were noted since the last call: the Trainer may want one when the save has been handed over already."""
        wanted = [*self._rotations]
        self._rotations.clear()
        return wanted

    @contextlib.contextmanager
    def leaving_to_the_trainer(self) -> Iterator[None]:
        """Meanwhile this thread writes its files itself; they become part of the checkpoint all the same."""
        with writing_to(None):
            yield

    @contextlib.contextmanager
    def following_deepspeed(self, used: bool) -> Iterator[None]:
        """What lazy engines of DeepSpeed begin meanwhile is a part of this checkpoint, which waits for it."""
        if not used:
            yield
            return
        from .. import deepspeed

        with deepspeed.collecting() as begun:
            yield
        for pending in begun:
            self.bundle.follow(pending)

    def commit(self, error: BaseException | None = None) -> ckpt.PendingSave:
        """Ends it. The first call counts."""
        if self._pending is None:
            if error is None:
                self._refuse_strangers()
                self._keep_what_was_there()
            else:
                self.bundle.fail(error)
            self._pending = self.bundle.commit()
        return self._pending

    def _refuse_strangers(self) -> None:
        """What somebody has written to the checkpoint's own name meanwhile would go when this one gets that."""
        strangers = sorted(self._names_there() - self._before)
        if strangers:
            self.bundle.fail(
                ckpt.CheckpointError(
                    f"{', '.join(strangers)} was written to '{self.final}' while that was being saved, and would be lost: what "
                    "a save writes goes to the output_dir that save_model() and its like are given. A Trainer that overrides "
                    "_save_checkpoint() and writes more there derives from LazyTrainer or from a class with LazyCheckpointMixin"
                )
            )

    def _names_there(self) -> set[str]:
        """Under the checkpoint's own name. What cannot be listed fails the save, on all ranks: they wait for this one."""
        try:
            return {*os.listdir(self.final)}
        except FileNotFoundError:
            return set()
        except OSError as error:
            text = f"what lies in '{self.final}', where a checkpoint is to be, cannot be listed: {error.strerror}"
            self.bundle.fail(ckpt.CheckpointError(text))
            return set()

    def _keep_what_was_there(self) -> None:
        """What had the name before goes; but what is no checkpoint was put there to become part of this one."""
        wanted = of_others(self._before) if self._leads else []
        if is_checkpoint(self._before):
            lost = [name for name in wanted if not os.path.lexists(self.bundle.directory / name)]
            if lost:
                logger.warning("'%s' is saved again, and replaced as a whole: %s goes with it", self.final, ", ".join(lost))
            return
        try:
            names.carry_over(wanted, self.final, self.bundle.directory, self.bundle.has)
        except OSError as error:
            text = f"{', '.join(wanted)} lay in '{self.final}' before it was saved, and cannot be made part of it: {error}"
            self.bundle.fail(ckpt.CheckpointError(text))


class TrainerSaves:
    """
    Args:
        options, metrics: as of BundleCheckpointer, which is made when it is needed: all ranks make it together.
    """

    def __init__(self, options: ckpt.Options | None, metrics: tuple[MetricsSink, ...]) -> None:
        self._options = options
        self._metrics = metrics
        self._checkpointer: ckpt.BundleCheckpointer | None = None
        self._sharded: DcpCheckpointer | None = None
        self._rotations: list[concurrent.futures.Future[None]] = []
        self._best: str | None = None  # the newest best checkpoint that is durable
        self.newest: ckpt.PendingSave | None = None

    def __reduce__(self) -> Any:
        return TrainerSaves, (self._options, self._metrics)  # a search for hyperparameters may send a Trainer elsewhere

    def checkpointer(self, args: Any) -> ckpt.BundleCheckpointer:
        """
        Args:
            args: the TrainingArguments.
        """
        if self._checkpointer is None:
            apart = bool(args.save_on_each_node)
            self._checkpointer = ckpt.BundleCheckpointer(
                options=self._options,
                node=os.environ.get("GROUP_RANK", socket.gethostname()) if apart else None,
                leads_node=args.local_process_index == 0,
                metrics=self._metrics,
            )
        return self._checkpointer

    def forget_best(self) -> None:
        """Another training begins."""
        self._best = None

    def begin(self, args: Any, root: str, name: str, *, step: int, best: str | None, may_skip: bool) -> TrainerSave:
        """
        Args:
            best: the checkpoint that is the best so far, maybe of a job before this one.

        Raises:
            CheckpointError: as of BundleCheckpointer.begin().
        """
        if self._best is None and best is not None and os.path.isdir(best):
            self._best = best
        begin = self.checkpointer(args).begin
        bundle = begin(root, name, step=step, may_skip=may_skip, move_latest=False, named_last=True)
        final = Path(os.path.abspath(root)) / name
        return TrainerSave(OpenBundle(bundle, self._saver_of_shards), final, bool(args.should_save))

    def _saver_of_shards(self) -> DcpCheckpointer:
        """Made by all ranks at the same call, when the first needs it."""
        if self._sharded is None:
            self._sharded = DcpCheckpointer(options=self._options)
        return self._sharded

    def end(self, save: TrainerSave, error: BaseException | None = None) -> ckpt.PendingSave:
        """Hands it to the background; old checkpoints are removed when it is durable."""
        self.newest = pending = save.commit(error)
        self._rotations = [each for each in self._rotations if not each.done()]
        for rotation in save.take_rotations():
            self._rotate_later(pending, rotation)
        return pending

    def _rotate_later(self, pending: ckpt.PendingSave, rotation: Rotation) -> None:
        ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._rotations.append(ended)

        def rotate(done: ckpt.PendingSave) -> None:
            try:
                if done.exception() is None:
                    self._rotate(done.result(), rotation)
            except OSError as error:
                logger.warning("old checkpoints beside '%s' are not removed: %s", done.path, error)
            finally:
                ended.set_result(None)

        pending.add_done_callback(rotate)

    def _rotate(self, durable: Path, rotation: Rotation) -> None:
        if rotation.best is None or os.path.isdir(rotation.best):  # else its save has failed: the one before stays
            self._best = rotation.best
        rotation.run(durable, self._best)

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> None:
        """Until all is durable, and old checkpoints are removed.

        Raises:
            CheckpointError, DeadlineError: as of BundleCheckpointer.wait().
        """
        if self._checkpointer is not None:
            self._checkpointer.wait(timeout)
            concurrent.futures.wait(self._rotations, timeout)

    def wait_quietly(self) -> None:
        """Like wait(); but failures stay for it to raise."""
        if self._checkpointer is not None:
            self._checkpointer.wait_quietly()
            concurrent.futures.wait(self._rotations)

    def close(self) -> None:
        """Waits, and lets other jobs save here. Another save, or load, opens it again.

        Raises:
            CheckpointError: the newest save did not become durable.
        """
        checkpointer, self._checkpointer = self._checkpointer, None
        sharded, self._sharded = self._sharded, None
        try:
            if checkpointer is not None:
                checkpointer.close()
        finally:
            concurrent.futures.wait(self._rotations)
            if sharded is not None:
                sharded.close()
