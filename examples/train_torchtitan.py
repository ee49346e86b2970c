"""Train a small GPT in a loop like torchtitan's, with the checkpoint manager that its config would select.

    torchrun --nproc_per_node 1 examples/train_torchtitan.py --directory out/torchtitan             # saves every step
    torchrun --nproc_per_node 1 examples/train_torchtitan.py --directory out/torchtitan --resume    # goes on where it stopped

With more processes the model is sharded (fully_shard), and each writes its part. Kill it at any moment and resume it: on a CPU
it ends in the same weights, bit for bit. To compare, `--stock` saves with torchtitan's own CheckpointManager; each resumes what
the other has saved. A job of torchtitan needs nothing of this but `checkpoint=LazyCheckpointManager.Config(...)` in the config
of its trainer.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT, Batches, Shape, read_text
from record import digest
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torchtitan.components.checkpointer import CheckpointManager

from ckpt.integrations.torchtitan import LazyCheckpointManager

BY_NAMES = StateDictOptions(flatten_optimizer_state_dict=True)


class Optimizers:
    """Its state goes by the names of the parameters, as that of torchtitan's container, so that it may be sharded."""

    def __init__(self, model: GPT, lr: float) -> None:
        self.model, self.inner = model, torch.optim.AdamW(model.parameters(), lr=lr)

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.inner, options=BY_NAMES)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.inner, state, options=BY_NAMES)


class Loader:
    """Says of this rank alone where it is in its data, and in its random numbers."""

    def __init__(self, batches: Batches, rank: int) -> None:
        self.batches, self._name = batches, f"dp_rank_{rank}"

    def state_dict(self) -> dict[str, Any]:
        return {self._name: pickle.dumps({"batches": self.batches.state_dict(), "rng": torch.get_rng_state()})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        where = pickle.loads(state[self._name])
        self.batches.load_state_dict(where["batches"])
        torch.set_rng_state(where["rng"])


class Training:
    def __init__(self, args: argparse.Namespace) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(args.seed)
        self.model = GPT(Shape(args.layers, args.heads, args.width, args.context, args.dropout))
        if ranks > 1:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model, mesh=dist.init_device_mesh("cpu", (ranks,)))
        torch.manual_seed(args.seed + rank)  # dropout differs between ranks
        self.batches = Batches(read_text(None), args.batch, args.context, args.seed, rank, ranks)
        self.optimizers, self.step = Optimizers(self.model, args.lr), 0
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizers.inner, args.steps)
        config = (CheckpointManager if args.stock else LazyCheckpointManager).Config(
            enable=True, interval=args.save_every, keep_latest_k=3, last_save_model_only=False
        )
        self.checkpointer = config.build(
            dataloader=Loader(self.batches, rank),
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedule,
            states={"train_state": self},
            sd_adapter=None,
            base_folder=str(args.directory),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]

    def iterate(self) -> float:
        tokens, targets = self.batches.next(torch.device("cpu"))
        loss = self.model(tokens, targets)
        loss.backward()
        self.checkpointer.maybe_wait_for_staging()  # as torchtitan's trainer does, just before the optimizers step
        self.optimizers.inner.step()
        self.optimizers.inner.zero_grad()
        self.schedule.step()
        return float(loss.detach())

    def digest(self) -> str:
        return digest([self.model.state_dict(), self.optimizers.state_dict()])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="the steps are in its `checkpoint`")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    parser.add_argument("--stock", action="store_true", help="save as torchtitan itself does")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=1, help="steps")
    for name, value in {"layers": 4, "heads": 4, "width": 256, "context": 64, "batch": 8, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    args = parse()
    dist.init_process_group("gloo")
    training = Training(args)
    if args.resume:
        training.checkpointer.load(step=-1)
    elif (args.directory / "checkpoint").exists():
        raise SystemExit(f"{args.directory} is not empty: add --resume, or name another --directory")
    while training.step < args.steps:
        training.step += 1
        loss = training.iterate()
        training.checkpointer.save(training.step, last_step=training.step == args.steps)
        if dist.get_rank() == 0:
            print(f"step {training.step}: loss {loss:.3f}", flush=True)
    final = training.digest()
    training.checkpointer.close()  # all is durable
    if dist.get_rank() == 0:
        print(f"{training.step} steps, sha256 {final}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
