"""A short program: trains, saves every iteration, restores, and compares every byte. Steps run it under special conditions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import ckpt
from bench.gpu.device import Device, find_device
from bench.gpu.setup import check_file, same_bytes, tensors_of
from bench.gpu.training import GpuTrainer
from bench.gpu_report.findings import INCONCLUSIVE, PASS, Findings, step_parser
from bench.workloads.training import bytes_of

PARAMETERS, SAVES = 2_000_000, 4
TIMEOUT_S = 120.0
MIB = 1 << 20
ARENAS = {"an arena smaller than the state": 8 * MIB, "an arena larger than the state": 128 * MIB}
CHUNK = MIB


def main(arguments: list[str]) -> None:
    parser = step_parser(__doc__)
    parser.add_argument("--allocator", default="", help="the allocator of torch that must be at work")
    asked = parser.parse_args(arguments)
    findings = Findings(asked.out)
    device = find_device(asked.pretend_cuda)
    trainer = GpuTrainer(PARAMETERS, device)
    if asked.allocator:
        check_allocator(findings, asked.allocator, device)
    for name, arena in ARENAS.items():
        with findings.guard(name):
            saved = save_every_iteration(trainer, device, asked.directory / str(arena), arena)
            findings.add(name, PASS, saves=saved, state_bytes=bytes_of(trainer.state()))


def save_every_iteration(trainer: GpuTrainer, device: Device, directory: Path, arena: int) -> int:
    """
    Raises:
        AssertionError: what came back is not what was saved.
        Exception: whatever a save or a load says.
    """
    directory.mkdir()
    options = ckpt.Options(device_lazy=True, arena_bytes=arena, chunk_bytes=CHUNK)
    saves: list[tuple[ckpt.PendingSave, Path, list[torch.Tensor]]] = []
    for number in range(SAVES):
        state = trainer.state()
        device.synchronize()
        expected = [tensor.detach().cpu().clone() for tensor in tensors_of(state)]
        path = directory / f"{number}.pt"
        saves.append((ckpt.save(state, path, lazy=trainer.model, options=options), path, expected))
        trainer.forward_backward()
        trainer.step()
    for pending, path, expected in saves:
        pending.result(TIMEOUT_S)
        check_file(path, expected, device)
        check_loaded(ckpt.load(path, map_location=device.map_location), expected)
        path.unlink()
    return len(saves)


def check_loaded(found: Any, expected: list[torch.Tensor]) -> None:
    for number, (there, here) in enumerate(zip(tensors_of(found), expected, strict=True)):
        if not same_bytes(there.cpu(), here):
            raise AssertionError(f"tensor {number}, loaded to the device, is not what it was when it was saved")


def check_allocator(findings: Findings, wanted: str, device: Device) -> None:
    """A setting that torch has not heard would prove nothing."""
    check = f"torch allocates by {wanted}"
    if device.stand_in:
        findings.add(check, INCONCLUSIVE, "a stand-in has no allocator")
        return
    if wanted == "cudaMallocAsync":
        found = torch.cuda.get_allocator_backend()
        findings.add(check, PASS if found == wanted else INCONCLUSIVE, "" if found == wanted else f"it allocates by {found}")
        return
    expandable = any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
    findings.add(check, PASS if expandable else INCONCLUSIVE, "" if expandable else "no segment is expandable")


if __name__ == "__main__":
    main(sys.argv[1:])
