"""Train a small GPT-2 with the Trainer of transformers, saving all of it at each step. Nothing is downloaded.

    python examples/train_transformers.py --directory out/hf             # saves every step
    python examples/train_transformers.py --directory out/hf --resume    # goes on where it stopped

The same on several processes, which must see the same directory:

    torchrun --nproc_per_node 2 examples/train_transformers.py --directory out/hf

Kill it at any moment and resume it: on a CPU it ends in the same weights, bit for bit. What that takes is one word:
LazyTrainer. To compare, `--stock` trains with Trainer itself; each resumes what the other has saved.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from gpt import VOCABULARY, read_text
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ckpt.integrations.transformers import LazyTrainer


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Of a text, byte by byte."""

    def __init__(self, text: bytes, context: int) -> None:
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._context = context

    def __len__(self) -> int:
        return len(self._text) // self._context

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self._text[index * self._context : (index + 1) * self._context]
        return {"input_ids": window, "labels": window}


def make_trainer(args: argparse.Namespace) -> Any:
    torch.manual_seed(args.seed)
    shape = {"n_positions": args.context, "n_embd": args.width, "n_layer": args.layers, "n_head": args.heads}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **shape))
    arguments = TrainingArguments(
        output_dir=str(args.directory),
        max_steps=args.steps,
        save_steps=args.save_every,
        save_total_limit=3,
        logging_steps=10,
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        seed=args.seed,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    kind = Trainer if args.stock else LazyTrainer
    return kind(model=model, args=arguments, train_dataset=Windows(read_text(args.text), args.context))


def digest(model: torch.nn.Module) -> str:
    """Of all weights: two models with the same one are the same, bit for bit."""
    whole = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        whole.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint, if there is one")
    parser.add_argument("--stock", action="store_true", help="save with the Trainer of transformers itself")
    parser.add_argument("--text", type=Path, help="a file to learn from; default: Python's own documentation")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=1, help="steps")
    for name, value in {"layers": 4, "heads": 4, "width": 256, "context": 64, "batch": 8, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    args = parse()
    trainer = make_trainer(args)
    there = args.resume and any(args.directory.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=there or None)
    if trainer.is_world_process_zero():
        print(f"{trainer.state.global_step} steps, weights {digest(trainer.model)}")


if __name__ == "__main__":
    main()
