"""DeepSpeed's own readers of checkpoints, in a process that saves.

They know nothing of saves in flight, and may be called on one rank alone. So they wait here for what this process is saving to
the directory: when that is done, it is published on all ranks. They never read what is older than the newest save without being
told to.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ckpt

from .wrapping import Call, wrap_function

_MOST_SAVES = 64  # that are remembered; a framework may take a new directory for each

_LISTINGS: dict[
    str, tuple[str, ...]
] = {  # what lists or picks the files of a directory; all else of DeepSpeed reads what these have found
    "deepspeed.utils.zero_to_fp32": ("get_checkpoint_files", "get_model_state_file"),
    "deepspeed.checkpoint.ds_to_universal": ("_get_checkpoint_files",),
    "deepspeed.checkpoint.reshape_utils": ("basic_folder_validation", "get_files"),
}


class _Save:
    """A save to `path`, in the directory `root`. Of one that is done just the outcome is kept."""

    def __init__(self, root: Path, pending: ckpt.PendingSave, moves_latest: bool, timeout_s: float) -> None:
        self.root, self.path = root, _real(pending.path)
        self.moves_latest = moves_latest
        self._timeout_s = timeout_s
        self._error: BaseException | None = None
        self._pending: ckpt.PendingSave | None = pending
        pending.add_done_callback(self._keep_outcome)

    def _keep_outcome(self, pending: ckpt.PendingSave) -> None:
        self._error = pending.exception(0)
        self._pending = None

    def error(self) -> BaseException | None:
        """Waits for its end. The error with which it failed; None if it succeeded. Raises DeadlineError."""
        pending = self._pending
        return self._error if pending is None else pending.exception(self._timeout_s)


_saves: dict[Path, _Save] = {}  # the newest to each path, in the order in which they were made
_chosen: contextvars.ContextVar[tuple[Path, str | None] | None] = contextvars.ContextVar("_chosen", default=None)


def note_save(root: str | os.PathLike[str], pending: ckpt.PendingSave, moves_latest: bool, timeout_s: float) -> None:
    """From now on readers wait for it.

    Args:
        root: where `latest` lies.
        timeout_s: how long they do, seconds.
    """
    save = _Save(_real(root), pending, moves_latest, timeout_s)
    _saves.pop(save.path, None)
    _saves[save.path] = save
    for path in list(_saves)[:-_MOST_SAVES]:
        _saves.pop(path, None)


def wait_for_saves(directory: str | os.PathLike[str], tag: str | None = None, *, may_fail: bool = False) -> None:
    """Until no save of this process to the directory is in flight. No collective.

    Args:
        directory: of one checkpoint, or the one above it, where `latest` lies.
        tag: of the checkpoint below `directory`.
        may_fail: whoever reads finds out for himself what is good.

    Raises:
        CheckpointError: the newest one has failed: an older one would be read.
        DeadlineError: not within `Options.drain_timeout_s`.
    """
    at = _real(directory if tag is None else os.path.join(directory, tag))
    concerned = [save for save in list(_saves.values()) if save.path == at or (save.root == at and save.moves_latest)]
    errors = [save.error() for save in concerned]
    if not errors or errors[-1] is None or may_fail:
        return
    save, latest = concerned[-1], _latest_in(at)
    older = f"; `latest` still names '{latest}', which is older: to read that, give it as the tag" if latest else ""
    raise ckpt.CheckpointError(
        f"'{at}' is not read: the newest save to it by this process, '{save.path}', failed: {errors[-1]}{older}"
    ) from errors[-1]


@contextlib.contextmanager
def reading(directory: str | os.PathLike[str], tag: str | None) -> Iterator[None]:
    """Meanwhile, what DeepSpeed reads from the directory without naming a tag is of this one, and nothing of it waits.

    Args:
        tag: None: it finds the tag itself.
    """
    token = _chosen.set((_real(directory), tag))
    try:
        yield
    finally:
        _chosen.reset(token)


def make_readers_wait() -> None:
    """To be called once in a process. Functions that this version of DeepSpeed lacks are left out."""
    for module, names in _LISTINGS.items():
        for name in names:
            wrap_function(module, name, _waiting)
    wrap_function("deepspeed.utils.zero_to_fp32", "get_fp32_state_dict_from_zero_checkpoint", _of_chosen_tag)


def _is_being_read(directory: str | os.PathLike[str]) -> bool:
    chosen = _chosen.get()
    return chosen is not None and _real(directory).is_relative_to(chosen[0])


def _waiting(stock: Call) -> Call:
    def read(*args: Any, **kwargs: Any) -> Any:
        directory = args[0] if args else kwargs.get("checkpoint_dir", kwargs.get("dir", ""))
        if not _is_being_read(directory):
            wait_for_saves(directory)
        return stock(*args, **kwargs)

    return read


def _of_chosen_tag(stock: Call) -> Call:
    def read(checkpoint_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        chosen = _chosen.get()
        if chosen is None or not _is_being_read(checkpoint_dir):
            wait_for_saves(checkpoint_dir, tag)
        elif tag is None and chosen[0] == _real(checkpoint_dir):
            # load_checkpoint() of ZeRO 3 without the optimizer's states: DeepSpeed forgets to pass the tag on.
            tag = chosen[1]
        with reading(checkpoint_dir, tag):
            return stock(checkpoint_dir, tag, *args, **kwargs)

    return read


def _latest_in(directory: Path) -> str:
    try:
        return (directory / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _real(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path))
