"""Lazy asynchronous checkpoints for accelerate, with not a line of the training changed.

    import ckpt.integrations.accelerate as lazy

    lazy.enable()  # before the first save_state()

`save_state()` and `load_state()` stay as they are, and so do their files and names: stock accelerate loads them, and what it
has saved is loaded here.

* save_state() copies no parameters and no optimizer state. They are written in the background until the next update, which
  waits for what has not left yet. Buffers, registered objects, random numbers, samplers, the scaler, schedulers and all Python
  values are captured before it returns.
* The directory gets its name when all of it is durable on all ranks; what had the name before stays until then. So whoever
  lists directories meets only finished checkpoints. save_state() returns the name, which may not be there yet: `wait()`, or
  end_training(), waits until it is. Hooks are given the directory in which the state is put together, and what they write
  there is made durable with it.
* A directory that holds something else beside a state is not replaced: the state's files are, all of them or none.
* With `total_limit` old checkpoints go once the newest is durable, never before. So for a while there is one more.
* load_state() waits for this job's own saves, and verifies what it loads; without a directory it takes the highest number
  that is good. What accelerate itself has saved is loaded as it is.
* A save that fails does not stop the training; it is logged, and `Options.max_failed_saves` in a row raise in the next
  save_state(). wait() and end_training() raise what the newest one failed with.
* All ranks call save_state(), as accelerate says. Where only the main process does, `enable(ranks="main")`.
* Sharded states of FSDP2 go to the same directories of torch.distributed.checkpoint, those of DeepSpeed to the same files, by
  `ckpt.integrations.dcp` and `ckpt.integrations.deepspeed`, and belong to the checkpoint as all else does.
* save_model(), save() and whatever else writes files outside save_state() are accelerate's own: the file is there on return.
* What writes to weights outside an optimizer's step (averaged weights that are swapped in, `nn.Embedding(max_norm=)`, updates
  by hand) must call `ckpt.fence()` before. A save that such a write has hit fails, and says which tensor it was.
* Megatron-LM, XLA, and `save_on_each_node` are left to accelerate itself; the log says so.

What accelerate does, and where, was taken from its 1.15 (accelerator.py, checkpointing.py, utils/fsdp_utils.py).
"""

from __future__ import annotations

import ckpt

from .patch import patch_accelerate
from .saves import StateSaves

__all__ = ["disable", "enable", "wait"]

_saves: StateSaves | None = None
_enabled = False


def _saves_if_enabled() -> StateSaves | None:
    return _saves if _enabled else None


def enable(options: ckpt.Options | None = None, *, ranks: str = "all") -> None:
    """From now on Accelerator.save_state() saves lazily. On all ranks; again, with other arguments, once wait() has returned.

    Args:
        options: see ckpt.Options.
        ranks: who calls save_state(): "all", or "main": the main process alone, as scripts do that need no more than its random
            numbers. The others may not, then.

    Raises:
        ImportError: accelerate is not installed.
        UnsupportedError: this version of accelerate lacks what is needed here; nothing has changed then.
        ValueError: `ranks` is something else.
        CheckpointError: what was in flight by former arguments did not become durable.
    """
    global _saves, _enabled
    if ranks not in ("all", "main"):
        raise ValueError(f"ranks must be 'all' or 'main', but is {ranks!r}")
    patch_accelerate(_saves_if_enabled)
    before, _saves, _enabled = _saves, StateSaves(options, ranks == "main"), True
    if before is not None and (error := before.close()) is not None:
        raise error


def disable() -> None:
    """Accelerator.save_state() is accelerate's own again, once what is in flight is durable.

    Raises:
        CheckpointError: the newest save did not become durable.
    """
    global _enabled
    _enabled = False
    if _saves is not None and (error := _saves.close()) is not None:
        raise error


def wait(timeout: float | None = None) -> None:
    """Waits until every save_state() of this process is durable, and has its name.

    Args:
        timeout: seconds; None waits as long as it takes.

    Raises:
        DeadlineError: not within `timeout`.
        CheckpointError: one has failed since the last wait(); the newest such error.
    """
    if _saves is not None:
        _saves.wait(timeout)
