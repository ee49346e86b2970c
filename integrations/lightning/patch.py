"""Replaces functions of Lightning, once in a process. Trainers without a LazyCheckpointIO go through unchanged.

A CheckpointIO is told of one file at a time, to be written, read or removed. What it is not told is replaced here: whether
training goes on behind a save, whether a file is there, links, what strategies write by torch.distributed.checkpoint, when the
optimizer's step begins, and what writes to weights outside of one.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

import ckpt

from .. import dcp
from . import lightning_private
from .closures import calls_closure_first, writes_in_forward
from .lightning_private import SEAMS, Package
from .places import local_path

Replacement = Callable[[Callable[..., Any]], Callable[..., Any]]

_done: set[Package] = set()
_verifies: contextvars.ContextVar[bool] = contextvars.ContextVar("ckpt_lightning_verifies", default=False)
_LOAD = "_distributed_checkpoint_load"
_LOADERS = ("strategies.fsdp", "strategies.model_parallel")  # modules that look it up among their own names


def patch_lightning(plugin: type, ours_of: Callable[[Any], Any]) -> None:
    """Of each of its packages that is imported, or else installed.

    Args:
        plugin: to be taken for a CheckpointIO from now on.
        ours_of: gives the LazyCheckpointIO of a strategy, or None.

    Raises:
        ImportError: none is installed.
        UnsupportedError: something is not there, or has other arguments; nothing was replaced in that package.
    """
    packages = lightning_private.packages_in_use()
    if not packages:
        raise ImportError("LazyCheckpointIO needs Lightning: pip install lightning (or pytorch_lightning)")
    for package in packages:
        if package in _done:
            continue
        base = lightning_private.checkpoint_io_class(package)
        found = {name: lightning_private.find(seam, package) for name, seam in SEAMS.items()}
        for name, made in _replacements(ours_of).items():
            if (there := found[name]) is not None:
                _replace(*there, SEAMS[name].name, made)
        for root in (package.trainer, package.fabric):
            _verify_loads(root)
        base.register(plugin)
        _done.add(package)


def _replace(owner: Any, stock: Any, name: str, made: Replacement) -> None:
    is_static = isinstance(stock, staticmethod)
    function = stock.__func__ if is_static else stock
    replacement = functools.wraps(function)(made(function))
    setattr(owner, name, staticmethod(replacement) if is_static else replacement)


def _replacements(ours_of: Callable[[Any], Any]) -> dict[str, Replacement]:
    return {
        **_of_trainers(ours_of),
        **_of_model_checkpoint(ours_of),
        **_of_sharded(ours_of),
        **_of_fabric(ours_of),
        **dict.fromkeys(("swap", "copy_average", "transfer"), _fenced),
    }


def _fenced(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Writes to weights outside of an optimizer's step."""

    def fenced(*args: Any, **kwargs: Any) -> Any:
        ckpt.fence()
        return stock(*args, **kwargs)

    return fenced


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def _of_trainers(ours_of: Callable[[Any], Any]) -> dict[str, Replacement]:
    def trainer_save(stock: Callable[..., Any]) -> Callable[..., Any]:
        def save_checkpoint(self: Any, filepath: Any, *args: Any, **kwargs: Any) -> Any:
            ours = ours_of(self.strategy)
            if ours is None or not lightning_private.is_fitting(self) or ours.has_ended(self):
                return stock(self, filepath, *args, **kwargs)
            ours.agree_to_save(self.strategy)
            with ours.training_goes_on(self, copies=writes_in_forward(self.lightning_module)):
                return stock(self, filepath, *args, **kwargs)

        return save_checkpoint

    def trainer_end(stock: Callable[..., Any]) -> Callable[..., Any]:
        def teardown(self: Any) -> None:
            ours = ours_of(self.strategy)
            if ours is not None and lightning_private.is_running(self):  # no error is on its way
                ours.finish(self.strategy)
            stock(self)
            if ours is not None:
                ours.note_end(self)

        return teardown

    def optimizer_step(stock: Callable[..., Any]) -> Callable[..., Any]:
        def step(self: Any, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:
            ours = ours_of(model.trainer.strategy)
            if ours is not None and calls_closure_first(optimizer, ours.closure_first) and not writes_in_forward(model):
                with torch.enable_grad():
                    result = closure()
                closure = lambda: result  # noqa: E731
            return stock(self, optimizer, model, closure, **kwargs)

        return step

    def load(stock: Callable[..., Any]) -> Callable[..., Any]:
        def load_checkpoint(self: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
            if (ours := ours_of(self)) is not None:
                ours.settle_together(self, checkpoint_path)
            return stock(self, checkpoint_path, *args, **kwargs)

        return load_checkpoint

    return {"trainer_save": trainer_save, "trainer_end": trainer_end, "optimizer_step": optimizer_step, "load": load}


def _of_model_checkpoint(ours_of: Callable[[Any], Any]) -> dict[str, Replacement]:
    def file_exists(stock: Callable[..., Any]) -> Callable[..., Any]:
        def exists(self: Any, filepath: Any, trainer: Any) -> bool:
            ours = ours_of(trainer.strategy)
            if ours is None or local_path(filepath) is None:
                return bool(stock(self, filepath, trainer))
            found = ours.exists(filepath) if trainer.is_global_zero else False
            return bool(trainer.strategy.reduce_boolean_decision(found, all=False))

        return exists

    def link(stock: Callable[..., Any]) -> Callable[..., Any]:
        def link_checkpoint(trainer: Any, filepath: Any, linkpath: Any) -> None:
            ours = ours_of(trainer.strategy)
            if ours is None:
                stock(trainer, filepath, linkpath)
                return
            if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
                ours.link(linkpath, filepath)
            trainer.strategy.barrier()

        return link_checkpoint

    def batch_end(stock: Callable[..., Any]) -> Callable[..., Any]:
        def on_train_batch_end(self: Any, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            ours = ours_of(trainer.strategy)
            if ours is None or pl_module.automatic_optimization or not hasattr(pl_module, "saved_models"):
                stock(self, trainer, pl_module, *args, **kwargs)
                return
            ckpt.fence()  # it loads older weights into the module, saves these, and loads the newer ones again
            with ours.copying():
                stock(self, trainer, pl_module, *args, **kwargs)

        return on_train_batch_end

    return {"file_exists": file_exists, "link": link, "batch_end": batch_end}


# ---- strategies whose ranks hold parts -------------------------------------------------------------------------------


def _of_sharded(ours_of: Callable[[Any], Any]) -> dict[str, Replacement]:
    def saving(is_sharded: Callable[[Any], bool], key: str) -> Replacement:
        def made(stock: Callable[..., Any]) -> Callable[..., Any]:
            def save_checkpoint(self: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> Any:
                ours = ours_of(self)
                if ours is None or not is_sharded(self) or storage_options is not None:
                    return stock(self, checkpoint, filepath, storage_options=storage_options)
                path = local_path(self.broadcast(filepath))
                if path is None:
                    raise ValueError(f"'{filepath}' is a URL: a checkpoint of several ranks goes to a directory they all see")
                state = {key: checkpoint.pop("state_dict")}
                for number, each in enumerate(checkpoint.pop("optimizer_states", [])):
                    state[f"optimizer_{number}"] = each
                return ours.save_sharded(self, state, checkpoint, path)

            return save_checkpoint

        return made

    def loading(stock: Callable[..., Any]) -> Callable[..., Any]:
        def load_checkpoint(self: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
            ours = ours_of(self)
            if ours is None:
                return stock(self, checkpoint_path, *args, **kwargs)
            ours.settle_together(self, checkpoint_path)
            token = _verifies.set(True)
            try:
                return stock(self, checkpoint_path, *args, **kwargs)
            finally:
                _verifies.reset(token)

        return load_checkpoint

    fsdp, parallel = lightning_private.is_sharded_fsdp, lightning_private.is_sharded_parallel
    return {
        "fsdp_save": saving(fsdp, "model"),
        "fsdp_load": loading,
        "parallel_save": saving(parallel, "state_dict"),
        "parallel_load": loading,
        **_of_parallel_states(ours_of),
    }


def _of_parallel_states(ours_of: Callable[[Any], Any]) -> dict[str, Replacement]:
    """Lightning copies each rank's part to the host here, while training waits."""

    def model_state(stock: Callable[..., Any]) -> Callable[..., Any]:
        def lightning_module_state_dict(self: Any) -> Any:
            if ours_of(self) is None or not lightning_private.is_sharded_parallel(self):
                return stock(self)
            from torch.distributed.checkpoint.state_dict import get_model_state_dict

            return get_model_state_dict(self.model)

        return lightning_module_state_dict

    def optimizer_state(stock: Callable[..., Any]) -> Callable[..., Any]:
        def state(self: Any, optimizer: Any) -> Any:
            if ours_of(self) is None or not lightning_private.is_sharded_parallel(self):
                return stock(self, optimizer)
            from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

            return get_optimizer_state_dict(self.model, lightning_private.unwrapped(optimizer))

        return state

    return {"parallel_model": model_state, "parallel_optimizer": optimizer_state}


def _verify_loads(root: str) -> None:
    """What is loaded for a LazyCheckpointIO is compared with its checksums."""
    for name in _LOADERS:
        try:
            module = importlib.import_module(f"{root}.{name}")
        except ImportError:
            continue
        stock = inspect.getattr_static(module, _LOAD, None)
        if stock is None:
            continue

        def load(state: Any, path: Any, stock: Any = stock) -> None:
            if _verifies.get():
                dcp.load(state, checkpoint_id=path)
            else:
                stock(state, path)

        setattr(module, _LOAD, load)


# ---- Fabric ----------------------------------------------------------------------------------------------------------


def _of_fabric(ours_of: Callable[[Any], Any]) -> dict[str, Replacement]:
    def fabric_save(stock: Callable[..., Any]) -> Callable[..., Any]:
        def save(self: Any, path: Any, state: Any, *args: Any, **kwargs: Any) -> None:
            ours = ours_of(self.strategy)
            if ours is None:
                stock(self, path, state, *args, **kwargs)
                return
            ours.agree_to_save(self.strategy)
            modules = [each for each in state.values() if isinstance(each, torch.nn.Module)]
            with ours.training_goes_on(copies=any(map(writes_in_forward, modules))):
                stock(self, path, state, *args, **kwargs)

        return save

    def fabric_load(stock: Callable[..., Any]) -> Callable[..., Any]:
        def load(self: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            if (ours := ours_of(self.strategy)) is not None:
                ours.settle_together(self.strategy, path)
            return stock(self, path, *args, **kwargs)

        return load

    return {"fabric_save": fabric_save, "fabric_load": fabric_load}
