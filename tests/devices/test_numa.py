"""The arena lies on the memory node of the device that it is pinned for."""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from device_rig import EAGER, LAZY, MIB, Make, cuda, fake_library, make
from support import wait_until

from ckpt import _native

__all__ = ["cuda", "fake_library", "make"]

FIRST, SECOND = "0000:3A:00.0", "0000:3B:00.0"  # those of the fake driver
Machine = Callable[..., str]
NUMA_MAPS = Path("/proc/self/numa_maps")


@pytest.fixture
def machine(tmp_path: Path, native: Any) -> Iterator[Machine]:
    """Makes a sysfs of its own, and lets the engine see that."""

    def make_sysfs(online: str | None = "0-1", **nodes: str) -> str:
        root = tmp_path / "sys"
        for path, text in {
            "devices/system/node/online": online,
            "bus/pci/devices/0000:3a:00.0/numa_node": nodes.get("first"),
            "bus/pci/devices/0000:3b:00.0/numa_node": nodes.get("second"),
        }.items():
            if text is not None:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(f"{text}\n")
        native.override_sysfs(str(root))
        return str(root)

    yield make_sysfs
    native.override_sysfs("/sys")


@pytest.mark.parametrize(
    ("online", "told", "node"),
    [
        ("0-1", "1", 1),
        ("0,2", "2", 2),
        ("0-7", "0", 0),
        ("0", "0", -1),  # there is no choice
        ("0-1", "-1", -1),  # near to none
        ("0-1", None, -1),
        ("0-1", "", -1),
        ("0-1", "north", -1),
        ("0-1", "99999999999999999999", -1),
        (None, "1", -1),
        ("", "1", -1),
    ],
)
def test_what_the_machine_tells(machine: Machine, online: str | None, told: str | None, node: int) -> None:
    assert _native.numa_node_of(machine(online, **({} if told is None else {"first": told})), FIRST) == node


def test_each_device_has_its_own(machine: Machine) -> None:
    sysfs = machine(first="1", second="0")
    assert [_native.numa_node_of(sysfs, name) for name in (FIRST, SECOND, "0000:FF:00.0", "")] == [1, 0, -1, -1]


def preferring(node: int) -> int:
    """How many of this process's mappings ask for memory of the node."""
    maps = NUMA_MAPS.read_text() if NUMA_MAPS.exists() else ""
    return len(re.findall(rf"^\S+ prefer[^ :]*:{node} ", maps, re.MULTILINE))


def may_bind() -> bool:
    """Whether the kernel lets this process choose memory nodes; some containers do not."""
    if platform.machine() != "x86_64" or not NUMA_MAPS.exists():
        return False
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    nodes = (ctypes.c_ulong * 16)(1)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mbind = 237  # here
    done = ctypes.CDLL(None).syscall(mbind, ctypes.c_void_p(at), ctypes.c_ulong(mmap.PAGESIZE), 1, nodes, 1025, 0)
    return int(done) == 0


@pytest.mark.skipif(not may_bind(), reason="this kernel or container does not let processes choose memory nodes")
def test_the_arena_moves_to_the_first_device(make: Make, machine: Machine) -> None:
    machine(first="0", second="1")
    before = preferring(0)
    rig = make(arena_bytes=4 * MIB)
    assert preferring(0) == before
    rig.engine.open_devices([0, 1])
    wait_until(lambda: rig.engine.arena_pinned)
    assert preferring(0) == before + 1
    saved = rig.save([300_000, 5], [LAZY, EAGER], [0, 1])
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    rig.check(saved)


@pytest.mark.parametrize("node", ["-1", "1000"], ids=["none_in_particular", "one_that_is_not_there"])
def test_no_node_is_no_harm(make: Make, machine: Machine, node: str) -> None:
    machine(first=node)
    rig = make()
    saved = rig.save([300_000, 5], [LAZY, EAGER], [0, 1])
    rig.engine.fence(rig.streams)
    rig.overwrite(saved, LAZY)
    rig.check(saved)
    assert rig.engine.arena_pinned and preferring(int(node)) == 0


def test_a_driver_that_does_not_tell(make: Make, machine: Machine, cuda: Any) -> None:
    machine(first="1")
    cuda.fail("cuDeviceGetPCIBusId", code=999)
    rig = make()
    rig.check(rig.save([300_000, 5], [LAZY, EAGER], [0, 1]))
    assert rig.engine.arena_pinned
