"""Train a small GPT, saving everything that training needs, as often as you like.

    python examples/train_gpt.py --directory out/run             # saves every iteration
    python examples/train_gpt.py --directory out/run --resume    # goes on where it stopped

Kill it at any moment and resume it: on a CPU it ends in the same weights, bit for bit. What that
takes is in three places: `Training.state_dict` (what to save), `train` (when) and `LazySaver` in
savers.py (how: one ckpt.Checkpointer; its restore, save and close). To compare, `--engine torch`
saves with torch.save and fsync instead, and `--engine none` never.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import random
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, Batches, Shape, read_text
from savers import SAVERS, Saver, State
from torch import Tensor, nn
from tqdm import tqdm

try:
    import numpy as np
except ImportError:  # torch works without it, and so does this program
    np = None  # type: ignore[assignment]


class Training:
    """All that changes while a model learns: one `step`, and one state to save and to load."""

    def __init__(self, args: argparse.Namespace) -> None:
        random.seed(args.seed)
        torch.manual_seed(args.seed)
        if np is not None:
            np.random.seed(args.seed)
        self.device = torch.device(args.device)
        shape = Shape(args.layers, args.heads, args.width, args.context, args.dropout)
        self.model = GPT(shape).to(self.device)
        self.optimizer = torch.optim.AdamW(decay_groups(self.model), lr=args.lr, fused=True)
        warmup, last = args.warmup, args.iterations
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, warmup, last))
        self.batches = Batches(read_text(args.text), args.batch, args.context, args.seed)

    def forward_backward(self) -> Tensor:
        tokens, targets = self.batches.next(self.device)
        loss: Tensor = self.model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()  # first waits until the save under way is safe, then moves weights
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> State:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "rng": rng_state(self.device),
        }

    def load_state_dict(self, state: State) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load_state_dict(state["batches"])
        set_rng_state(state["rng"], self.device)


def decay_groups(model: nn.Module) -> list[State]:
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


def rng_state(device: torch.device) -> State:
    """Every random stream, as tensors and plain numbers: these load with weights_only=True."""
    state: State = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if np is not None:
        name, key, *rest = tuple(np.random.get_state())
        state["numpy"] = (name, np.asarray(key).tolist(), *rest)
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: State, device: torch.device) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if np is not None and "numpy" in state:
        np.random.set_state(state["numpy"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


class Log:
    """One JSON line per event, flushed at once: what is in it has happened."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("w") if path is not None else None

    def write(self, event: str, **fields: Any) -> None:
        if self._file is not None:
            print(json.dumps({"event": event, **fields}), file=self._file, flush=True)


def train(args: argparse.Namespace, training: Training, saver: Saver, log: Log) -> None:
    found = saver.restore() if args.resume else None
    if found is not None:
        training.load_state_dict(found[1])
    done = found[0] if found is not None else 0
    parameters = sum(p.numel() for p in training.model.parameters())
    log.write("start", engine=args.engine, resumed_from=done, parameters=parameters)
    name = f"{args.engine} (resumed at {done})" if done else args.engine
    steps = range(done + 1, args.iterations + 1)
    bar = tqdm(steps, desc=name, initial=done, total=args.iterations, disable=None)
    with closing(saver), bar:
        ended_at = time.monotonic()
        for step in bar:
            record = iteration(args, training, saver, step, started_at=ended_at)
            ended_at = record["ended_at"]
            log.write("iteration", **record)
            log_finished(saver, log)
            blocked = f"{1e3 * record['blocked_s']:.1f}ms"
            bar.set_postfix(loss=f"{record['loss']:.3f}", blocked=blocked)
    log_finished(saver, log)


def log_finished(saver: Saver, log: Log) -> None:
    for save in saver.finished():
        log.write("save", **save)


def iteration(args: argparse.Namespace, training: Training, saver: Saver, step: int, started_at: float) -> State:
    loss = training.forward_backward()
    backward_at = time.monotonic()
    training.update()
    fence_s = saver.take_fence_s()
    updated_at = time.monotonic()
    due = step % args.save_every == 0 or step == args.iterations
    if due and args.engine != "none":  # the reference does not even gather the state
        saver.save(step, training.state_dict())
    saved_at = time.monotonic()
    value = float(loss)
    ended_at = time.monotonic()
    return {
        "step": step,
        "loss": value,
        "loss_hex": value.hex(),
        "seconds": ended_at - started_at,
        "blocked_s": fence_s + saved_at - updated_at,
        "fence_s": fence_s,
        "started_at": started_at,
        "backward_at": backward_at,
        "updated_at": updated_at,
        "saved_at": saved_at,
        "ended_at": ended_at,
    }


def digest(state: Any) -> str:
    """SHA-256 over a whole state: every byte of every tensor, and every number beside them."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            if value.numel():
                sha.update((ctypes.c_char * value.nbytes).from_address(value.data_ptr()))
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                sha.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small GPT on text, checkpointed as often as you like.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--engine", choices=SAVERS, default="lazy", help="how to save")
    add("--directory", type=Path, default=Path("out/checkpoints"), help="where checkpoints go")
    add("--save-every", type=int, default=1, help="iterations between two saves")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--iterations", type=int, default=100, help="where training ends, resumed or not")
    add("--text", type=Path, help="a text to learn (default: Python's own documentation)")
    add("--log", type=Path, help="write one JSON line per event here")
    add("--final", type=Path, help="save the final model here, with torch.save")
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=8)
    add("--width", type=int, default=512)
    add("--context", type=int, default=128, help="tokens (bytes) in a window")
    add("--batch", type=int, default=8, help="windows in a batch")
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=1e-3)
    add("--warmup", type=int, default=5, help="iterations until the full learning rate")
    add("--seed", type=int, default=1)
    add("--threads", type=int, help="CPU threads (default: as torch likes)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.engine != "none" and not args.resume and any(args.directory.glob("*")):
        raise SystemExit(f"{args.directory} is not empty: add --resume, or name another --directory")
    log, training = Log(args.log), Training(args)
    train(args, training, SAVERS[args.engine](args.directory), log)
    final = digest(training.state_dict())
    log.write("end", digest=final)
    print(f"final state: sha256 {final}")
    if args.final is not None:
        torch.save(training.model.state_dict(), args.final)


if __name__ == "__main__":
    main()
