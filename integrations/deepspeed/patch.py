"""Replaces functions and methods of DeepSpeed, once in a process. Engines that are not ours go through unchanged."""

from __future__ import annotations

import filecmp
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ckpt

from .engine import LazyCheckpointEngine, ask, ours_of
from .fenced_writes import fence_writes
from .readers import make_readers_wait, reading, wait_for_saves

logger = logging.getLogger("ckpt")

_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
_stock: dict[str, Any] = {}  # methods of DeepSpeedEngine


def patch_deepspeed(enabled: Callable[[], tuple[bool, ckpt.Options | None, Sequence[ckpt.Tier]]]) -> None:
    """
    Args:
        enabled: whether engines that are made get ours, and with which options and tiers.

    Raises:
        ImportError: deepspeed is not installed.
    """
    import deepspeed.runtime.engine as runtime

    if _stock:
        return
    engine_class: Any = runtime.DeepSpeedEngine
    for name, wrapper in _WRAPPERS.items():
        if hasattr(engine_class, name):
            _stock[name] = getattr(engine_class, name)
            setattr(engine_class, name, functools.wraps(_stock[name])(wrapper))
    stock_create = runtime.create_checkpoint_engine

    def create_checkpoint_engine(*args: Any, **kwargs: Any) -> Any:
        is_enabled, options, tiers = enabled()
        if not is_enabled:
            return stock_create(*args, **kwargs)
        config = kwargs.get("config_params", args[0] if args else None)
        if (getattr(config, "checkpoint_config", None) or {}).get("writer") is not None:
            logger.warning('"checkpoint.writer" in the DeepSpeed config has no effect: lazy checkpoints are enabled')
        return LazyCheckpointEngine(config, options, tiers)

    runtime.create_checkpoint_engine = create_checkpoint_engine
    fence_writes()
    make_readers_wait()


# ---- methods of DeepSpeedEngine --------------------------------------------------------------------------------------


def _configure_checkpointing(self: Any) -> None:
    _stock["_configure_checkpointing"](self)
    if (ours := ours_of(self)) is not None:
        ours.bind(self)


def _save_checkpoint(
    self: Any,
    save_dir: Any,
    tag: Any = None,
    client_state: Any = {},  # noqa: B006 (as DeepSpeed has it)
    *args: Any,
    **kwargs: Any,
) -> Any:
    stock = _stock["save_checkpoint"]
    if (ours := ours_of(self)) is None:
        return stock(self, save_dir, tag, client_state, *args, **kwargs)
    ours.begin_save(client_state)
    try:
        saved = stock(self, save_dir, tag, client_state, *args, **kwargs)
    except BaseException as error:
        ours.end_save(error)
        raise
    ours.end_save()
    ours.finish_save(save_dir)
    return saved


def _save_16bit_model(self: Any, *args: Any, **kwargs: Any) -> Any:
    stock = _stock["save_16bit_model"]
    if (ours := ours_of(self)) is None:
        return stock(self, *args, **kwargs)
    ours.begin_save((), exporting=True)
    try:
        return stock(self, *args, **kwargs)
    except BaseException as error:
        ours.end_save(error)
        raise


def _load_checkpoint(self: Any, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
    stock = _stock["load_checkpoint"]
    wait_for_saves(load_dir, may_fail=True)  # of other engines too
    if (ours := ours_of(self)) is None:
        return stock(self, load_dir, tag, *args, **kwargs)
    ckpt.fence()  # what is loaded overwrites what may still be leaving
    if ask(self, "load_universal_checkpoint"):
        ours.drain()
        chosen = None
    else:
        all_states = _reads_all_states(self, stock, load_dir, tag, *args, **kwargs)
        optimizer = all_states or _reads_optimizer(self, stock, load_dir, tag, *args, **kwargs)
        chosen = ours.find(load_dir, tag, optimizer=optimizer, nearest=all_states)
    tag = chosen or tag
    try:
        with reading(load_dir, None if tag is None else str(tag)):
            return stock(self, load_dir, tag, *args, **kwargs)
    finally:
        ours.end_load()


def _arguments(self: Any, stock: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    given = inspect.signature(stock).bind(self, *args, **kwargs)
    given.apply_defaults()
    return given.arguments


def _reads_all_states(self: Any, stock: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a load with these arguments is a plain one. In others DeepSpeed may read files by itself."""
    given = _arguments(self, stock, *args, **kwargs)
    return bool(given.get("load_optimizer_states", True)) and not given.get("load_module_only", False)


def _reads_optimizer(self: Any, stock: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a load with these arguments, which is no plain one, reads the files of the optimizer's states."""
    states = _arguments(self, stock, *args, **kwargs).get("load_optimizer_states", True)
    # ZeRO 3 has the weights nowhere else, and takes them from there if it is to load no states; experts in any case.
    return ask(self, "zero_optimization_partition_weights") and (not states or bool(getattr(self, "has_moe_layers", False)))


def _copy_recovery_script(self: Any, save_path: Any) -> None:
    # Overwriting a file waits on ext4 for the direct writes that are under way: a tenth of a second for each save.
    if ours_of(self) is None or not _has_scripts(Path(save_path)):
        _stock["_copy_recovery_script"](self, save_path)


def _has_scripts(target: Path) -> bool:
    """Whether DeepSpeed's recovery scripts are in a directory of checkpoints already."""
    import deepspeed.utils

    source = Path(deepspeed.utils.__file__).parent
    try:
        return all(filecmp.cmp(source / name, target / name, shallow=False) for name in _SCRIPTS)
    except OSError:
        return False


def _fenced(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ours_of(self) is not None:
            ckpt.fence()
        return _stock[name](self, *args, **kwargs)

    return method


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "_configure_checkpointing": _configure_checkpointing,
    "save_checkpoint": _save_checkpoint,
    "save_16bit_model": _save_16bit_model,
    "load_checkpoint": _load_checkpoint,
    "_copy_recovery_script": _copy_recovery_script,
    "offload_states": _fenced("offload_states"),
    "reload_states": _fenced("reload_states"),
}
