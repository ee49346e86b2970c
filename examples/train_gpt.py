"""Train a small GPT, saving everything that training needs, as often as you like.

    python examples/train_gpt.py --directory out/run             # saves every iteration
    python examples/train_gpt.py --directory out/run --resume    # goes on where it stopped

The same on several processes, which must see the same directory:

    torchrun --nproc_per_node 2 examples/train_gpt.py --directory out/run
    mpirun -n 2 python examples/train_gpt.py --directory out/run

With --fsdp each of them holds a part of the model and of its optimizer, and saves that. Any number of processes may resume; to
learn from the same windows as two with --batch 8, one takes --batch 16:

    torchrun --nproc_per_node 2 examples/train_gpt.py --directory out/run --fsdp
    python examples/train_gpt.py --directory out/run --fsdp --resume --batch 16

Kill it at any moment, or any one of its processes, and resume it: on a CPU it ends in the same weights, bit for bit. What that
takes is in `train`: make a CheckpointCallback, resume() before the loop, step() in it. To compare, `--engine torch` saves with
torch.save and fsync instead, and `--engine none` never.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import launch
import torch
from gpt import GPT, Batches, Shape, read_text
from record import Log, digest, whole
from savers import NoSaving, TorchSaving, rng_state
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import ckpt
from ckpt.integrations.torch import CheckpointCallback

CALLBACKS: dict[str, Any] = {"lazy": CheckpointCallback, "torch": TorchSaving, "none": NoSaving}


class Training:
    """All that changes while a model learns."""

    def __init__(self, args: argparse.Namespace, place: launch.Place) -> None:
        self.device = torch.device(args.device)
        if args.device == "cuda":
            self.device = torch.device("cuda", place.local_rank)
        torch.manual_seed(args.seed)
        shape = Shape(args.layers, args.heads, args.width, args.context, args.dropout)
        self.model = self.learner = GPT(shape).to(self.device)
        torch.manual_seed(args.seed + place.rank)  # dropout differs between ranks
        if args.fsdp:
            shard(self.model, self.device.type, place.ranks)
        elif place.ranks > 1:
            self.learner = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(decay_groups(self.model), lr=args.lr, fused=True)
        warmup, last = args.warmup, args.iterations
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, warmup, last))
        self.batches = Batches(read_text(args.text), args.batch, args.context, args.seed, place.rank, place.ranks)
        if self.learner is not self.model:
            self.warm_up()

    def warm_up(self) -> None:
        """In its first iteration DistributedDataParallel sums gradients in another order than later, and so rounds them
        differently. A resumed run has a first iteration in the middle: to be bit for bit the same, let it be this one."""
        nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.learner(nothing, nothing).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def forward_backward(self) -> Tensor:
        tokens, targets = self.batches.next(self.device)
        loss: Tensor = self.learner(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()  # first waits until the save under way is safe, then moves weights
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


def shard(model: GPT, device: str, ranks: int) -> None:
    """Makes each parameter a DTensor, of which each rank holds a part."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (ranks,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def lr_factor(step: int, warmup: int, last: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, last - warmup))
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))


def train(args: argparse.Namespace, training: Training, log: Log, quiet: bool) -> None:
    more = {} if args.node_tier is None else {"tiers": [ckpt.Tier.node(args.node_tier, rate=args.home_rate)]}
    with CALLBACKS[args.engine](
        args.directory,
        model=training.model,
        optimizer=training.optimizer,
        scheduler=training.schedule,
        data=training.batches,
        every=args.save_every,
        **more,
    ) as callback:
        done = callback.resume() if args.resume else 0  # after it, random numbers are where they were, too
        parameters = sum(p.numel() for p in training.model.parameters())
        log.begin(engine=args.engine, resumed_from=done, parameters=parameters)
        name = f"{args.engine} (resumed at {done})" if done else args.engine
        steps = range(done + 1, args.iterations + 1)
        bar = tqdm(steps, desc=name, initial=done, total=args.iterations, disable=quiet or None)
        for step in bar:
            loss = training.forward_backward()
            log.mark("backward_at")
            training.update()
            log.mark("updated_at")
            pending = callback.save(step) if step == args.iterations else callback.step(step)
            log.mark("saved_at")
            blocked_s = log.end_iteration(step, loss.item(), pending)
            bar.set_postfix(loss=f"{loss:.3f}", blocked=f"{1e3 * blocked_s:.1f}ms")
    log.write_saves()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small GPT on text, checkpointed as often as you like.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--engine", choices=CALLBACKS, default="lazy", help="how to save")
    add("--directory", type=Path, default=Path("out/checkpoints"), help="where checkpoints go")
    add("--node-tier", type=Path, help="a directory on a disk of each node: saves land there first, and are carried on")
    add("--home-rate", default="auto", help="bytes a second that leave it for --directory, such as 200MB")
    add("--save-every", type=int, default=1, help="iterations between two saves")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--iterations", type=int, default=100, help="where training ends, resumed or not")
    add("--text", type=Path, help="a text to learn (default: Python's own documentation)")
    add("--events", type=Path, help="write one JSON line per event here")
    add("--final", type=Path, help="save the final model here, with torch.save")
    add("--fsdp", action="store_true", help="shard model and optimizer over the processes")
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=8)
    add("--width", type=int, default=512)
    add("--context", type=int, default=128, help="tokens (bytes) in a window")
    add("--batch", type=int, default=8, help="windows in a batch, on each rank")
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=5, help="iterations until the full learning rate")
    add("--seed", type=int, default=1)
    add("--threads", type=int, help="CPU threads (default: as torch likes)")
    add("--device", default="cpu", help="cpu, or cuda (on each rank the GPU of its number), cuda:1, ...")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.engine != "none" and not args.resume and any(args.directory.glob("*")):
        raise SystemExit(f"{args.directory} is not empty: add --resume, or name another --directory")
    if args.engine != "lazy" and args.node_tier is not None:
        raise SystemExit("--node-tier is for --engine lazy")
    if args.engine == "torch" and args.fsdp:
        raise SystemExit("--engine torch saves what one process has: it is not for --fsdp")
    place = launch.join("gloo" if args.device == "cpu" else "nccl", also_alone=args.fsdp)
    if args.engine == "torch" and place.ranks > 1:
        raise SystemExit("--engine torch is for one process")
    training, log = Training(args, place), Log(args.events if place.rank == 0 else None)
    train(args, training, log, quiet=place.rank != 0)
    parts = [training.model, training.optimizer, training.schedule, training.batches]
    final = digest([*(part.state_dict() for part in parts), rng_state()])  # on all ranks: of what is sharded each has a part
    weights = {name: whole(tensor) for name, tensor in training.model.state_dict().items()}
    if place.rank == 0:
        log.write("end", digest=final)
        print(f"final state: sha256 {final}")
        if args.final is not None:
            torch.save(weights, args.final)
    launch.leave()


if __name__ == "__main__":
    main()
