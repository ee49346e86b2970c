"""Train a small GPT with accelerate, saving its whole state every few iterations, without stopping.

    python examples/train_accelerate.py --directory out/accelerate             # saves as it goes
    python examples/train_accelerate.py --directory out/accelerate --resume    # goes on where it stopped
    torchrun --nproc_per_node 2 examples/train_accelerate.py --directory out/accelerate

Kill it at any moment, or any one of its processes, and resume it: on a CPU it ends in the same weights, bit for bit. All that
this library adds to a training with accelerate is `lazy.enable()`; with --stock accelerate saves by itself, to the same files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from gpt import GPT, Batches, Shape, read_text
from record import digest
from torch import Tensor

import ckpt.integrations.accelerate as lazy


class Progress:
    """How many iterations are done: registered, so that accelerate saves it."""

    def __init__(self) -> None:
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class Training:
    def __init__(self, args: argparse.Namespace) -> None:
        # checkpoints/checkpoint_0, checkpoint_1 and so on, of which the newest three stay.
        project = ProjectConfiguration(str(args.directory), automatic_checkpoint_naming=True, total_limit=3)
        self.accelerator = accelerator = Accelerator(cpu=args.cpu, project_config=project, gradient_accumulation_steps=2)
        torch.manual_seed(args.seed)
        self.model = GPT(Shape(args.layers, args.heads, args.width, args.context, args.dropout))
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=args.iterations)
        self.learner, self.optimizer, self.schedule = accelerator.prepare(self.model, optimizer, schedule)
        ranks, rank = accelerator.num_processes, accelerator.process_index
        self.batches = Batches(read_text(None), args.batch, args.context, args.seed, rank, ranks)
        self.progress = Progress()
        accelerator.register_for_checkpointing(self.batches, self.progress)
        torch.manual_seed(args.seed + rank)  # dropout differs between ranks
        if ranks > 1:
            self.warm_up()

    def warm_up(self) -> None:
        """In its first iteration DistributedDataParallel sums gradients in another order than later, and so rounds them
        differently. A resumed run has a first iteration in the middle: to be bit for bit the same, let it be this one."""
        nothing = torch.zeros(1, 1, dtype=torch.long, device=self.accelerator.device)
        self.accelerator.backward(self.learner(nothing, nothing))
        self.optimizer.zero_grad()

    def iterate(self) -> Tensor:
        for _ in range(self.accelerator.gradient_accumulation_steps):
            tokens, targets = self.batches.next(self.accelerator.device)
            with self.accelerator.accumulate(self.learner):
                loss: Tensor = self.learner(tokens, targets)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.learner.parameters(), 1.0)
                self.optimizer.step()  # first waits until the save under way is safe, then moves weights
                self.schedule.step()
                self.optimizer.zero_grad()
        self.progress.done += 1
        return loss.detach()

    def resume(self) -> None:
        self.accelerator.load_state()  # the highest number that is good
        newest = max(int(path.name.rpartition("_")[2]) for path in self.checkpoints.glob("checkpoint_*"))
        self.accelerator.project_configuration.iteration = newest + 1

    @property
    def checkpoints(self) -> Path:
        return Path(self.accelerator.project_dir, "checkpoints")

    def digest(self) -> str:
        parts: tuple[Any, ...] = (self.model, self.optimizer, self.schedule, self.batches)
        return digest([*(part.state_dict() for part in parts), torch.get_rng_state()])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small GPT with accelerate, checkpointed as often as you like.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--directory", type=Path, default=Path("out/accelerate"), help="accelerate's project_dir")
    add("--stock", action="store_true", help="let accelerate save by itself")
    add("--save-every", type=int, default=1, help="iterations between two saves")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--iterations", type=int, default=50, help="where training ends, resumed or not")
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=256)
    add("--context", type=int, default=64, help="tokens (bytes) in a window")
    add("--batch", type=int, default=8, help="windows in a batch, on each rank")
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=1)
    add("--threads", type=int, help="CPU threads (default: as torch likes)")
    add("--cpu", action="store_true", help="even where there is a GPU")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not args.stock:
        lazy.enable()
    training = Training(args)
    accelerator, progress = training.accelerator, training.progress
    if any(training.checkpoints.glob("checkpoint_*")):
        if not args.resume:
            raise SystemExit(f"{training.checkpoints} is not empty: add --resume, or name another --directory")
        training.resume()
        accelerator.print(f"resumed at iteration {progress.done}")
    while progress.done < args.iterations:
        loss = training.iterate()
        if progress.done % args.save_every == 0:
            accelerator.save_state()
        accelerator.print(f"iteration {progress.done}: loss {loss.item():.3f}", flush=True)
    final = training.digest()
    accelerator.end_training()  # all is durable
    accelerator.print(f"final state: sha256 {final}")


if __name__ == "__main__":
    main()
