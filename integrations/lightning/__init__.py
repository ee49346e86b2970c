"""Lazy checkpoints for Lightning, of both `lightning` and `pytorch_lightning`: one plugin, and nothing else changes.

    from ckpt.integrations.lightning import LazyCheckpointIO

    trainer = Trainer(plugins=[LazyCheckpointIO()], callbacks=[ModelCheckpoint(every_n_train_steps=10)])

Checkpoints are the files, or directories, that Lightning itself writes, under the same names; it resumes from them without this
library. What differs:

* A save returns in milliseconds. Weights and optimizer states leave in the background until the next step of an optimizer,
  which waits for what has not left yet. All else is copied at once: buffers, averaged weights, states of callbacks.
* A checkpoint has its name when it is durable. ModelCheckpoint removes an older one, and moves its link, only then: while the
  newest is under way, or if it fails, the one before is there.
* fit() waits at its end for all of them. Whatever is saved outside of fit() is durable when the call returns. In the middle of
  fit(), whoever looks at a file that was just saved calls `wait()` of the plugin before.
* A save that fails does not stop the training: it is logged, and `Options.max_failed_saves` in a row raise. If the newest has
  failed, the end of fit() raises.
* What is loaded is compared with its checksums.
* With ModelParallelStrategy, and FSDPStrategy(state_dict_type="sharded"), all ranks save their parts, and the directory gets
  its name when all of them, and `meta.pt`, are durable. A checkpoint that had the name is there until then.
* With automatic optimization the closure that Lightning gives to an optimizer of torch.optim is called before its step, not
  inside of it: else nothing could leave while forward and backward run. LBFGS, and optimizers of others unless they are named
  by `closure_first=`, are left as they are.
* What writes to weights outside of an optimizer's step must call `ckpt.fence()` before, as a hook that clamps them.
  WeightAveraging, StochasticWeightAveraging and loads are fenced.

URLs of other places than local file systems are left to Lightning. `Fabric(plugins=[...])` takes it, too: fabric.save() is
lazy, and `wait()` of the plugin raises what went wrong.
"""

from .checkpoint_io import LazyCheckpointIO

__all__ = ["LazyCheckpointIO"]
