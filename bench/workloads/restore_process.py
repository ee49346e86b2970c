"""Writes a state in all formats, or loads it once in one of them and prints what that took. A process for each measurement.

python -m bench.workloads.restore_process write "" DIRECTORY BYTES
python -m bench.workloads.restore_process load CASE DIRECTORY 0     where DIRECTORY holds full/ and small/
"""

from __future__ import annotations

import json
import os
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import ckpt
from bench.measure.disk_pages import drop_from_cache
from bench.measure.sampling import clock
from bench.rivals.torch_save import torch_save_durable
from bench.workloads.memory_process import MIB, forget_the_past, high_water_mark, make_state
from bench.workloads.restore import (
    CASES,
    DCP,
    FOREIGN,
    INTO,
    MAPPED,
    OURS,
    OURS_TENSORS,
    OURS_TENSORS_INTO,
    SAFETENSORS,
    TORCH,
)

State = dict[str, torch.Tensor]
PAGE = 4096


def write(directory: Path, nbytes: int) -> dict[str, Any]:
    state = make_state(nbytes)
    ckpt.save(state, directory / "ckpt.pt", lazy=True).result()
    torch_save_durable(state, directory / "torch.pt")
    safetensors.torch.save_file(state, directory / "state.safetensors")
    dcp.save(state, checkpoint_id=directory / "dcp", no_dist=True)
    os.sync()
    return {"digest": digest(state)}


def digest(state: State) -> int:
    """Of all names and bytes, in whatever order they come."""
    return sum(zlib.crc32(name.encode()) * int(tensor.view(torch.int32).sum()) for name, tensor in state.items())


def empty_like(state: State) -> State:
    """Memory that is there, as in a model that has been made."""
    return {name: torch.zeros_like(tensor) + 1 for name, tensor in state.items()}


def shapes_of(path: Path) -> State:
    found: State = torch.load(path, map_location="meta", weights_only=True)
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in found.items()}


def load_mapped(path: Path) -> State:
    return touched(torch.load(path, mmap=True, weights_only=True))


def touched(state: State) -> State:
    """What is only mapped has not been read yet."""
    for tensor in state.values():
        tensor.view(torch.uint8).view(-1)[::PAGE].max()  # a read for each page
    return state


def loads_into(state: State, fill: Callable[[State], object]) -> State:
    fill(state)
    return state


def way(case: str, directory: Path) -> Callable[[], State]:
    """What the clock is put around. Memory that a load is given is made before."""
    ours, theirs = directory / "ckpt.pt", directory / "torch.pt"
    tensors = directory / "state.safetensors"
    if case in (INTO, DCP, OURS_TENSORS_INTO):
        state = empty_like(shapes_of(theirs))
        if case != DCP:
            path = ours if case == INTO else tensors
            return lambda: loads_into(state, lambda target: ckpt.load_into(path, target))
        return lambda: loads_into(state, lambda target: dcp.load(target, checkpoint_id=directory / "dcp", no_dist=True))
    simple: dict[str, Callable[[], State]] = {
        OURS: lambda: ckpt.load(ours),
        FOREIGN: lambda: ckpt.load(theirs),
        TORCH: lambda: torch.load(theirs, weights_only=True),
        MAPPED: lambda: load_mapped(theirs),
        SAFETENSORS: lambda: touched(safetensors.torch.load_file(tensors)),
        OURS_TENSORS: lambda: ckpt.load(tensors),
    }
    return simple[case]


def load(case: str, directory: Path) -> dict[str, Any]:
    small = digest(way(case, directory / "small")())
    load_once = way(case, directory / "full")
    drop_from_cache(directory / "full")
    forget_the_past()
    before = high_water_mark()
    started = clock()
    state = load_once()
    elapsed = clock() - started
    peak = high_water_mark()
    nbytes = sum(tensor.nbytes for tensor in state.values())
    said = {"load_s": elapsed, "rate_GBps": nbytes / elapsed / 1e9, "extra_MiB": (peak - before) / MIB}
    return said | {"digest_small": small, "digest_full": digest(state)}


def main(action: str, case: str, directory: Path, nbytes: int) -> dict[str, Any]:
    if action == "write":
        return write(directory, nbytes)
    if case not in (*CASES, OURS_TENSORS, OURS_TENSORS_INTO):
        raise SystemExit(f"there is no way '{case}'")
    return load(case, directory)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
