"""The methods of accelerate's classes that are replaced."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ckpt

from ..huggingface import sharded_writes
from . import accelerate_private as private
from .saves import StateSaves

logger = logging.getLogger("ckpt")

_stock: dict[str, Any] = {}  # methods, by class and name


def patch_accelerate(enabled: Callable[[], StateSaves | None]) -> None:
    """
    Args:
        enabled: what is to save; None: accelerate itself.

    Raises:
        ImportError: accelerate is not installed.
        UnsupportedError: it is not as those that were tested.
    """
    if _stock:
        return
    private.check()
    from accelerate import Accelerator
    from accelerate.state import PartialState

    private.replace_writers()
    for owner, name, wrapper in (
        (Accelerator, "save_state", _save_state),
        (Accelerator, "load_state", _load_state),
        (Accelerator, "end_training", _end_training),
        (PartialState, "destroy_process_group", _destroy_process_group),
    ):
        stock = _stock[name] = getattr(owner, name)
        setattr(owner, name, _method(stock, wrapper, enabled))


def _method(stock: Any, wrapper: Callable[..., Any], enabled: Callable[[], StateSaves | None]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        saves = enabled()
        if saves is None:
            return stock(self, *args, **kwargs)
        return wrapper(saves, functools.partial(stock, self), self, *args, **kwargs)

    return method


def _save_state(
    saves: StateSaves,
    stock: Callable[..., Any],
    accelerator: Any,
    output_dir: Any = None,
    safe_serialization: bool = True,
    **more: Any,
) -> Any:
    configuration = accelerator.project_configuration
    automatic = configuration.automatic_checkpoint_naming
    reason = saves.why_not(accelerator)
    if reason is not None or (accelerator.project_dir if automatic else output_dir) is None:  # accelerate says so itself
        if reason is not None:
            saves.say(reason)
        return stock(output_dir, safe_serialization, **more)
    saves.refuse_others(accelerator)
    place, named_last = saves.place_of(accelerator, output_dir)
    with saves.saving(accelerator, place, named_last) as bundle, _as_named(configuration), _lazily(saves, accelerator, bundle):
        written = stock(str(bundle.directory), safe_serialization, **more)
    saves.keep(accelerator, place, configuration.total_limit if automatic else None)
    return place.path if isinstance(written, Path) else str(place.path)


@contextlib.contextmanager
def _as_named(configuration: Any) -> Iterator[None]:
    """Meanwhile accelerate saves where it is told to."""
    before = configuration.automatic_checkpoint_naming
    configuration.automatic_checkpoint_naming = False
    try:
        yield
    finally:
        configuration.automatic_checkpoint_naming = before


@contextlib.contextmanager
def _lazily(saves: StateSaves, accelerator: Any, bundle: Any) -> Iterator[None]:
    """Meanwhile what shards the model saves it lazily."""
    kind = private.distributed_type(accelerator)
    if kind == "FSDP":
        private.replace_sharded_writes()
        put_back = private.without_offload(accelerator)
        try:
            yield
        finally:
            put_back()
    elif kind == "DEEPSPEED":
        from .deepspeed_engines import saving_into

        with saving_into(bundle, private.engines_of(accelerator), saves.options):
            yield
    else:
        yield


def _load_state(
    saves: StateSaves, stock: Callable[..., Any], accelerator: Any, input_dir: Any = None, *args: Any, **more: Any
) -> Any:
    automatic = accelerator.project_configuration.automatic_checkpoint_naming
    if input_dir is None and not (automatic and accelerator.project_dir is not None):
        return stock(input_dir, *args, **more)
    found = saves.find(accelerator, input_dir)
    ckpt.fence()  # what is loaded overwrites what may still be leaving, by whatever save
    if private.distributed_type(accelerator) == "FSDP":
        private.replace_sharded_writes()
    with sharded_writes.verifying():
        return stock(input_dir if found is None else found, *args, **more)


def _end_training(saves: StateSaves, stock: Callable[..., Any], accelerator: Any) -> Any:
    error = saves.close()
    ended = stock()
    if error is not None:
        raise error
    return ended


def _destroy_process_group(saves: StateSaves, stock: Callable[..., Any], state: Any, group: Any = None) -> Any:
    if group is None and (error := saves.close()) is not None:  # by which the ranks agree on what is in flight
        logger.error("the newest state did not become durable: %s", error)
    return stock(group)
