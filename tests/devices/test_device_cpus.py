"""Threads of the engine run near the device, whatever the thread that has made it is bound to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from device_rig import EAGER, LAZY, Make, Rig, cuda, fake_library, make
from support import wait_until

__all__ = ["cuda", "fake_library", "make"]

ALLOWED = sorted(os.sched_getaffinity(0))


def listed(cpus: list[int]) -> str:
    return ",".join(map(str, cpus))


@pytest.fixture
def bound(native: Any) -> Iterator[int]:
    """This thread runs on one processor alone, as where OpenMP has bound it."""
    os.sched_setaffinity(0, {ALLOWED[0]})
    yield ALLOWED[0]
    os.sched_setaffinity(0, ALLOWED)
    native.override_sysfs("/sys")


def tell(native: Any, root: Path, first: str | None, second: str | None = None) -> None:
    for pci_id, text in (("0000:3a:00.0", first), ("0000:3b:00.0", second)):
        if text is not None:
            (root / pci_id).mkdir(parents=True)
            (root / pci_id / "local_cpulist").write_text(f"{text}\n")
    native.override_sysfs(str(root.parents[2]))


def places(prefix: str) -> list[set[int]]:
    """Where threads of such a name may run."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may just end
            if (task / "comm").read_text().startswith(prefix):
                found.append(os.sched_getaffinity(int(task.name)))
    return found


def saved(rig: Rig) -> Rig:
    rig.check(rig.save([300_000, 5], [LAZY, EAGER], [0, 1]))
    wait_until(lambda: rig.engine.arena_pinned)
    return rig


@pytest.mark.skipif(len(ALLOWED) < 2, reason="this process has one processor")
@pytest.mark.parametrize("opened", [True, False])
def test_they_run_near_the_device(opened: bool, make: Make, bound: int, native: Any, tmp_path: Path) -> None:
    tell(native, tmp_path / "sys/bus/pci/devices", f"{ALLOWED[1]},100000-200000", listed(ALLOWED))
    before = places("ckpt-writer"), places("ckpt-cuda")
    rig = make()
    assert places("ckpt-writer").count({bound}) == before[0].count({bound}) + 2
    if opened:
        rig.engine.open_devices([0, 1])
    saved(rig)
    assert places("ckpt-writer").count({ALLOWED[1]}) == before[0].count({ALLOWED[1]}) + 2
    assert places("ckpt-cuda-0").count({ALLOWED[1]}) == before[1].count({ALLOWED[1]}) + 1
    assert set(ALLOWED) in places("ckpt-cuda-1")
    assert os.sched_getaffinity(0) == {bound}, "the caller stays where it is"


@pytest.mark.skipif(len(ALLOWED) < 2, reason="this process has one processor")
@pytest.mark.parametrize("told", ["100000", "", "north", None], ids=["others", "none", "no list", "nothing"])
def test_or_where_the_process_may_run(told: str | None, make: Make, bound: int, native: Any, tmp_path: Path) -> None:
    tell(native, tmp_path / "sys/bus/pci/devices", told)
    before = places("ckpt-writer").count({bound})
    saved(make())
    assert places("ckpt-writer").count({bound}) == before
    assert all(where >= set(ALLOWED) for where in places("ckpt-cuda")[-2:])


@pytest.mark.skipif(len(ALLOWED) < 2, reason="this process has one processor")
def test_without_devices_they_stay_where_the_caller_was(make: Make, bound: int) -> None:
    before = places("ckpt-writer").count({bound})
    rig = make()
    rig.check(rig.save([300_000, 5], [LAZY, EAGER], [-1, -1]))
    assert places("ckpt-writer").count({bound}) == before + 2
