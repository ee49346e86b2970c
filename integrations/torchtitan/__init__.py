"""A checkpoint manager for torchtitan that saves lazily. It is selected in the config of the trainer:

    from ckpt.integrations.torchtitan import LazyCheckpointManager

    config = Trainer.Config(
        checkpoint=LazyCheckpointManager.Config(enable=True, interval=10, keep_latest_k=3),
        ...
    )

The other fields are those of torchtitan's CheckpointManager, and so are the directories: `step-N`, which torchtitan itself
loads, as this manager loads what torchtitan has saved. What differs:

* `async_mode` is "async" by default: a save returns in milliseconds, and parameters and optimizer states leave in the
  background until the next step of the optimizer, which waits for what has not left yet. Nothing is copied before, neither to
  pinned memory nor to another process: "async_with_pinned_mem" means the same. With "disabled" each save is durable when it
  returns.
* A save is durable on all ranks before readers find it. One that fails is logged, and `max_failed_saves` in a row raise; stock
  torchtitan ends the training with the next save. close() waits for all, and raises if the newest has failed.
* `keep_latest_k` counts checkpoints that are complete, and older ones are removed when a newer one is durable.
* What is loaded is compared with its checksums.
* The states of the data loaders are exchanged between the ranks in each save, by a process group for that alone, so that all
  ranks save the same keys. With pipelines they cannot, and torch plans the save, by collectives in a thread of its own.

The last checkpoint, exports to Hugging Face's format, and initial loads from it, are torchtitan's own, as are remote folders.
"""

from .manager import LazyCheckpointManager

__all__ = ["LazyCheckpointManager"]
