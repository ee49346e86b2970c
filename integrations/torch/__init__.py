"""Checkpoints for a plain PyTorch loop, the same on one process and under DistributedDataParallel.

    from ckpt.integrations.torch import CheckpointCallback

    with CheckpointCallback("checkpoints", model=model, optimizer=optimizer, scheduler=scheduler, data=sampler) as callback:
        start = callback.resume()  # steps done; 0 if there is nothing to resume
        for step in range(start, steps):
            ...
            optimizer.step()
            scheduler.step()
            callback.step(step + 1)  # last in the iteration: what has happened by now is what is saved

A run that was killed and goes on from resume() computes what it would have computed, bit for bit, if its operations are
deterministic and all that changes is among what the callback was given. With more than two ranks, DistributedDataParallel sums
gradients in another order in the first iteration of a process: run one forward and backward, and drop it, before resume().

* **Gradient accumulation** needs nothing: call step() once after each optimizer step, never between two backwards.
* **Data.** A DataLoader draws from torch's global generator whenever an iterator is made of it, which a resumed run does once
  more: give it a `generator=` of its own. `data=` takes samplers of torch (DistributedSampler, RandomSampler, ...): they learn
  to go on in the middle of an epoch, behind the batches that training has got, however many workers have fetched ahead. Begin
  the loop at `sampler.epoch` after resume(). Also StatefulDataLoader of torchdata, and whatever has state_dict() and
  load_state_dict().
* **Weights that something other than an optimizer's step changes** (EMA copies, target networks) are copied inside save().
  Whatever changes parameters of a given optimizer outside its step() must call `ckpt.fence()` before.
* **SIGTERM.** CheckpointCallback(preemption=True) saves and ends; beside a plain `ckpt.Checkpointer`, `Preemption` does.
"""

from .callback import CheckpointCallback
from .preemption import Preempted, Preemption
from .when_to_save import Auto

__all__ = ["Auto", "CheckpointCallback", "Preempted", "Preemption"]
