"""The arena that sizes itself, and the warning where one is too small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import support
import torch
from device_training import Training, cuda, fake_library, state, training
from support import DEADLINE_S, wait_until

import ckpt
from ckpt import options as options_module
from ckpt.saving import inspection, notices
from ckpt.saving.arena_size import available_bytes, local_ranks, most_arena_bytes, needed_arena_bytes

__all__ = ["cuda", "fake_library", "training"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "2"}, 2),
        ({"SLURM_NTASKS_PER_NODE": "2(x3)"}, 1),
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "1"}, 8),
        ({"LOCAL_WORLD_SIZE": "0"}, 1),
    ],
)
def test_ranks_of_this_node(environment: dict[str, str], ranks: int) -> None:
    assert local_ranks(environment) == ranks


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


GROUP = "sys/fs/cgroup/job/step"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 32 * GIB),
        ({"proc/self/cgroup": "0::/job/step\n", f"{GROUP}/memory.max": "max\n"}, 32 * GIB),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                f"{GROUP}/memory.max": f"{8 * GIB}\n",
                f"{GROUP}/memory.current": f"{3 * GIB}\n",
                f"{GROUP}/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            },
            6 * GIB,
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            },
            3 * GIB,
        ),
        ({"sys/fs/cgroup/memory.max": f"{GIB}\n", "sys/fs/cgroup/memory.current": f"{2 * GIB}\n"}, 0),
    ],
)
def test_memory_that_is_available(
    tmp_path: Path, files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=32 * GIB))
    assert available_bytes(machine(tmp_path, files)) == expected


def test_this_machine() -> None:
    assert most_arena_bytes() >= 512 * MIB
    assert 0 < available_bytes() < 1 << 50


def test_it_becomes_what_a_save_has_on_devices(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more, and not for what lies on the host."""
    monkeypatch.setattr(options_module, "FIRST_ARENA_BYTES", MIB)
    how = support.options(arena_bytes="auto", device_lazy=True)
    on_host = {"weights": torch.zeros(30 << 20, dtype=torch.uint8)}
    training.on = lambda storage: -1
    pending = ckpt.save(on_host, tmp_path / "host.pt", options=how)
    pending.result(DEADLINE_S)
    assert pending.stats.arena_bytes == MIB
    training.on = lambda storage: 0
    for count in (40, 20):
        current = state(count=count)
        pending = ckpt.save(current, tmp_path / "a.pt", lazy=True, options=how)
        pending.result(DEADLINE_S)
        device_bytes = pending.stats.bytes_from_devices
        if count == 40:
            expected = -(-needed_arena_bytes(device_bytes) // 4096) * 4096
        assert pending.stats.arena_bytes == expected
    engine = inspection.engine_for(how)
    wait_until(lambda: engine.arena_pinned)
    assert engine.most_arena_bytes >= 512 * MIB


def test_files_that_come_one_by_one_count_together(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "FIRST_ARENA_BYTES", MIB)
    how = support.options(arena_bytes="auto", device_lazy=True)
    parts = [state(count=10), state(count=20)]
    with ckpt.BundleCheckpointer(options=how, coordinator="local") as checkpointer:
        bundle = checkpointer.begin(tmp_path, "bundle")
        for number, part in enumerate(parts):
            bundle.save(part, bundle.directory / f"{number}.pt", lazy=True)
        pending = bundle.commit()
        pending.result(DEADLINE_S)
    assert pending.stats.arena_bytes >= needed_arena_bytes(pending.stats.bytes_from_devices) - 4096


# ---- one that is too small -------------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(native: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(notices, "noted_fences", [])
    native.set_fault("pwritev", delay_s=0.02)
    yield
    native.clear_faults()


def train(path: Path, saves: int, **how: Any) -> None:
    weights = torch.nn.Parameter(torch.zeros(1_000_000))
    weights.grad = torch.ones_like(weights)
    optimizer = torch.optim.SGD([weights], lr=0.1)
    for _ in range(6):
        optimizer.step()
    for _ in range(saves):
        pending = ckpt.save({"weights": weights.detach()}, path, options=support.options(**how))
        optimizer.step()
        pending.result(DEADLINE_S)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "of an iteration" in record.message]


@pytest.mark.usefixtures("slow_disk")
def test_fences_that_wait_for_room_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path / "a.pt", 2, arena_bytes="1MiB", chunk_bytes="64KiB")
    assert warnings_in(caplog) == [], "the first saves of a run are not like the others"
    train(tmp_path / "a.pt", 3, arena_bytes="1MiB", chunk_bytes="64KiB")
    (found,) = warnings_in(caplog)
    assert "for room in the arena of 0.000977 GiB: set Options.arena_bytes to the size of the state" in found


@pytest.mark.usefixtures("slow_disk")
def test_fences_that_do_not_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of it fits, and a copy of 4 MB takes no part of an iteration that is worth telling."""
    weights = torch.nn.Parameter(torch.zeros(1000))
    weights.grad = torch.ones_like(weights)
    optimizer = torch.optim.SGD([weights], lr=0.1)
    for _ in range(8):
        pending = ckpt.save({"weights": weights.detach()}, tmp_path / "a.pt", options=support.options())
        optimizer.step()
        pending.result(DEADLINE_S)
    assert warnings_in(caplog) == []
