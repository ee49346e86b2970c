"""Lazy asynchronous checkpoints for the Trainer of transformers.

    from ckpt.integrations.transformers import LazyTrainer

    trainer = LazyTrainer(model=model, args=arguments, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=True)

or, for a Trainer of one's own or of another library, `class Mine(LazyCheckpointMixin, SomeTrainer)`. TrainingArguments stay as
they are, and so do the files and their names: a Trainer of transformers resumes from what this one has saved, and the other way
round. `checkpoint_options=ckpt.Options(...)` says how saves are made.

* A save copies no parameters and no optimizer state. They are written in the background until the next optimizer step, which
  waits for what has not left yet. All else (buffers, frozen parameters, scheduler, scaler, random number generators, the state
  of the Trainer and of callbacks) is captured before training goes on.
* `checkpoint-N` gets its name when the files of all ranks are durable. So get_last_checkpoint() and
  `resume_from_checkpoint=True` meet whole checkpoints only. Until then it is a hidden directory beside it.
* Checksums of the files that leave in the background stand in `manifest.json`. train() verifies what it resumes from. `True`
  takes the newest checkpoint that is good, and logs which ones it leaves out.
* `save_total_limit` removes old checkpoints when the new one is durable, and nothing if its save has failed.
* train() returns when all is durable. Whatever looks at a checkpoint as soon as it is saved makes the Trainer wait for it: an
  upload (`push_to_hub`, unless `hub_strategy="end"`), `load_best_model_at_end`, `enable_jit_checkpoint`, a callback that has
  on_save(), and a class that overrides _save_checkpoint(). A callback that does not look there says so: `reads_checkpoints =
  False`. Those of transformers are known: for example that of Weights & Biases looks only where it uploads checkpoints.
* A method that writes files, and that a class of yours overrides (save_model(), _save(), _save_rng_state() and their like),
  finds them there behind super(), and may read, remove or rewrite them. So they are written while training waits, unless the
  class says `reads_checkpoints = False`, too.
* A save that fails does not stop the training. It is logged, `Options.max_failed_saves` in a row raise FailedSavesError at the
  next save, and train() raises at its end if the newest one has failed.
* save_model(), save_state() and push_to_hub(), called by the user, write as ever, and the files are there when they return.
* What writes to parameters outside an optimizer's step (a callback that swaps weights, a captured CUDA graph) must call
  `ckpt.fence()` before. The save fails otherwise, and names the tensor.

The rules that the Trainer follows were taken from transformers 5.24 (trainer.py, trainer_utils.py).
docs/guides/transformers.md says more.
"""

from .trainer import LazyCheckpointMixin, LazyTrainer

__all__ = ["LazyCheckpointMixin", "LazyTrainer"]
