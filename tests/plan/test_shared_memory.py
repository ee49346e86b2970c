"""Parameters in memory that other processes see: these step on them at any time, and no fence of ours holds them up."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as processes
from support import DEADLINE_S, assert_same, options

import ckpt
from ckpt.plan import shared_memory as planned
from ckpt.plan.lazy_storages import lazy_storages
from ckpt.plan.save_plan import COPY, LAZY, make_plan

ROWS, WIDTH = 65_536, 64
NBYTES = 4 * ROWS * WIDTH


def _file(directory: Path) -> str:
    path = directory / "shared"
    path.write_bytes(bytes(NBYTES))
    return str(path)


def _strategy(name: str) -> Callable[[Path], torch.Tensor]:
    def make(_: Path) -> torch.Tensor:
        before = processes.get_sharing_strategy()
        processes.set_sharing_strategy(name)
        try:
            return torch.zeros(ROWS, WIDTH).share_memory_()
        finally:
            processes.set_sharing_strategy(before)

    return make


def _part(directory: Path) -> torch.Tensor:
    """torch does not say of a slice of a storage that it is shared."""
    whole = torch.UntypedStorage.from_file(_file(directory), True, NBYTES)
    return torch.empty(0).set_(whole[0 : NBYTES // 2]).view(ROWS // 2, WIDTH)  # type: ignore[call-overload]


def _map(directory: Path) -> torch.Tensor:
    return torch.from_numpy(np.memmap(_file(directory), np.float32, "r+", shape=(ROWS, WIDTH)))


def _block(_: Path) -> torch.Tensor:
    block = shared_memory.SharedMemory(create=True, size=NBYTES)
    block.unlink()
    blocks.append(block)  # its memory goes with it
    return torch.from_numpy(np.ndarray((ROWS, WIDTH), np.float32, block.buf))


blocks: list[shared_memory.SharedMemory] = []


SHARED: dict[str, Callable[[Path], torch.Tensor]] = {
    "share_memory": _strategy("file_descriptor"),
    "by_name": _strategy("file_system"),
    "from_file": lambda directory: torch.from_file(_file(directory), shared=True, size=ROWS * WIDTH).view(ROWS, WIDTH),
    "part_of_a_file": _part,
    "numpy_map": _map,
    "python_block": _block,
    "inherited": lambda _: torch.frombuffer(mmap.mmap(-1, NBYTES), dtype=torch.float32).view(ROWS, WIDTH),
}


@contextlib.contextmanager
def written_beside(tensor: torch.Tensor) -> Iterator[None]:
    """A child writes to a few elements at a time, as a step with sparse gradients does."""
    elements, began = tensor.detach().view(-1).numpy(), os.pipe()
    child = os.fork()
    if child == 0:
        choose = random.Random(os.getpid())
        while True:
            for _ in range(8):
                elements[choose.randrange(len(elements))] += 1
            os.write(began[1], b"x") if began[1] >= 0 else None
            began = began[0], -1
            time.sleep(0.0005)
    try:
        os.read(began[0], 1)
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in began:
            os.close(end)


def stepped(*parameters: torch.nn.Parameter) -> torch.optim.Optimizer:
    """The rows of none are written: a sparse gradient without any."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def kinds(tensor: torch.Tensor, declared: Any = None) -> list[int]:
    return list(make_plan([tensor.detach()], lazy_storages(declared), 0).kinds)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind != "by_name" else ()) for kind in SHARED])
def test_files_are_whole_while_another_process_writes(kind: str, native: Any, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(SHARED[kind](tmp_path))
    optimizer = stepped(parameter)
    choose = random.Random(kind)
    with written_beside(parameter):
        seen = parameter.detach().clone()
        for _ in range(10):
            native.set_fault("pwritev", delay_s=choose.choice([0.0, 0.001, 0.005]))
            pending = ckpt.save({"weight": parameter}, tmp_path / "x.pt", options=options(arena_bytes="64MiB"))
            if choose.random() < 0.5:
                time.sleep(choose.uniform(0, 0.02))
                optimizer.step()
            found = ckpt.load(pending.result(DEADLINE_S))["weight"].detach()
            assert_same(torch.load(tmp_path / "x.pt")["weight"].detach(), found)
            assert bool((found >= seen).all()), "a count has gone back"
            seen = found
    assert bool(seen.any())


@pytest.mark.parametrize("kind", SHARED)
def test_what_is_shared_is_lazy_only_if_it_is_declared(kind: str, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(SHARED[kind](tmp_path))
    optimizer = stepped(parameter)
    assert kinds(parameter) == kinds(parameter, optimizer) == [COPY]
    assert kinds(parameter, parameter) == kinds(parameter, True) == [LAZY]


def _hogwild(weight: torch.nn.Parameter, stop: Any, ready: Any) -> None:
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    while not stop.is_set():
        rows = torch.randint(0, len(weight), (4,)).unique()
        weight.grad = torch.sparse_coo_tensor(rows[None], torch.ones(len(rows), WIDTH), weight.shape)
        optimizer.step()
        ready.set()
        time.sleep(0.001)


def test_hogwild(tmp_path: Path) -> None:
    context = processes.get_context("spawn")
    weight = torch.nn.Parameter(torch.rand(ROWS, WIDTH).share_memory_())
    optimizer, stop, ready = stepped(weight), context.Event(), context.Event()
    process = context.Process(target=_hogwild, args=(weight, stop, ready))
    process.start()
    try:
        assert ready.wait(DEADLINE_S)
        for _ in range(10):
            pending = ckpt.save({"weight": weight}, tmp_path / "x.pt", options=options(arena_bytes="64MiB"))
            ckpt.load(pending.result(DEADLINE_S))
            optimizer.step()
    finally:
        stop.set()
        process.join()


# ---- what is nobody else's stays lazy --------------------------------------------------------------------------------


def _loaded(directory: Path, **how: Any) -> torch.Tensor:
    torch.save(torch.zeros(ROWS, WIDTH), directory / "loaded.pt")
    return torch.load(directory / "loaded.pt", **how)


def _loaded_here(directory: Path) -> torch.Tensor:
    torch.save(torch.zeros(ROWS, WIDTH), directory / "loaded.pt")
    return ckpt.load(directory / "loaded.pt")


PRIVATE: dict[str, Callable[[Path], torch.Tensor]] = {
    "allocated": lambda _: torch.zeros(ROWS, WIDTH),
    "numpy": lambda _: torch.from_numpy(np.zeros((ROWS, WIDTH), np.float32)),
    "loaded": _loaded,
    "loaded_by_ckpt": _loaded_here,
    "mapped_when_loaded": lambda directory: _loaded(directory, mmap=True),
    "inherited": lambda _: torch.frombuffer(mmap.mmap(-1, NBYTES, mmap.MAP_PRIVATE), dtype=torch.float32).view(ROWS, WIDTH),
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_what_no_other_process_sees_is_lazy(kind: str, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(PRIVATE[kind](tmp_path))
    optimizer = stepped(parameter)
    assert kinds(parameter) == kinds(parameter, optimizer) == [LAZY]


def test_memory_that_is_shared_later_is_lazy_no_more(tmp_path: Path) -> None:
    for make in PRIVATE.values():
        parameter = torch.nn.Parameter(make(tmp_path))
        optimizer = stepped(parameter)
        assert kinds(parameter) == [LAZY]
        parameter.share_memory_()
        assert kinds(parameter) == [COPY]
        del optimizer


def test_memory_of_unknown_origin_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand tensors of a file that has been loaded must not cost ten thousand looks at all mappings, nor one a save."""
    looks: list[None] = []
    read = planned.shared_mappings
    monkeypatch.setattr(planned, "shared_mappings", lambda: (looks.append(None), read())[1])
    parameters = [torch.nn.Parameter(torch.from_numpy(np.zeros(100, np.float32))) for _ in range(300)]
    optimizer = stepped(*parameters)
    for _ in range(3):
        assert list(make_plan([each.detach() for each in parameters], lazy_storages(), 0).kinds) == [LAZY] * 300
    assert len(looks) == 1
    more = torch.nn.Parameter(torch.from_numpy(np.zeros(100, np.float32)))
    other = stepped(more)
    assert kinds(more) == [LAZY] and len(looks) == 2
    del optimizer, other


def test_where_mappings_cannot_be_read_memory_of_unknown_origin_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "_MAPPINGS", "/proc/self/no-such-file")
    parameter, own = torch.nn.Parameter(torch.from_numpy(np.zeros(100, np.float32))), torch.nn.Parameter(torch.zeros(100))
    optimizer = stepped(parameter, own)
    assert kinds(parameter) == [COPY] and kinds(own) == [LAZY]
    monkeypatch.undo()
    assert kinds(parameter) == [LAZY]
    del optimizer
