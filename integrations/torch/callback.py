"""Saves a plain PyTorch loop when it is time to, resumes it, and ends it at SIGTERM."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn

import ckpt
from ckpt.errors import SkippedError
from ckpt.metrics import MetricsSink
from ckpt.quantities import Duration, parse_duration

from . import when_to_save
from .preemption import GRACE, Preempted, Preemption
from .state_parts import Stateful, name_parts
from .training_state import NamedParts
from .when_to_save import Every

logger = logging.getLogger("ckpt")

Given = Stateful | Mapping[str, Stateful] | None


class CheckpointCallback:
    """Saves and resumes all that changes while a model learns.

    `model`, `optimizer`, `scheduler`, `scaler` and `data` take one object or a dict of named ones. What is saved:

    * once for all ranks: parameters, optimizers, schedulers, scalers and `extra`, which must be the same on every rank;
    * by each rank for itself: the random number generators of Python, numpy, torch and CUDA, the positions in `data`, and, with
      several ranks, whatever modules hold besides parameters (BatchNorm statistics differ under `broadcast_buffers=False`).

    * together: modules whose parameters are DTensors (fully_shard, HSDP, tensor parallelism) and their optimizers, by the names
      of the parameters. That is a checkpoint of torch.distributed.checkpoint, which lies in the directory of the step; another
      number of ranks, and another way of sharding, may resume. So are modules in FullyShardedDataParallel (FSDP1), if that was
      given a device_mesh and use_orig_params=True. Of these torch gathers copies in each save(), by collectives, and copies
      them again when they are loaded: fully_shard costs none of that.

    What is the same for all lies in one file, under the names of the arguments ("model", or "model/name" if there are several):
    `torch.load(file)["model"]` is the state dict of the bare model.

    Parameters and state of the optimizers leave in the background until the next step of an optimizer. Everything else is
    copied inside save(): buffers, `extra`, and parameters that belong to none of the optimizers. Where files share blocks
    (`Options.reuse`), parameters of `model` that require no gradient are not even read once they have been found unchanged, but
    in every `Options.refresh_every`-th save, as `frozen` says.

    Args:
        directory: of the checkpoints, as for `ckpt.Checkpointer`.
        model: a module, bare or wrapped in DistributedDataParallel or by torch.compile, in any order; saved bare, so that any
            of these loads what another has saved.
        optimizer: an optimizer of torch, or anything else with state_dict() and load_state_dict(). Without one that is torch's,
            parameters are copied inside save().
        scheduler: of the learning rate: whatever has these two methods.
        scaler: of the loss, as `torch.amp.GradScaler` is: whatever has these two methods.
        data: what knows the position in the data: a sampler of torch, which is changed in place so that it does; a
            StatefulDataLoader; or a sampler or data set with such methods.
        extra: more such objects by name, for example {"ema": ema_model}. They must be equal on all ranks, to the byte, as an
            average of the weights is. If samples tell that they are not, the save fails, and its error names what differs. What
            each rank computes from its own batches (running statistics, metrics) goes to `data`, or is averaged over the ranks
            before. Of a module only the parameters have to be equal.
        every: when step() saves: a number of steps; a time, as timedelta or text ("30s", "10min", "2h"); or "auto" or
            `Auto(mtbf=..., overhead=...)`: as often as pays, which the log says when it is decided and when it changes much.
            Default 1: each step.
        keep: how many checkpoints stay, the newest first; default 3, None: all.
        keep_every: checkpoints of steps that are multiples of it stay, too, for ever; default none.
        keep_best, best_by, best_mode: how many of the best stay, too, by which of the `metrics` that step() is given, and
            whether the lowest ("min", default) or the highest ("max") is the best; default none.
        options: `ckpt.Options`: staging memory, deadlines, how many failed saves end the training; default as that says.
        coordinator: by what the ranks agree; the default "auto" takes torch.distributed if that is initialised.
        metrics: sinks that are told what each save has cost, see `ckpt.metrics.MetricsSink`.
        tiers: disks of the nodes before `directory`, an object store behind it, see `ckpt.Tier`; default none.
        lazy: more that changes only in an optimizer's step, as for `ckpt.save`; for example `model`, if it has many frozen
            parameters, which belong to no optimizer and would be copied at every save although nothing changes them.
        frozen: what does not change while this trains, as for `ckpt.Checkpointer.save`: tensors, modules (their parameters that
            require no gradient), or an iterable of these; `model`, for the base of a LoRA. False: nothing. Default None: what
            seems to be frozen of `model`, see `ckpt.state_dicts.supposedly_frozen`; who writes to one of these by operations of
            torch, or exchanges it, may do so.
        merge_data: called when another number of ranks resumes, with what `data` gave on each of the old ranks, in their order
            (dicts by name if `data` was one); returns what this rank is to load. Without it a warning is logged, and positions
            are taken up only if they were equal on all ranks.
        preemption: what to do at SIGTERM. False: nothing. True, or the seconds (or a duration such as "2min") from the signal
            until the process is killed (True: 25 s): step() saves, waits until that is durable, and raises `Preempted`, a
            SystemExit with code 143. If any rank gets the signal, all save the same step, one step later, for which one number
            goes round the default process group at each step, in the background.
        wait_before_return: step() and save() return only when what they save is durable, and raise if it fails; for who removes
            old checkpoints himself. Default False.

    Raises:
        TypeError, ValueError: an argument is impossible; the message names it.
        RuntimeError: preemption was asked for outside the main thread, or on several ranks without torch.distributed.
        ckpt.CheckpointError: what `ckpt.Checkpointer` raises.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Given = None,
        scheduler: Given = None,
        scaler: Given = None,
        data: Given = None,
        extra: Mapping[str, Stateful] | None = None,
        every: Every = 1,
        keep: int | None = 3,
        keep_every: int | None = None,
        keep_best: int | None = None,
        best_by: str | None = None,
        best_mode: str = "min",
        options: ckpt.Options | None = None,
        coordinator: Any = "auto",
        metrics: Iterable[MetricsSink] = (),
        tiers: Sequence[ckpt.Tier] = (),
        lazy: Any = None,
        frozen: Any = None,
        merge_data: Callable[[list[Any]], Any] | None = None,
        preemption: bool | Duration = False,
        wait_before_return: bool = False,
    ) -> None:
        if extra is not None and not isinstance(extra, Mapping):
            raise TypeError(f"extra must be a dict of named objects, not {type(extra).__name__}")
        parts = name_parts("model", model) | name_parts("optimizer", optimizer) | name_parts("scheduler", scheduler)
        parts |= name_parts("scaler", scaler) | name_parts("extra", extra)
        positions = name_parts("data", data)
        self._waits = wait_before_return
        self._unseen: list[ckpt.PendingSave] = []  # whose outcome has not been looked at, in their order
        self._published = False  # a checkpoint was there
        grace = GRACE if preemption is True else preemption
        grace_s = parse_duration(grace, "preemption") if grace is not False else None
        when_to_save.make_interval(every, None)  # complains before anything is made
        self._checkpointer = ckpt.Checkpointer(
            directory,
            keep=keep,
            keep_every=keep_every,
            keep_best=keep_best,
            best_by=best_by,
            best_mode=best_mode,
            options=options,
            coordinator=coordinator,
            metrics=metrics,
            tiers=tiers,
        )
        self._state = NamedParts(parts, positions, self._checkpointer, merge_data)
        self._lazy = [*self._state.optimizers(), *([] if lazy is None else [lazy])]
        self._frozen = frozen
        self._agreed = 0
        several = self._checkpointer.world_size > 1
        tells = self._checkpointer.rank == 0
        self._interval = when_to_save.make_interval(every, self._agree if several else None, tells=tells)
        self._step: int | None = None
        self._preemption: Preemption | None = None
        if grace_s is not None:
            try:
                self._preemption = Preemption(grace_s, several)
            except BaseException:
                self._checkpointer.close()
                raise

    @property
    def checkpointer(self) -> ckpt.Checkpointer:
        """The Checkpointer underneath, to look at what there is, or to wait."""
        return self._checkpointer

    def _agree(self, value: bytes) -> bytes:
        self._agreed += 1
        return self._checkpointer.agree(f"interval/{self._agreed}", value)

    # ---- saving ----------------------------------------------------------------------------------------------------

    def step(self, step: int, metrics: Mapping[str, Any] | None = None) -> ckpt.PendingSave | None:
        """To be called at the end of each iteration, on every rank. Saves if it is time to; None if not.

        Args:
            step: optimizer steps done, counted from the start of the job.
            metrics: how good they are, such as {"loss": 0.3}, as for `ckpt.Checkpointer.save`; looked at only if it saves.

        Raises:
            Preempted: SIGTERM has come and all is saved, or the grace time is over. A handler of SIGTERM written in Python that
                was there before the callback is called first.
            ckpt.CheckpointError: saves have failed time and again, or the first one is refused, as `ckpt.Checkpointer.save`
                says; or the newest has failed, and no checkpoint is left where there was one.
        """
        self._step = step
        due = self._interval.is_due(step)
        if self._preemption is not None and self._preemption.is_due():
            self._end(step, self._preemption, metrics)
        self._check_remaining()
        return self.save(step, metrics) if due else None

    def save(self, step: int, metrics: Mapping[str, Any] | None = None) -> ckpt.PendingSave:
        """Saves now, whatever `every` says; for the end of training. To be called on every rank.

        Raises:
            ckpt.CheckpointError: saves have failed time and again, as `ckpt.Checkpointer.save` says; with `wait_before_return`,
                this one.
        """
        self._check_remaining()
        began_at = when_to_save.now()
        replicated, state, sharded = self._state.capture()
        pending = self._checkpointer.save(
            step,
            state,
            replicated=replicated,
            sharded=sharded,
            lazy=self._lazy,
            metrics=metrics,
            frozen=self._what_is_frozen(),
        )
        self._step = step
        self._unseen.append(pending)
        if self._waits:
            pending.result()
        self._interval.note_save(step, pending, when_to_save.now() - began_at)
        return pending

    def _what_is_frozen(self) -> Any:
        """Anew at each save: who unfreezes a layer need not say so."""
        if self._frozen is None:
            return self._state.supposedly_frozen()
        return None if self._frozen is False else self._frozen

    def _check_remaining(self) -> None:
        """Who removes old checkpoints himself may have removed the last one before it was known that the next one fails."""
        error = None
        while self._unseen and self._unseen[0].done():
            outcome = self._unseen.pop(0).exception()
            if not isinstance(outcome, SkippedError):
                error = outcome
                self._published |= error is None
        if error is not None and self._published and not self._checkpointer.steps():
            self._published = False
            raise ckpt.CheckpointError(
                f"the newest save failed with: {error}; and no checkpoint is left in '{self._checkpointer.directory}', where "
                "there was one. Leave removing old ones to keep=, or use wait_before_return=True and remove them after that"
            ) from error

    def _end(self, step: int, preemption: Preemption, metrics: Mapping[str, Any] | None) -> None:
        with contextlib.suppress(ckpt.CheckpointError):  # has been logged
            self._checkpointer.wait(preemption.left_s())  # else this save might be skipped for those in flight
        try:
            path = self.save(step, metrics).result(preemption.left_s())
        except ckpt.CheckpointError as error:
            logger.error("SIGTERM: %d steps are done, but their checkpoint is not durable: %s", step, error)
        else:
            logger.warning("SIGTERM: %d steps are done and saved to '%s'; training ends", step, path)
        self._preemption = None
        preemption.end(step)

    # ---- resuming --------------------------------------------------------------------------------------------------

    def resume(self, *, step: int | None = None, strict: bool = True, weights_only: bool = True, fresh: bool = False) -> int:
        """Loads the newest good checkpoint, or that of `step`, into the objects; last of all the random number generators.

        To be called on every rank, before the loop and before iterators are made of the data. Another number of ranks may
        resume: then rank r gets rank 0's buffers and the random numbers of rank r modulo the old number, and logs that.

        Parameters, and what an optimizer has from earlier steps, are filled as the file is read, without a second copy, in host
        memory and on CUDA devices. A part that loads its state in a way of its own (load hooks, an overridden
        load_state_dict()), and an optimizer on a device that has not stepped yet, gets it by load_state_dict() from a copy in
        host memory.

        Args:
            step: that checkpoint and no other, to train on from there. The next save is the newest then, whatever its step;
                what was newer so far stays until its step is saved again or `keep` no longer wants it, see
                `ckpt.Checkpointer.restore`. The same on all ranks.
            strict: False: what only one side has (a scheduler, an EMA copy, single weights) is passed over with a warning in
                the log rather than refused.
            weights_only: as in `torch.load`; False if `data`, `scheduler` or `extra` have states that hold other objects.
            fresh: begin at 0 even if step directories lie there whose manifests are lost, which is an error else. They stay as
                they are. A checkpoint that is there is loaded all the same.

        Returns:
            the optimizer steps done; 0 if nothing was ever saved.

        Raises:
            ckpt.errors.InUseError: another job is saving into the directory.
            ckpt.errors.NotACheckpointError: there is none of `step`; says which there are.
            ckpt.CheckpointError: the checkpoint does not fit, and the message says which part of it; the objects may have been
                loaded in part. Also what `ckpt.Checkpointer.restore` raises; then, too, for instance if no checkpoint is good.
        """
        found = self._checkpointer.restore(
            step=step,
            merge=self._state.merge,
            map_location="cpu",
            weights_only=weights_only,
            replicated_into=functools.partial(self._state.lend_memory, strict=strict),
            sharded_into=self._state.prepare_targets(),
            strict=strict,
            fresh=fresh,
            exclusive=True,
        )
        done = 0
        if found is not None:
            self._published = True
            done = self._state.resume(found, strict=strict)
        self._step = done
        self._interval.note_start(done)
        return done

    # ---- ending ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Waits until what was saved is durable, at most `Options.drain_timeout_s`, and puts back the handler of SIGTERM.

        Saves nothing: call save() before, if the last step was not saved. Safe to call twice.

        Raises:
            ckpt.CheckpointError: the newest save did not become durable.
            Preempted: SIGTERM came after the last step().
        """
        try:
            self._checkpointer.close()
        finally:
            preemption, self._preemption = self._preemption, None
            if preemption is not None:
                preemption.close()
        if preemption is not None and preemption.noted:
            preemption.end(self._step)

    def __enter__(self) -> CheckpointCallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.close()
        except Preempted:
            if error is None:
                raise
        except ckpt.CheckpointError as failed:
            if error is None:
                raise
            if failed is not error and failed is not error.__cause__:  # else it is told of already
                logger.error("closing the checkpoint callback failed while another error was on its way: %s", failed)
