"""Train a small GPT with Lightning, saving all that its training needs at each step.

    python examples/train_lightning.py --directory out/lightning             # saves every step
    python examples/train_lightning.py --directory out/lightning --resume    # goes on where it stopped

The same on several processes, which must see the same directory:

    torchrun --nproc_per_node 2 examples/train_lightning.py --directory out/lightning

Kill it at any moment and resume it: on a CPU it ends in the same weights, bit for bit (on several processes with --dropout 0).
What that takes is one plugin, `LazyCheckpointIO()`, and a module that says where it is in its data and its random numbers:
Lightning does not save that. To compare, `--stock` saves as Lightning does; each resumes what the other has saved.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, Batches, Shape, read_text
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from record import digest
from torch import Tensor

from ckpt.integrations.lightning import LazyCheckpointIO


class Learner(LightningModule):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        torch.manual_seed(args.seed)
        self.model = GPT(Shape(args.layers, args.heads, args.width, args.context, args.dropout))
        self._args = args
        self._batches: Batches | None = None

    def setup(self, stage: str) -> None:
        args, trainer = self._args, self.trainer
        torch.manual_seed(args.seed + trainer.global_rank)  # dropout differs between ranks
        self._batches = Batches(
            read_text(args.text), args.batch, args.context, args.seed, trainer.global_rank, trainer.world_size
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self._batches is not None
        tokens, targets = self._batches.next(self.device)
        loss: Tensor = self.model(tokens, targets)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self._args.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self._args.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rank 0 alone saves; the others draw no random numbers here but for dropout, which --dropout 0 switches off."""
        assert self._batches is not None
        checkpoint["where"] = {"batches": self._batches.state_dict(), "rng": torch.get_rng_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self._batches is not None
        self._batches.load_state_dict(checkpoint["where"]["batches"])
        self._rng = checkpoint["where"]["rng"]

    def on_train_start(self) -> None:
        if getattr(self, "_rng", None) is not None and self.trainer.world_size == 1:
            torch.set_rng_state(self._rng)


def make_trainer(args: argparse.Namespace) -> Trainer:
    keep = ModelCheckpoint(
        args.directory, monitor="step", mode="max", save_top_k=2, save_last="link", every_n_train_steps=args.save_every
    )
    return Trainer(
        accelerator=args.device,
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        max_steps=args.steps,
        plugins=[] if args.stock else [LazyCheckpointIO()],
        callbacks=[keep],
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=not args.quiet,
        enable_model_summary=False,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument("--stock", action="store_true", help="save as Lightning itself does")
    parser.add_argument("--text", type=Path, help="a file to learn from; default: Python's own documentation")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=1, help="steps")
    for name, value in {"layers": 4, "heads": 4, "width": 256, "context": 64, "batch": 8, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu", help="accelerator of the Trainer")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> None:
    args = parse()
    learner, trainer = Learner(args), make_trainer(args)
    steps = torch.utils.data.DataLoader(range(args.steps), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(learner, steps, ckpt_path="last" if args.resume else None)
    if trainer.is_global_zero:
        print(f"{trainer.global_step} steps, sha256 {digest(learner.state_dict())}")


if __name__ == "__main__":
    main()
