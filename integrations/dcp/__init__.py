"""torch.distributed.checkpoint (DCP), saved lazily and durably, and read with every byte verified.

    from ckpt.integrations import dcp

    response = dcp.async_save({"model": model, "optimizer": optimizer}, checkpoint_id="checkpoints/1000")
    ...                                   # train on: the next step of an optimizer waits for what has not left yet
    response.upload_completion.result()   # durable on all ranks; or raises what went wrong on any of them

    dcp.load(state, checkpoint_id="checkpoints/1000")

`save`, `async_save` and `load` have the signatures of torch.distributed.checkpoint, and whatever reads its checkpoints reads
these, without this library. What differs:

* No collective is called for a save, neither inside the call nor behind it. The ranks agree by the store of torch.distributed.
  So async_save() may be called beside a training that uses the same process group.
* Nothing of what an optimizer's step writes is copied, but what has not left when the step comes. All else is copied at once.
* A save is durable, all of it, before readers find it. An id that is saved again is the former checkpoint until then. Its files
  have other names each time, and the former ones are removed.
* What went wrong on any rank is raised on all.
* Saves to one id come one after the other, and a load of it comes after those that were begun.
* Saves go straight to the directory that is named. By way of the disks of nodes goes `ckpt.Checkpointer(tiers=)`, whose
  `save(sharded=)` leaves the same files.

What this does not do is left to torch, with `LazyStorageWriter` where that fits, and the log says so once: a planner, a writer
or a stager of the caller's; ShardedTensors, and tensors that make their own write items; states whose keys or values differ
between ranks; DTensors on a mesh of other ranks than those that save; `use_collectives=False`; ids that are no paths of a file
system. torch plans those by collectives, for async_save() in a thread of its own and on a process group of its own.

The parts, for those who call torch.distributed.checkpoint themselves:

    dcp.save(state, storage_writer=LazyStorageWriter(path))
    dcp.async_save(state, storage_writer=LazyStorageWriter(path), async_stager=LazyStager(), process_group=group)
    dcp.load(state, storage_reader=VerifyingStorageReader(path))

**Give async_save() of torch a process group of its own**, made by `torch.distributed.new_group(backend="gloo")` and used for
nothing else: its thread calls collectives, which meet those of the training on the same group, and both wait for ever.
"""

from typing import Any

import torch.distributed.checkpoint as _stock

from .calls import async_save, load, save
from .reader import VerifyingStorageReader
from .sessions import close, configure
from .stager import LazyStager
from .writer import LazyStorageWriter

__all__ = [
    "LazyStager",
    "LazyStorageWriter",
    "VerifyingStorageReader",
    "async_save",
    "close",
    "configure",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    """All else that torch.distributed.checkpoint has: FileSystemReader, planners, metadata."""
    try:
        return getattr(_stock, name)
    except AttributeError:
        raise AttributeError(f"neither {__name__} nor torch.distributed.checkpoint has '{name}'") from None
