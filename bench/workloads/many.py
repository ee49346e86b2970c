"""What save() costs its caller when a state has many tensors."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ckpt
from bench.measure.report import Bar, Report
from bench.measure.sampling import Sample, Settings, Side, Values, clock, column, interleave
from bench.workloads.training import bytes_of

TENSORS = 10_000
PER_PARAMETER = 4  # the parameter, two moments, and AdamW's step
HOW_CKPT = "clock around save(); the fence and the flush come later, outside of it"
HOW_FILE = "clock around torch.save to a file: no flush, no fsync"
HOW_MEMORY = "clock around torch.save to an io.BytesIO"


def make_state(tensors: int, width: int) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """Weights of `width` x `width` and biases, stepped once by AdamW, so that it has its state."""
    layers = max(1, tensors // PER_PARAMETER // 2)
    model = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    return optimizer, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def count_tensors(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return 1
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(map(count_tensors, children))


def ckpt_save(state: Any, path: Path) -> Values:
    started = clock()
    pending = ckpt.save(state, path)
    save_s = clock() - started
    pending.result()
    path.unlink()
    return {"save_s": save_s, "durable_s": clock() - started, "file_bytes": float(pending.stats.bytes_total)}


def torch_save(state: Any, path: Path) -> Values:
    started = clock()
    torch.save(state, path)
    save_s = clock() - started
    path.unlink()
    return {"save_s": save_s}


def torch_save_to_memory(state: Any) -> Values:
    started = clock()
    torch.save(state, io.BytesIO())
    return {"save_s": clock() - started}


def measure_many(settings: Settings, report: Report) -> None:
    tensors = max(8 * PER_PARAMETER, settings.sized(TENSORS))
    measure_one(settings, report, "small tensors", tensors, width=16, rounds=settings.rounds_or(15))
    # Weights larger than eager_bytes leave lazily; the biases and steps between them do not.
    measure_one(settings, report, "weights of 100 KiB", tensors, width=160, rounds=settings.rounds_or(7))


def measure_one(settings: Settings, report: Report, title: str, tensors: int, width: int, rounds: int) -> None:
    optimizer, state = make_state(tensors, width)
    with settings.workspace() as directory:
        sides = [
            Side("ckpt.save", partial(ckpt_save, state, directory / "ckpt.pt")),
            Side("torch.save to a file", partial(torch_save, state, directory / "torch.pt")),
            Side("torch.save to memory", partial(torch_save_to_memory, state)),
        ]
        samples = interleave(sides, rounds, settings.settle, warmup=2)
    del optimizer  # until here it made its tensors lazy
    nbytes, count = bytes_of(state), count_tensors(state)
    for (name, found), how in zip(samples.items(), (HOW_CKPT, HOW_FILE, HOW_MEMORY), strict=True):
        bar = Bar("<=", 0.1) if name == "ckpt.save" else None
        report.add("many", f"{name}, {title}", "s", found, nbytes=nbytes, how=how, bar=bar, tensors=count)
        each = [Sample(s.started_s, {"per_tensor_us": s.main / count * 1e6}) for s in found]
        report.add("many", f"{name}, {title}", "us", each, nbytes=nbytes, how=f"{how}; divided by {count} tensors")
    durable = column(samples["ckpt.save"], "durable_s")
    report.add("many", f"ckpt.save, {title}", "s", durable, nbytes=nbytes, how="clock from save() to the return of result()")
