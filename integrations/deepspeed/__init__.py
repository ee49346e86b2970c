"""Lazy asynchronous checkpoints for DeepSpeed, with not a line of the training changed.

    import ckpt.integrations.deepspeed as lazy

    lazy.enable()  # before deepspeed.initialize

`save_checkpoint()` and `load_checkpoint()` stay as they are, and so do the files: DeepSpeed's own tools read them, and stock
DeepSpeed loads them. Options stand in the DeepSpeed config:

    "datastates_ckpt": {"host_cache_size": 4, "max_in_flight": 2}

All are optional; an unknown key is an error that lists the valid ones. `true` in place of the object means the defaults.

    key                     value                 default     what it means
    host_cache_size         number, GiB           as needed   staging memory; the same as arena_bytes, of which one is given
    wait_before_return      true, false           see below   save_checkpoint() waits until its files are durable
    tiers                   list of objects       []          disks of the nodes where saves land first, see below

    and the fields of `ckpt.Options`, which says more of each; sizes are bytes, or texts such as "4GiB"

    arena_bytes             size                  "auto"      staging memory
    chunk_bytes             size                  "4MiB"      unit of a write
    writers                 threads               4           that write
    eager_bytes             size                  "64KiB"     smaller tensors are copied inside save_checkpoint()
    direct_io               true, false           true        write past the page cache
    record_alignment        bytes                 null        lay files out as torch.save does (64), for comparisons
    replicated_writers      "all", "rank0"        "all"       no effect here: DeepSpeed says which rank writes which file
    replicated_readers      "each", "all"         "each"      no effect here: DeepSpeed reads
    device_lazy             "auto", true, false   "auto"      how tensors leave GPUs
    device_cache            size                  0           memory of each GPU that a step may use for what has not left
    device_batches          true, false           false       many small copies from a GPU in one call of its driver
    device_rate             size a second         0           most that leaves each GPU in the background; 0: no limit
    metadata_compat         "2.14"                null        no effect here: these files have no `.metadata`
    reuse                   true, false           true        write only what has changed, on XFS and btrfs
    refresh_every           saves                 20          then everything is written anew
    max_in_flight           saves                 2           that may be on their way at once
    when_busy               "wait", "skip"        "wait"      what save_checkpoint() does if so many are
    verify_capture          true, false           false       checksum all that leaves in the background twice, to find faults
    max_failed_saves        saves                 3           in a row that fail before one raises; 0: never
    timeout_s               seconds               1800        longest wait inside save_checkpoint(), and in a step
    drain_timeout_s         seconds               1800        longest wait for saves in flight at the end
    commit_timeout_s        seconds               600         longest wait of rank 0 for the files of the slowest rank

* save_checkpoint() copies no parameters and no optimizer state. They are written in the background until the next update, which
  waits for what has not left yet. Buffers, frozen parameters, client_state and all Python values are captured before
  save_checkpoint() returns; `exclude_frozen_parameters=True` leaves a large frozen model out.
* `latest` is moved when the files of all ranks are durable, after save_checkpoint() has returned. A checkpoint that fails does
  not stop the training; it is logged, and `Options.max_failed_saves` in a row raise.
* All ranks give save_checkpoint() the same tag and, on each node, the same directory; else it raises CheckpointError on all of
  them. Where each rank is to have a directory or tag of its own, leave the job DeepSpeed's own engine.
* Who removes old checkpoints himself as soon as save_checkpoint() has returned must not be left without any. So a save to
  another directory than the last one (`checkpoint-1`, then `checkpoint-2`) is waited for: save_checkpoint() returns when it is
  durable, and raises if it fails. "wait_before_return": true waits for every save, false for none. Durable is at home, with
  tiers, too.
* load_checkpoint() waits for this job's own saves. It refuses a checkpoint that is incomplete or damaged; without a tag it
  falls back to the newest one that is good. Files of the optimizer's states that it is told not to load may be missing.
* DeepSpeed's own readers (get_fp32_state_dict_from_zero_checkpoint() and its like) wait for the saves of their process, on one
  rank alone, too. If the newest save to the directory failed, they raise CheckpointError; what is older is read by its tag.
* `zero_to_fp32.py`, which lies in each checkpoint, needs the package huggingface_hub (`pip install huggingface_hub`), and for
  `--safe_serialization` safetensors: DeepSpeed installs neither.
* save_16bit_model() returns when the file is durable.
* With tiers, `"tiers": [{"node": "/nvme/ckpt", "keep": 2}]` or enable(tiers=[ckpt.Tier.node("/nvme/ckpt")]), a save lands on a
  disk of each node first, and a process of its own carries it to save_dir/tag, as the same files. Durable, `latest` and
  wait() mean save_dir, as ever; `wait(engine, tier="node")` waits until the nodes have it. The tag's directory appears at home
  with it: whoever writes there, renames or removes waits for that. This is for a save_dir that stays the same: the first save
  to it goes straight home, and so does all that is saved to another one. load_checkpoint() first waits until what is complete
  on the nodes of this job has come home (only the tag, if one is given), and then reads the files from the own node, if they
  are good there. What cannot come home is left out with a warning if a disk is lost or a file damaged, and else raises
  CheckpointError, because something older would be read. save_16bit_model(), and checkpoints with optimizer states on NVMe
  (`offload_optimizer`), go straight home; with use_node_local_storage tiers have no effect. Keys of a tier are those of
  `ckpt.Tier.node()`; "every" counts global steps.
* What updates weights outside an optimizer's step (a captured CUDA graph, hand-written updates) must call `ckpt.fence()`
  before. DeepSpeed's own functions that do (safe_set_full_fp32_param(), refresh_fp32_params() and their like) are fenced. With
  SuperOffload and ZenFlow, whose updates overlap with the backward, everything is copied inside save_checkpoint().

With DeepSpeed's own engines `save_checkpoint` is described in its documentation; the rules that an engine must keep were taken
from DeepSpeed 0.19 (runtime/engine.py, runtime/checkpoint_engine).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ckpt

from .engine import LazyCheckpointEngine, collecting, ours_of
from .patch import patch_deepspeed

__all__ = ["LazyCheckpointEngine", "attach", "collecting", "disable", "enable", "is_attached", "wait"]

_enabled = False
_options: ckpt.Options | None = None
_tiers: Sequence[ckpt.Tier] = ()


def _options_if_enabled() -> tuple[bool, ckpt.Options | None, Sequence[ckpt.Tier]]:
    return _enabled, _options, _tiers


def enable(options: ckpt.Options | None = None, tiers: Sequence[ckpt.Tier] = ()) -> None:
    """From now on every engine that `deepspeed.initialize` makes checkpoints lazily. Safe to call again.

    Args:
        options, tiers: for what the section "datastates_ckpt" of the DeepSpeed config does not say.

    Raises:
        ImportError: deepspeed is not installed.
    """
    global _enabled, _options, _tiers
    patch_deepspeed(_options_if_enabled)
    _enabled, _options, _tiers = True, options, tiers


def disable() -> None:
    """Engines made from now on are DeepSpeed's own again; those that were made keep what they have."""
    global _enabled
    _enabled = False


def attach(engine: Any, options: ckpt.Options | None = None, tiers: Sequence[ckpt.Tier] = ()) -> LazyCheckpointEngine:
    """Gives one DeepSpeedEngine, made by `deepspeed.initialize`, lazy checkpoints. All ranks call it.

    Args:
        options, tiers: for what the section "datastates_ckpt" of its config does not say.

    Raises:
        ValueError, TypeError: the section in the config is wrong.
    """
    patch_deepspeed(_options_if_enabled)
    ours = LazyCheckpointEngine(getattr(engine, "_config", None), options, tiers)
    ours.bind(engine)
    if (before := ours_of(engine)) is not None:
        before.cleanup()
    engine.checkpoint_engine = ours
    return ours


def is_attached(engine: Any) -> bool:
    """Whether a DeepSpeedEngine has lazy checkpoints, by enable() or by attach()."""
    return ours_of(engine) is not None


def wait(engine: Any, timeout: float | None = None, *, tier: str | None = None) -> None:
    """Waits until every save_checkpoint() of the engine is durable in its save_dir, and `latest` moved.

    Args:
        timeout: seconds; None waits as long as it takes.
        tier: "node": only until the disks of the nodes have it, or save_dir: that survives the death of all processes.

    Raises:
        DeadlineError: not within `timeout`.
        CheckpointError: one has failed since the last wait(); the newest such error.
        ValueError: there is no such tier.
        TypeError: the engine has no lazy checkpoints.
    """
    ours = ours_of(engine)
    if ours is None:
        raise TypeError(
            "this DeepSpeed engine does not checkpoint lazily: call enable() before deepspeed.initialize, or attach()"
        )
    ours.wait(timeout, tier)
