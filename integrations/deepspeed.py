"""Lazy asynchronous checkpoints for DeepSpeed, with not a line of the training changed.

    import ckpt.integrations.deepspeed as lazy

    lazy.enable()  # before deepspeed.initialize

`save_checkpoint()` and `load_checkpoint()` stay as they are, and so do the files: DeepSpeed's own tools read them, and stock
DeepSpeed loads them. Options stand in the DeepSpeed config:

    "datastates_ckpt": {"host_cache_size": 4, "max_in_flight": 2}

"host_cache_size" is the staging memory in GiB; the other keys are the fields of `ckpt.Options`.

* save_checkpoint() copies no parameters and no optimizer state. They are written in the background until the next update, which
  waits for what has not left yet. Buffers, frozen parameters, client_state and all Python values are captured before
  save_checkpoint() returns; `exclude_frozen_parameters=True` leaves a large frozen model out.
* `latest` is moved when the files of all ranks are durable, after save_checkpoint() has returned. A checkpoint that fails does
  not stop the training; it is logged, and `Options.max_failed_saves` in a row raise.
* load_checkpoint() waits for this job's own saves. It refuses a checkpoint that is incomplete or damaged; without a tag it
  falls back to the newest one that is good.
* save_16bit_model() returns when the file is durable.
* What updates weights outside an optimizer's step (a captured CUDA graph, hand-written updates) must call `ckpt.fence()`
  before. With SuperOffload and ZenFlow, whose updates overlap with the backward, everything is copied inside save_checkpoint().

With DeepSpeed's own engines `save_checkpoint` is described in its documentation; the rules that an engine must keep were taken
from DeepSpeed 0.19 (runtime/engine.py, runtime/checkpoint_engine).
"""

from __future__ import annotations

import filecmp
import logging
import os
import socket
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import ckpt

from ._deepspeed_config import options_from
from ._deepspeed_state import lazy_tensors

__all__ = ["LazyCheckpointEngine", "attach", "disable", "enable", "wait"]

logger = logging.getLogger("ckpt")


class LazyCheckpointEngine:
    """A checkpoint engine of DeepSpeed; made by enable() or attach(). All ranks make it together.

    Args:
        config: a DeepSpeedConfig, or None.
        options: for what the config does not say.

    Raises:
        ValueError, TypeError: the section in the config is wrong.
        CheckpointError: the ranks cannot agree, see BundleCheckpointer.
    """

    def __init__(self, config: Any = None, options: ckpt.Options | None = None) -> None:
        section = getattr(getattr(config, "datastates_config", None), "config", None)
        self.name = "LazyCheckpointEngine"
        self.options = options_from(section, options)
        local = bool(getattr(config, "use_node_local_storage", False))
        self._checkpointer = ckpt.BundleCheckpointer(
            options=self.options,
            node=os.environ.get("GROUP_RANK", socket.gethostname()) if local else None,
            leads_node=os.environ.get("LOCAL_RANK", "0") == "0",
        )
        self._engine: weakref.ref[Any] = weakref.ref(self)  # of DeepSpeed, once bound
        self._bundle: Any = None  # that is being put together
        self._client_keys: tuple[str, ...] = ()
        self._exporting = False  # in save_16bit_model(), which waits for its file
        self._is_lazy = True

    def bind(self, engine: Any) -> None:
        """Lets it know the DeepSpeedEngine that it works for: its buffers, and how it updates."""
        self._engine = weakref.ref(engine)
        self._is_lazy = not (_ask(engine, "super_offload") or getattr(engine, "zenflow", False))

    # ---- what DeepSpeed calls --------------------------------------------------------------------------------------

    def create(self, info: Any) -> None:
        """Begins a checkpoint."""
        self.end_save()
        engine = self._engine()
        step = int(getattr(engine, "global_steps", 0))
        self._bundle = self._checkpointer.begin(
            info.save_dir, str(info.tag), step=step, move_latest=bool(info.save_latest), may_skip=not self._exporting
        )

    def save(self, state_dict: Any, path: str) -> None:
        """Captures all of a file but what is lazy."""
        if self._bundle is None:
            raise ckpt.CheckpointError(f"save('{path}') without create(): DeepSpeed begins a checkpoint with create()")
        lazy: Any = False
        if self._is_lazy:
            module = getattr(self._engine(), "module", None)
            lazy = lazy_tensors(state_dict, module if isinstance(module, torch.nn.Module) else None, self._client_keys)
        self._bundle.save(state_dict, path, lazy=lazy)

    def commit(self, info: Any) -> bool:
        """Waits until the checkpoint is durable. DeepSpeed calls it for save_16bit_model() only."""
        pending = self.end_save()
        if pending is not None:
            pending.result()
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads a file after verifying its checksums; what is in flight is waited for."""
        self.drain()
        return ckpt.load(path, map_location=map_location, weights_only=False)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

        CheckpointEngine.makedirs(self, path, exist_ok)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """True: DeepSpeed leaves commit and `latest` to us. It asks at the end of save_checkpoint(); so does our part end."""
        self.end_save()
        return True

    def set_commit_info(self, info: Any) -> None:
        pass

    def get_commit_info(self) -> None:
        """DeepSpeed asks before each update: the fence. None: nothing to commit, on any rank."""
        self.end_save()
        ckpt.fence()

    def preserves_storage_sharing(self) -> bool:
        """False: DeepSpeed need not clone what it gives us, each tensor's bytes are written once and no others."""
        return False

    def cleanup(self) -> None:
        """Drains what is pending, and ends. Failures have been logged."""
        self.end_save()
        try:
            self._checkpointer.close()
        except ckpt.CheckpointError as error:
            logger.error("the newest checkpoint did not become durable: %s", error)

    # ---- for the functions below -----------------------------------------------------------------------------------

    def begin_save(self, client_keys: Iterable[str], exporting: bool = False) -> None:
        self._client_keys = tuple(client_keys)
        self._exporting = exporting

    def end_save(self, error: BaseException | None = None) -> ckpt.PendingSave | None:
        """What has been put together goes to the background; safe to call at any time."""
        bundle, self._bundle = self._bundle, None
        if bundle is None:
            return None
        engine: Any = self._engine()
        if _ask(engine, "zero_nvme_offload_optimizer"):
            # DeepSpeed has copied them there itself, and fsynced nothing.
            rank = engine.local_rank if _ask(engine, "use_node_local_storage") else engine.global_rank
            bundle.include(bundle.directory / "offloaded_tensors" / f"rank{rank:02d}")
        if error is not None:
            bundle.fail(ckpt.CheckpointError(f"{type(error).__name__} in save_checkpoint: {error}"))
        return bundle.commit()

    def find(self, load_dir: Any, tag: Any) -> str | None:
        self.end_save()
        return self._checkpointer.find(load_dir, None if tag is None else str(tag))

    def drain(self) -> None:
        """Waits until nothing is in flight, whatever came of it."""
        self.end_save()
        self._checkpointer.wait_quietly()

    def wait(self, timeout: float | None = None) -> None:
        """See wait() of the module."""
        self.end_save()
        self._checkpointer.wait(timeout)


# ---- the ways in -----------------------------------------------------------------------------------------------------

_enabled = False
_options: ckpt.Options | None = None


def enable(options: ckpt.Options | None = None) -> None:
    """From now on every engine that `deepspeed.initialize` makes checkpoints lazily. Safe to call again.

    Args:
        options: for what the section "datastates_ckpt" of the DeepSpeed config does not say.

    Raises:
        ImportError: deepspeed is not installed.
    """
    global _enabled, _options
    _patch()
    _enabled, _options = True, options


def disable() -> None:
    """Engines made from now on are DeepSpeed's own again; those that were made keep what they have."""
    global _enabled
    _enabled = False


def attach(engine: Any, options: ckpt.Options | None = None) -> LazyCheckpointEngine:
    """Gives one DeepSpeedEngine, made by `deepspeed.initialize`, lazy checkpoints. All ranks call it.

    Args:
        options: for what the section "datastates_ckpt" of its config does not say.

    Raises:
        ValueError, TypeError: the section in the config is wrong.
    """
    _patch()
    ours = LazyCheckpointEngine(getattr(engine, "_config", None), options)
    ours.bind(engine)
    if (before := _ours(engine)) is not None:
        before.cleanup()
    engine.checkpoint_engine = ours
    return ours


def wait(engine: Any, timeout: float | None = None) -> None:
    """Waits until every save_checkpoint() of the engine is durable, and `latest` moved.

    Args:
        timeout: seconds; None waits as long as it takes.

    Raises:
        DeadlineError: not within `timeout`.
        CheckpointError: one has failed since the last wait(); the newest such error.
        TypeError: the engine has no lazy checkpoints.
    """
    ours = _ours(engine)
    if ours is None:
        raise TypeError(
            "this DeepSpeed engine does not checkpoint lazily: call enable() before deepspeed.initialize, or attach()"
        )
    ours.wait(timeout)


def _ours(engine: Any) -> LazyCheckpointEngine | None:
    found = getattr(engine, "checkpoint_engine", None)
    return found if isinstance(found, LazyCheckpointEngine) else None


def _ask(engine: Any, question: str) -> bool:
    """A question that some engines cannot answer."""
    try:
        return bool(getattr(engine, question)())
    except (AttributeError, TypeError):
        return False


# ---- inside DeepSpeed ------------------------------------------------------------------------------------------------


def _patch() -> None:
    """Once in a process. Engines that are not ours go through unchanged."""
    import deepspeed.runtime.engine as runtime

    engine_class: Any = runtime.DeepSpeedEngine
    if getattr(engine_class, "_lazyckpt", False):
        return
    engine_class._lazyckpt = True
    stock_create, stock_configure = runtime.create_checkpoint_engine, engine_class._configure_checkpointing
    stock_save, stock_load = engine_class.save_checkpoint, engine_class.load_checkpoint

    def create_checkpoint_engine(*args: Any, **kwargs: Any) -> Any:
        if not _enabled:
            return stock_create(*args, **kwargs)
        config = kwargs.get("config_params", args[0] if args else None)
        if (getattr(config, "checkpoint_config", None) or {}).get("writer") is not None:
            logger.warning('"checkpoint.writer" in the DeepSpeed config has no effect: lazy checkpoints are enabled')
        return LazyCheckpointEngine(config, _options)

    def configure(self: Any) -> None:
        stock_configure(self)
        if (ours := _ours(self)) is not None:
            ours.bind(self)

    def save_checkpoint(
        self: Any,
        save_dir: Any,
        tag: Any = None,
        client_state: Any = {},  # noqa: B006 (as DeepSpeed has it)
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if (ours := _ours(self)) is None:
            return stock_save(self, save_dir, tag, client_state, *args, **kwargs)
        ours.begin_save(client_state)
        try:
            saved = stock_save(self, save_dir, tag, client_state, *args, **kwargs)
        except BaseException as error:
            ours.end_save(error)
            raise
        ours.end_save()
        return saved

    stock_export = engine_class.save_16bit_model

    def save_16bit_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (ours := _ours(self)) is None:
            return stock_export(self, *args, **kwargs)
        ours.begin_save((), exporting=True)
        try:
            return stock_export(self, *args, **kwargs)
        except BaseException as error:
            ours.end_save(error)
            raise

    def load_checkpoint(self: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        if (ours := _ours(self)) is not None:
            ckpt.fence()  # what is loaded overwrites what may still be leaving
            if _ask(self, "load_universal_checkpoint"):
                ours.drain()
            else:
                tag = ours.find(load_dir, tag) or tag
        return stock_load(self, load_dir, tag, *args, **kwargs)

    stock_copy = engine_class._copy_recovery_script

    def copy_recovery_script(self: Any, save_path: Any) -> None:
        # Overwriting a file waits on ext4 for the direct writes that are under way: a tenth of a second for each save.
        if _ours(self) is None or not _has_scripts(Path(runtime.__file__).parents[1] / "utils", Path(save_path)):
            stock_copy(self, save_path)

    engine_class._copy_recovery_script = copy_recovery_script
    runtime.create_checkpoint_engine = create_checkpoint_engine
    engine_class._configure_checkpointing = configure
    engine_class.save_checkpoint, engine_class.load_checkpoint = save_checkpoint, load_checkpoint
    engine_class.save_16bit_model = save_16bit_model
    for name in ("offload_states", "reload_states"):
        if hasattr(engine_class, name):
            setattr(engine_class, name, _after_fence(getattr(engine_class, name)))


def _has_scripts(source: Path, target: Path) -> bool:
    """Whether DeepSpeed's recovery scripts are in a directory of checkpoints already."""
    try:
        return all(filecmp.cmp(source / name, target / name, shallow=False) for name in ("zero_to_fp32.py", "zero_to_torch.py"))
    except OSError:
        return False


def _after_fence(stock: Any) -> Any:
    def fenced(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _ours(self) is not None:
            ckpt.fence()
        return stock(self, *args, **kwargs)

    return fenced
