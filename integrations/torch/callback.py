"""Saves and resumes a plain PyTorch loop: when, what of it, and how it ends."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

import ckpt
from ckpt.quantities import Duration, parse_duration

from . import when_to_save
from .preemption import Preempted, Preemption
from .random_state import rng_state, set_rng_state
from .state_parts import Stateful, lend_memory, load_state, name_parts, same, take_state
from .when_to_save import Every

logger = logging.getLogger("ckpt")

_GRACE = "25s"  # torchrun, Slurm and Kubernetes by default kill 30 s after SIGTERM
_Optimizer = torch.optim.Optimizer
State = dict[str, Any]
Given = Stateful | Mapping[str, Stateful] | None


class CheckpointCallback:
    """Saves and resumes all that changes while a model learns.

    `model`, `optimizer`, `scheduler`, `scaler` and `data` take one object or a dict of named ones. What is saved:

    * once for all ranks: parameters, optimizers, schedulers, scalers and `extra`, which must be the same on every rank;
    * by each rank for itself: the random number generators of Python, numpy, torch and CUDA, the positions in `data`, and, with
      several ranks, whatever modules hold besides parameters (BatchNorm statistics differ under `broadcast_buffers=False`).

    What is the same for all lies in one file, under the names of the arguments ("model", or "model/name" if there are several):
    `torch.load(file)["model"]` is the state dict of the bare model.

    Parameters and state of the optimizers leave in the background until the next step of an optimizer. Everything else is
    copied inside save(): buffers, `extra`, and parameters that belong to none of the optimizers.

    Args:
        directory: of the checkpoints, as for `ckpt.Checkpointer`.
        model: a module, bare or wrapped in DistributedDataParallel or by torch.compile, in any order; saved bare, so that any
            of these loads what another has saved.
        optimizer, scheduler, scaler: as for `torch.amp.GradScaler`: whatever has state_dict() and load_state_dict().
        data: what knows the position in the data: a sampler of torch, which is changed in place so that it does; a
            StatefulDataLoader; or a sampler or data set with such methods.
        extra: more such objects by name, equal on all ranks, for example {"ema": ema_model}.
        every: when step() saves: a number of steps; a time, as timedelta or text ("30s", "10min", "2h"); or "auto" or
            `Auto(mtbf=..., overhead=...)`: as often as pays.
        keep, options, coordinator: as for `ckpt.Checkpointer`.
        lazy: more that changes only in an optimizer's step, as for `ckpt.save`; for example `model`, if it has many frozen
            parameters, which belong to no optimizer and would be copied at every save although nothing changes them.
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
        options: ckpt.Options | None = None,
        coordinator: Any = "auto",
        lazy: Any = None,
        merge_data: Callable[[list[Any]], Any] | None = None,
        preemption: bool | Duration = False,
        wait_before_return: bool = False,
    ) -> None:
        if extra is not None and not isinstance(extra, Mapping):
            raise TypeError(f"extra must be a dict of named objects, not {type(extra).__name__}")
        self._parts = name_parts("model", model) | name_parts("optimizer", optimizer) | name_parts("scheduler", scheduler)
        self._parts |= name_parts("scaler", scaler) | name_parts("extra", extra)
        self._data = name_parts("data", data)
        self._lazy = [part for part in self._parts.values() if isinstance(part, _Optimizer)] + ([] if lazy is None else [lazy])
        self._merge_data = merge_data
        self._waits = wait_before_return
        self._newest: ckpt.PendingSave | None = None  # whose outcome has not been seen
        self._published = False  # a checkpoint was there
        grace = _GRACE if preemption is True else preemption
        grace_s = parse_duration(grace, "preemption") if grace is not False else None
        when_to_save.make_interval(every, None)  # complains before anything is made
        self._checkpointer = ckpt.Checkpointer(directory, keep=keep, options=options, coordinator=coordinator)
        self._several = self._checkpointer.world_size > 1
        self._agreed = 0
        self._interval = when_to_save.make_interval(every, self._agree if self._several else None)
        self._step: int | None = None
        self._preemption: Preemption | None = None
        if grace_s is not None:
            try:
                self._preemption = Preemption(grace_s, self._several)
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

    def step(self, step: int) -> ckpt.PendingSave | None:
        """To be called at the end of each iteration, on every rank. Saves if it is time to; None if not.

        Args:
            step: optimizer steps done, counted from the start of the job.

        Raises:
            Preempted: SIGTERM has come and all is saved, or the grace time is over. A handler of SIGTERM written in Python that
                was there before the callback is called first.
            ckpt.CheckpointError: saves have failed time and again, as `ckpt.Checkpointer.save` says.
        """
        self._step = step
        due = self._interval.is_due(step)
        if self._preemption is not None and self._preemption.is_due():
            self._end(step, self._preemption)
        return self.save(step) if due else None

    def save(self, step: int) -> ckpt.PendingSave:
        """Saves now, whatever `every` says; for the end of training. To be called on every rank.

        Raises:
            ckpt.CheckpointError: saves have failed time and again, as `ckpt.Checkpointer.save` says; with `wait_before_return`,
                this one.
        """
        self._check_remaining()
        began_at = when_to_save.now()
        replicated: State = {}
        state: State = {"rng": rng_state()}
        for name, part in self._parts.items():
            replicated[name], own = take_state(part, split=self._several)
            if own is not None:
                state[f"buffers/{name}"] = own
        state.update((name, part.state_dict()) for name, part in self._data.items())
        pending = self._checkpointer.save(step, state, replicated=replicated, lazy=self._lazy)
        self._step, self._newest = step, pending
        if self._waits:
            pending.result()
        self._interval.note_save(step, pending, when_to_save.now() - began_at)
        return pending

    def _check_remaining(self) -> None:
        """Who removes old checkpoints himself may have removed the last one before it was known that the next one fails."""
        newest = self._newest
        if newest is None or not newest.done():
            return
        self._newest, error = None, newest.exception()
        if error is None:
            self._published = True
        elif self._published and not self._checkpointer.steps():
            self._published = False
            raise ckpt.CheckpointError(
                f"the newest save failed with: {error}; and no checkpoint is left in '{self._checkpointer.directory}', where "
                "there was one. Leave removing old ones to keep=, or use wait_before_return=True and remove them after that"
            ) from error

    def _end(self, step: int, preemption: Preemption) -> None:
        with contextlib.suppress(ckpt.CheckpointError):  # has been logged
            self._checkpointer.wait(preemption.left_s())  # else this save might be skipped for those in flight
        try:
            path = self.save(step).result(preemption.left_s())
        except ckpt.CheckpointError as error:
            logger.error("SIGTERM: %d steps are done, but their checkpoint is not durable: %s", step, error)
        else:
            logger.warning("SIGTERM: %d steps are done and saved to '%s'; training ends", step, path)
        self._preemption = None
        preemption.pass_on()
        raise Preempted(step)

    # ---- resuming --------------------------------------------------------------------------------------------------

    def resume(self, *, strict: bool = True, weights_only: bool = True, fresh: bool = False) -> int:
        """Loads the newest good checkpoint into the objects, and puts back the random number generators last of all.

        To be called on every rank, before the loop and before iterators are made of the data. Another number of ranks may
        resume: then rank r gets rank 0's buffers and the random numbers of rank r modulo the old number, and logs that.

        Parameters, and what an optimizer has from earlier steps, are filled as the file is read, without a second copy, in host
        memory and on CUDA devices. A part that loads its state in a way of its own (load hooks, an overridden
        load_state_dict()), and an optimizer on a device that has not stepped yet, gets it by load_state_dict() from a copy in
        host memory.

        Args:
            strict: False: what only one side has (a scheduler, an EMA copy, single weights) is passed over with a warning in
                the log rather than refused.
            weights_only: as in `torch.load`; False if `data`, `scheduler` or `extra` have states that hold other objects.
            fresh: begin at 0 even if step directories lie there whose manifests are lost, which is an error else. They stay as
                they are. A checkpoint that is there is loaded all the same.

        Returns:
            the optimizer steps done; 0 if nothing was ever saved.

        Raises:
            ckpt.errors.InUseError: another job is saving into the directory.
            ckpt.CheckpointError: the checkpoint does not fit, and the message says which part of it; the objects may have been
                loaded in part. Also what `ckpt.Checkpointer.restore` raises; then, too, for instance if no checkpoint is good.
        """
        lend = functools.partial(self._lend, strict=strict)
        found = self._checkpointer.restore(
            merge=self._merge,
            map_location="cpu",
            weights_only=weights_only,
            replicated_into=lend,
            fresh=fresh,
            exclusive=True,
        )
        step = 0
        if found is not None:
            step, self._published = found.step, True
            ckpt.fence()  # loading writes to tensors
            self._load(step, found.replicated or {}, found.state or {}, strict)
        self._step = step
        self._interval.note_start(step)
        return step

    def _lend(self, replicated: Any, *, strict: bool) -> dict[tuple[Any, ...], torch.Tensor]:
        """Tensors of the parts into which a checkpoint can be read, by their paths in it; none if not all of it fits."""
        lent: dict[tuple[Any, ...], torch.Tensor] = {}
        if not isinstance(replicated, Mapping) or (strict and replicated.keys() != self._parts.keys()):
            return {}
        for name, part in self._parts.items():
            if name in replicated:
                tensors = lend_memory(part, replicated[name], strict)
                if tensors is None:
                    return {}
                lent.update(((name, *path), tensor) for path, tensor in tensors.items())
        return lent

    def _load(self, step: int, replicated: State, state: State, strict: bool) -> None:
        self._check_parts(step, replicated, self._parts, strict)
        dropped = state.get("dropped", ())
        held = _positions(state)
        self._check_parts(step, held, {name: part for name, part in self._data.items() if name not in dropped}, strict)
        for name, part in self._parts.items():
            if name in replicated:
                with _Naming(step, name):
                    passed_over = load_state(part, replicated[name], state.get(f"buffers/{name}"), strict)
                if passed_over:
                    logger.warning("'%s' of checkpoint %d: only one side has %s", name, step, ", ".join(passed_over))
        for name, part in self._data.items():
            if name in held:
                with _Naming(step, name):
                    part.load_state_dict(held[name])
        if "rng" in state:
            with _Naming(step, "rng"):
                set_rng_state(state["rng"])

    def _check_parts(self, step: int, held: State, wanted: State, strict: bool) -> None:
        missing, surplus = sorted(wanted.keys() - held.keys()), sorted(held.keys() - wanted.keys())
        problems = [f"it holds no {', '.join(missing)}"] if missing else []
        problems += [f"it holds {', '.join(surplus)}, which the callback was not given"] if surplus else []
        if not problems:
            return
        text = f"checkpoint {step} in '{self._checkpointer.directory}' does not fit: " + "; ".join(problems)
        if strict:
            raise ckpt.CheckpointError(f"{text}. Give the callback what it had when it saved, or resume(strict=False)")
        logger.warning("%s", text)

    def _merge(self, states: list[State]) -> State:
        """This rank's state from those of another number of ranks."""
        rank, old = self._checkpointer.rank, len(states)
        merged = {name: value for name, value in states[0].items() if name.startswith("buffers/")}
        merged |= {name: value for name, value in states[rank % old].items() if name == "rng"}
        logger.warning(
            "the checkpoint was saved by %d rank(s), now there are %d: rank %d goes on with the random numbers of rank %d",
            *(old, self._checkpointer.world_size, rank, rank % old),
        )
        return merged | self._merge_positions(states)

    def _merge_positions(self, states: list[State]) -> State:
        positions = [_positions(state) for state in states]
        if not any(positions):
            return {}
        if self._merge_data is not None:
            merged = self._merge_data([_unpack_data(each) for each in positions])
            return {"data": merged} if "data" in self._data else {f"data/{name}": value for name, value in merged.items()}
        if all(same(each, positions[0]) for each in positions):
            logger.warning("the position in the data that all ranks had is taken up; give merge_data= if it means another now")
            return positions[0]
        logger.warning(
            "the positions in the data differ between the %d ranks that saved, and are not taken up: the data begin anew; give "
            "merge_data= to tell how they are shared out now",
            len(states),
        )
        return {"dropped": sorted(positions[0])}

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
            preemption.pass_on()
            raise Preempted(self._step)

    def __enter__(self) -> CheckpointCallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.close()
        except Preempted:
            if error is None:
                raise
        except ckpt.CheckpointError:
            if error is None:
                raise
            logger.exception("closing the checkpoint callback failed while another error was on its way")


class _Naming:
    """Turns an error inside the block into one that names the part of the checkpoint."""

    def __init__(self, step: int, name: str) -> None:
        self._step, self._name = step, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if isinstance(error, Exception):
            raise ckpt.CheckpointError(f"'{self._name}' of checkpoint {self._step} does not fit: {error}") from error


def _positions(state: State) -> State:
    return {name: value for name, value in state.items() if name.partition("/")[0] == "data"}


def _unpack_data(parts: State) -> Any:
    """As `data=` was given: one state, or states by name."""
    return parts["data"] if "data" in parts else {name.removeprefix("data/"): value for name, value in parts.items()}
