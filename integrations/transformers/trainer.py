"""The Trainer whose checkpoints leave in the background, and the mixin that makes one of any other."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from transformers import Trainer, TrainerCallback

import ckpt
from ckpt.metrics import MetricsSink

from ..huggingface.replaced_writers import replace_save_file, replace_torch_save
from ..huggingface.sharded_writes import replace_sharded_writes
from . import resuming
from .overrides import may_look
from .rotation import replace_rotation
from .saves import TrainerSave, TrainerSaves
from .shadowing import shadowed
from .transformers_private import (
    ADAPTER_WRITER,
    MODEL_WRITER,
    PLAIN_MODEL_WRITER,
    TORCH_SAVES,
    check,
    innermost,
    jit_managers,
    knows_adapters,
    reads_checkpoints,
    updates_in_backward,
)
from .uploads import replace_uploads

logger = logging.getLogger("ckpt")

_Base: Any = object  # a Trainer, in what derives from the mixin
_WRITERS = ("save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state")  # each to an output_dir


class LazyCheckpointMixin(_Base):
    """Makes the checkpoints of a Trainer lazy: `class Mine(LazyCheckpointMixin, SomeTrainer)`. The package says what it means.

    Args:
        checkpoint_options: as `options` of `ckpt.BundleCheckpointer`.
        checkpoint_metrics: as `metrics` of `ckpt.BundleCheckpointer`.
        All others are those of the Trainer.

    Raises:
        UnsupportedError: as soon as such a class is made: it is no Trainer, or of a transformers that is not known.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check(cls, super())

    def __init__(
        self,
        *args: Any,
        checkpoint_options: ckpt.Options | None = None,
        checkpoint_metrics: Iterable[MetricsSink] = (),
        **kwargs: Any,
    ) -> None:
        _replace_writers()
        self._checkpoints = TrainerSaves(checkpoint_options, tuple(checkpoint_metrics))
        self._error_at_end: ckpt.CheckpointError | None = None
        super().__init__(*args, **kwargs)
        for manager in jit_managers(self):
            manager.execute_jit_checkpoint = functools.partial(self._save_at_signal, manager)
        self.callback_handler.on_save = functools.partial(self._tell_of_save, self.callback_handler.on_save)

    def wait_for_checkpoints(self, timeout: float | None = None) -> None:
        """Waits until every checkpoint so far is durable and has its name.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            DeadlineError: not within `timeout`.
            CheckpointError: one has failed since the last call; the newest such error.
        """
        self._checkpoints.wait(timeout)

    # ---- training --------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As of Trainer. What it resumes from is verified first, and `True` takes the newest checkpoint that is good.

        When it returns, all checkpoints are durable.

        Raises:
            CorruptError: the checkpoint to resume from, or each one that there is, is incomplete or damaged.
            FailedSavesError: so many saves in a row have failed as `Options.max_failed_saves` says.
            CheckpointError: all steps are done; but the newest checkpoint did not become durable, or the best one, which was to
                be loaded, cannot be. The model is as the last step has left it.
        """
        self._checkpoints.forget_best()
        self._error_at_end = None  # of one before, which has raised another one
        if resume_from_checkpoint:
            resume_from_checkpoint = self._find_checkpoint(resume_from_checkpoint)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._checkpoints.close()
        error, self._error_at_end = self._error_at_end, None
        if error is not None:
            raise error
        return output

    def _find_checkpoint(self, asked: Any) -> Any:
        checkpointer = self._checkpoints.checkpointer(self.args)
        if asked is True:
            return resuming.newest_good(checkpointer, self.args.output_dir) or asked  # the Trainer says that there is none
        if os.path.isdir(asked):
            resuming.verify(checkpointer, asked)
        return asked

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        _fence_switch(self.optimizer)
        if updates_in_backward(self.optimizer):
            ckpt.fence()
        return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        _fence_switch(self.optimizer)
        return super().evaluation_loop(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        ckpt.fence()  # it writes to parameters
        return super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        self._checkpoints.wait_quietly()
        ckpt.fence()
        super()._load_best_model()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._checkpoints.wait_quietly()
        best = self.state.best_model_checkpoint
        if best is not None:
            try:
                self._check_best(best)
            except ckpt.CheckpointError as error:
                logger.error("%s", error)
                self.state.best_model_checkpoint = None  # the Trainer would pass over what it does not find
                self._error_at_end = error if self.args.load_best_model_at_end else None
        return super()._finalize_training(*args, **kwargs)

    def _check_best(self, best: str) -> None:
        if not os.path.isdir(best):
            raise ckpt.CheckpointError(
                f"the best checkpoint, '{best}', is not there: its save has failed, or somebody has removed it. The model is "
                "as the last step has left it"
            )
        if self.args.load_best_model_at_end:
            resuming.verify(self._checkpoints.checkpointer(self.args), best)

    # ---- saving ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        self._save_lazily(functools.partial(super()._save_checkpoint, model, trial, *args, **kwargs), trial)
        if self._is_looked_at():
            self._wait_for_newest()

    def _save_lazily(self, stock: Callable[[], Any], trial: Any, may_skip: bool = True) -> None:
        step = self.state.global_step
        root = self._get_output_dir(trial=trial)
        best = self.state.best_model_checkpoint
        save = self._checkpoints.begin(self.args, root, f"checkpoint-{step}", step=step, best=best, may_skip=may_skip)
        save.bundle.suppose_frozen([self.model], [self.optimizer])
        try:
            with save.writing(), self._moving(save), save.following_deepspeed(self.is_deepspeed_enabled):
                stock()
        except BaseException as error:
            self._checkpoints.end(save, error)
            raise
        self._checkpoints.end(save)

    @contextlib.contextmanager
    def _moving(self, save: TrainerSave) -> Iterator[None]:
        """Meanwhile whatever writes the checkpoint is given the directory where it is put together."""
        methods = {name: _collected(_moved(self._writer(save, name), save), save) for name in _WRITERS}
        methods["save_model"] = functools.partial(self._save_model_to, save, methods["save_model"])
        methods["_push_from_checkpoint"] = functools.partial(self._push_durable, save, self._push_from_checkpoint)
        saves_state = {"save_to_json": _collected(_moved(self.state.save_to_json, save), save)}
        with shadowed(self, methods), shadowed(self.state, saves_state):
            yield

    def _writer(self, save: TrainerSave, name: str) -> Callable[..., Any]:
        """A method that writes files. What somebody looks at as soon as it is written is left to the Trainer."""
        write: Callable[..., Any] = getattr(self, name)
        # With DeepSpeed the Trainer gathers copies, and may remove the file that it has made of them.
        if not (may_look(self, name) or (name == "save_model" and self.is_deepspeed_enabled)):
            return write

        @functools.wraps(write)
        def write_now(*args: Any, **kwargs: Any) -> None:
            with save.leaving_to_the_trainer():
                write(*args, **kwargs)

        return write_now

    def _save_model_to(self, save: TrainerSave, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        output_dir = next((each for each in (*args, *kwargs.values()) if save.is_final(each)), None)
        if output_dir is None:
            return
        strategy = getattr(self.args.save_strategy, "value", self.args.save_strategy)
        if strategy != "no" and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = output_dir  # the Trainer looks for the directory, which has not this name yet

    def _push_durable(self, save: TrainerSave, push: Callable[..., Any], checkpoint_folder: str) -> None:
        """What is uploaded is read from the checkpoint, so that has to have its name."""
        uploads = self.is_world_process_zero() and getattr(self.args.hub_strategy, "value", None) != "end"
        if not uploads or self._checkpoints.end(save).exception() is None:
            push(checkpoint_folder)

    def _is_looked_at(self) -> bool:
        """Whether somebody expects the checkpoint to be there as soon as _save_checkpoint() returns."""
        if type(self)._save_checkpoint is not LazyCheckpointMixin._save_checkpoint:
            return True  # who overrides it may write to the directory
        return any(_reads(callback) for callback in self.callback_handler.callbacks)

    def _tell_of_save(self, tell: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of CallbackHandler.on_save(). Who wants to look at what is not there is not told: it would raise, or make a
        directory of that name, which looks like a checkpoint."""
        handler = self.callback_handler
        everybody, newest = handler.callbacks, self._checkpoints.newest
        readers = [callback for callback in everybody if _reads(callback)]
        name = f"checkpoint-{self.state.global_step}"
        if not readers or newest is None or newest.path.name != name or newest.exception() is None:
            return tell(*args, **kwargs)
        names = ", ".join(type(callback).__name__ for callback in readers)
        logger.warning("on_save() of %s is not called: '%s' has not become a checkpoint", names, newest.path)
        handler.callbacks = [callback for callback in everybody if callback not in readers]
        try:
            return tell(*args, **kwargs)
        finally:
            handler.callbacks = everybody

    def _wait_for_newest(self) -> None:
        if self._checkpoints.newest is not None:
            self._checkpoints.newest.exception()  # which has been logged

    def _save_at_signal(self, manager: Any) -> None:
        """In place of CheckpointManager.execute_jit_checkpoint(). No marker is needed: the name of the checkpoint is one."""
        manager.is_checkpoint_requested = False
        self._wait_for_newest()  # else this one might be skipped for those in flight
        self._save_checkpoint(self.model, None)
        assert self._checkpoints.newest is not None
        self._checkpoints.newest.result()

    def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        """As of Trainer: the files are there when it returns. So are all checkpoints."""
        if not _internal_call:
            self._checkpoints.wait_quietly()
        super().save_model(output_dir, _internal_call=_internal_call)


class LazyTrainer(LazyCheckpointMixin, Trainer):
    """The Trainer of transformers, with lazy checkpoints. See LazyCheckpointMixin for what it is given besides."""


def _replace_writers() -> None:
    """Safe to call again. What is replaced does what it did, but for who is in TrainerSave.writing()."""
    for module in TORCH_SAVES:
        replace_torch_save(importlib.import_module(module))
    for module, name in (MODEL_WRITER, PLAIN_MODEL_WRITER, *([ADAPTER_WRITER] if knows_adapters() else [])):
        replace_save_file(importlib.import_module(module), name)
    replace_sharded_writes()
    replace_rotation()
    replace_uploads()


def _moved(write: Callable[..., Any], save: TrainerSave) -> Callable[..., Any]:
    """Whatever the parameter for the path is called, and whether it is named in the call or not."""

    @functools.wraps(write)
    def moved(*args: Any, **kwargs: Any) -> Any:
        return write(*map(save.moved, args), **{name: save.moved(value) for name, value in kwargs.items()})

    return moved


def _collected(write: Callable[..., Any], save: TrainerSave) -> Callable[..., Any]:
    """An error fails the save, on all ranks: others may be waiting in a barrier for this one."""

    @functools.wraps(write)
    def collected(*args: Any, **kwargs: Any) -> None:
        save.bundle.write_now(lambda: write(*args, **kwargs))

    return collected


def _reads(callback: Any) -> bool:
    """Whether a callback may look at a checkpoint in on_save()."""
    does_nothing = getattr(callback.on_save, "__func__", None) is TrainerCallback.on_save
    if does_nothing or not getattr(callback, "reads_checkpoints", True):
        return False
    return not type(callback).__module__.startswith("transformers.") or reads_checkpoints(callback)


def _fence_switch(optimizer: Any) -> None:
    """Optimizers that have modes (those without a schedule) write to the parameters when they change it."""
    optimizer = innermost(optimizer)
    if callable(getattr(optimizer, "train", None)):
        ckpt.fence()
