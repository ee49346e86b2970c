"""Saves what FSDP2 shards to files of each rank, by accelerate alone and by this library, and leaves what a rank has written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from dist.accelerate_training import PATIENCE, SMALL, Training, feed

import ckpt
import ckpt.integrations.accelerate as lazy


def main(plan: dict[str, Any]) -> None:
    """
    Args:
        plan: "directory", "outcomes".
    """
    torch.set_num_threads(1)
    root = Path(plan["directory"])
    training = Training("fsdp2-by-rank", root, numbered=False, limit=None)
    training.advance(training.batches())
    training.accelerator.save_state(str(root / "stock"))
    lazy.enable(ckpt.Options(**SMALL, **PATIENCE))
    training.accelerator.save_state(str(root / "ours"))
    assert lazy._saves is not None
    stats = lazy._saves._newest[root / "ours"].stats
    lazy.wait()
    training.accelerator.wait_for_everyone()
    rank = training.accelerator.process_index
    outcome = {
        "names": names(root / "ours"),
        "stock_names": names(root / "stock"),
        "digests": digests(root / "ours", rank),
        "stock_digests": digests(root / "stock", rank),
        "bytes": stats.bytes_total,
        "bytes_copied": stats.bytes_copied_in_save,
    }
    Path(plan["outcomes"], f"outcome.{rank}.json").write_text(json.dumps(outcome))
    training.accelerator.end_training()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name not in ("manifest.json", ".lock"))


def digests(directory: Path, rank: int) -> dict[str, str]:
    """Of what this rank has written, as its loads see it."""
    found = {}
    for path in sorted(directory.glob(f"*_rank{rank}.bin")):
        whole = hashlib.blake2b(digest_size=16)
        state = torch.load(path, weights_only=True)
        feed(whole, state)
        whole.update(repr(described(state)).encode())
        found[path.name] = whole.hexdigest()
    return found


def described(value: Any) -> Any:
    """Where each part of a tensor belongs, and what is no tensor."""
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return type(value).__name__, value.shape, value.dtype, getattr(value, "placements", None)
    return [described(item) for item in value] if isinstance(value, (list, tuple)) else value
