"""LazyCheckpointManager. What the trainer calls, and when, is in its trainer.py and components/checkpointer/base.py."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import re
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torchtitan.components.checkpointer import DATALOADER, MODEL, AsyncMode, CheckpointManager

import ckpt
from ckpt import names
from ckpt.dcp import DcpCheckpointer
from ckpt.errors import CheckpointError, FailedSavesError, UnsupportedError

from .. import dcp
from . import titan_private

logger = logging.getLogger("ckpt")

titan_private.check(CheckpointManager)
_COMPLETE = (".metadata", "model.safetensors.index.json")  # one of them is in what torchtitan takes for a checkpoint
_STEP = re.compile(r"step-(\d+)")


class LazyCheckpointManager(CheckpointManager):
    """See the package. All ranks make it together, and make the same calls.

    Raises:
        CheckpointError: the ranks cannot agree.
    """

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """Of torchtitan's CheckpointManager, and three of `ckpt.Options`."""

        async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "async"
        """Whether a save is durable when it returns ("disabled")."""

        arena_bytes: str = "auto"
        """Size of the staging memory."""

        max_in_flight: int = 2
        """Saves that may be on their way at once; one more waits."""

        max_failed_saves: int = 3
        """So many failures in a row end the training; 0: none do."""

    def __init__(self, config: Any, **parts: Any) -> None:
        super().__init__(dataclasses.replace(config, async_mode="disabled"), **parts)  # so that it makes no stager
        if not self.enable:
            return
        self.async_mode = AsyncMode(config.async_mode)
        self.options = ckpt.Options(arena_bytes=config.arena_bytes, max_in_flight=config.max_in_flight)
        self._most_failures = config.max_failed_saves
        self._failures = 0  # in a row
        self._last_failed: BaseException | None = None
        self._saves: DcpCheckpointer | None = DcpCheckpointer(options=self.options)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._exchange = dist.new_group(backend="gloo") if several else None

    # ---- what the trainer calls ------------------------------------------------------------------------------------

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if not self._should_save(curr_step, last_step):
            return False
        self._check_failures()
        if last_step:
            self._wait()
            self._save_last_step(curr_step)
            return True
        states = self._flattened_model_states_sd()
        if states.get(DATALOADER) is not None:
            states[DATALOADER] = self._from_all_ranks(states[DATALOADER].state_dict())
        pending = self._begin(states, self._create_checkpoint_id(curr_step))
        pending.add_done_callback(self._note)
        self.save_future = pending
        if self.async_mode == AsyncMode.DISABLED:
            self._wait_for_saving()
        return True

    def _wait_for_saving(self) -> None:
        """
        Raises:
            CheckpointError: the newest save has failed.
        """
        pending, self.save_future = self.save_future, None
        self._wait()
        if pending is not None:
            self._last_failed = None
            pending.result()

    def _maybe_wait_for_staging(self) -> None:
        """The trainer calls it just before the optimizers step."""
        ckpt.fence()

    def _close(self) -> None:
        """Waits for all saves. Safe to call again.

        Raises:
            CheckpointError: the newest has failed.
        """
        saves, self._saves = getattr(self, "_saves", None), None
        with contextlib.ExitStack() as ending:
            ending.callback(super()._close)
            if saves is not None:
                saves.close()

    # ---- saves and loads -------------------------------------------------------------------------------------------

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: Any,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """The last one, which is waited for."""
        if to_hf or _is_remote(checkpoint_id):
            return super().dcp_save(state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf)
        return dcp.save(state_dict, checkpoint_id=checkpoint_id)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Behind all saves. What is not of Hugging Face is compared with its checksums."""
        self._wait()
        ckpt.fence()
        if from_hf or _is_remote(checkpoint_id):
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        dcp.load(state_dict, checkpoint_id=checkpoint_id)
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(state_dict)

    def _begin(self, states: dict[str, Any], path: str) -> Any:
        if self._saves is not None and not _is_remote(path):
            try:
                return self._saves.save(path, states)
            except UnsupportedError as error:
                logger.warning("torch.distributed.checkpoint plans the save to '%s': %s", path, error)
            except CheckpointError as refused:  # on all ranks: as if it had failed behind the training's back
                logger.error("the save to '%s' could not be begun: %s", path, refused)
                failed: concurrent.futures.Future[Path] = concurrent.futures.Future()
                failed.set_exception(refused.with_traceback(None))
                return failed
        return dcp.async_save(states, checkpoint_id=path).upload_completion

    def _from_all_ranks(self, state: dict[str, Any]) -> dict[str, Any]:
        if self._exchange is None:
            return state
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, state, group=self._exchange)
        return {key: value for part in parts for key, value in part.items()}

    def _wait(self) -> None:
        """Until nothing is in flight, whatever became of it."""
        if self._saves is not None:
            with contextlib.suppress(CheckpointError):  # it was noted
                self._saves.wait(self.options.drain_timeout_s)
        if self.save_future is not None:
            self.save_future.exception(self.options.drain_timeout_s)

    # ---- behind a save, on a thread of the library -----------------------------------------------------------------

    def _note(self, pending: Any) -> None:
        error = pending.exception()
        self._failures = 0 if error is None else self._failures + 1
        self._last_failed = error
        if error is None:
            self._purge_stale_checkpoints()

    def _check_failures(self) -> None:
        if self._most_failures and self._failures >= self._most_failures:
            self._failures, cause = 0, self._last_failed
            raise FailedSavesError(
                f"the last {self._most_failures} checkpoints could not be saved, the newest with: {cause}. Training would go "
                "on without checkpoints; mend the cause, or set max_failed_saves=0 in the config to go on regardless"
            ) from cause

    def _purge_stale_checkpoints(self) -> None:
        """Rank 0 removes what is older than the newest complete ones."""
        if not self._should_purge() or _is_remote(self.folder):
            return
        found = sorted((int(match[1]), path) for path in Path(self.folder).iterdir() if (match := _STEP.fullmatch(path.name)))
        complete = [step for step, path in found if any((path / name).is_file() for name in _COMPLETE)]
        kept = complete[-self.keep_latest_k :]
        for step, path in found:
            if kept and step < kept[0]:
                with contextlib.suppress(CheckpointError):
                    names.remove(path / ".metadata")  # first, so that half of it is no checkpoint
                self.purge_queue.put(str(path))


def _is_remote(path: str) -> bool:
    return "://" in path
