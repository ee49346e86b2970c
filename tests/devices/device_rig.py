"""An engine on the fake CUDA driver: what the tests of device bytes share."""

from __future__ import annotations

import dataclasses
import gc
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeCuda, cuda, fake_library
from support import DEADLINE_S, wait_until

from ckpt import _native

__all__ = ["cuda", "fake_library"]

KIB, MIB = 1 << 10, 1 << 20
HOST = -1
EAGER, LAZY = _native.COPY, _native.LAZY


@dataclasses.dataclass
class Saved:
    path: Path
    job: Any
    tensors: list[torch.Tensor]
    kinds: list[int]
    devices: list[int]
    contents: list[bytes]
    packed: bool = False

    def of(self, kind: int) -> list[tuple[torch.Tensor, int]]:
        return [(t, d) for t, k, d in zip(self.tensors, self.kinds, self.devices, strict=True) if k == kind]


class Rig:
    """An engine on the fake driver, and a stream for each device on which training computes."""

    def __init__(self, cuda: FakeCuda, directory: Path, *, streams: dict[int, int] | None = None, **options: Any) -> None:
        made: dict[str, Any] = {"arena_bytes": 2 * MIB, "chunk_bytes": 64 * KIB, "writers": 2, "cuda_library": cuda.path}
        self.cuda, self.directory = cuda, directory
        self.engine: Any = _native.Engine(**(made | options))
        self.streams = streams if streams is not None else {device: cuda.stream(device) for device in (0, 1)}
        self.saves = 0
        self.held: list[torch.Tensor] = []  # kernels may still write to them

    def save(
        self, sizes: list[int], kinds: list[int], devices: list[int], *, uniform: int = 64, direct: bool = True,
        verify: bool = False, timeout_s: float = DEADLINE_S, share: tuple[int, int] = (0, 1), **how: Any,
    ) -> Saved:  # fmt: skip
        self.saves += 1
        tensors = how.get("tensors") or [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
        self.held += tensors
        for tensor, device in zip(tensors, devices, strict=True):
            self.cuda.own(device, tensor.untyped_storage())
        contents = [tensor.numpy().tobytes() for tensor in tensors]
        path = how.get("path") or self.directory / f"save-{self.saves}"
        job = self.engine.submit(
            path=os.fsencode(path), direct=direct, archive=b"archive", head=[("data.pkl", b"a pickle")],
            addresses=[tensor.data_ptr() for tensor in tensors], sizes=[len(content) for content in contents],
            kinds=bytes(kinds), tail=[("version", b"3\n")], copy_at_most=4096, uniform_alignment=uniform, verify=verify,
            timeout_s=timeout_s, devices=devices, streams=how.get("streams", self.streams), share_index=share[0],
            share_count=share[1], probe=how.get("probe", False), sum=how.get("sum", False),
            packed=how.get("packed", False),
        )  # fmt: skip
        return Saved(path, job, tensors, kinds, devices, contents, how.get("packed", False))

    def warm_up(self) -> None:
        """Two saves from both devices, after which each has its cache, or does without."""
        for _ in range(2):
            saved = self.save([10, 10], [LAZY, LAZY], [0, 1])
            self.check(saved)
            saved.path.unlink()
        wait_until(lambda: all(size or failure for size, _, failure in self.engine.device_caches.values()), what="the caches")

    def cached(self, device: int = 0) -> int:
        """Bytes of the device's cache in use."""
        return int(self.engine.device_caches[device][1])

    def overwrite(self, saved: Saved, kind: int, value: int = 0xEE) -> None:
        """As the training would: on the host at once, on a device when its stream comes to it."""
        for tensor, device in saved.of(kind):
            if device == HOST:
                tensor.fill_(value)
            elif len(tensor):
                self.cuda.fill(device, self.streams[device], tensor.data_ptr(), value, len(tensor))

    def check(self, saved: Saved) -> None:
        assert saved.job.wait_finished(DEADLINE_S)
        assert saved.job.error is None, saved.job.error
        assert saved.job.released
        if saved.packed:
            assert saved.path.read_bytes() == b"".join([b"a pickle", *saved.contents])
            return
        assert _native.verify_torch_file(os.fsencode(saved.path), 2)
        with zipfile.ZipFile(saved.path) as archive:
            found = [archive.read(f"archive/data/{index}") for index in range(len(saved.contents))]
        assert [len(content) for content in found] == [len(content) for content in saved.contents]
        assert [i for i, (a, b) in enumerate(zip(found, saved.contents, strict=True)) if a != b] == []

    def end(self) -> None:
        for device, stream in self.streams.items():
            self.cuda.synchronize(device, stream)
        assert self.engine.close(DEADLINE_S)
        assert self.engine.arena_used == 0
        assert [used for _, used, _ in self.engine.device_caches.values() if used] == []
        self.engine = None
        gc.collect()
        self.cuda.assert_no_violation()
        assert self.cuda.alive() == self.cuda.before


Make = Callable[..., Rig]


@pytest.fixture
def make(cuda: FakeCuda, tmp_path: Path) -> Iterator[Make]:
    rigs: list[Rig] = []

    def make_rig(**options: Any) -> Rig:
        rigs.append(Rig(cuda, tmp_path, **options))
        return rigs[-1]

    yield make_rig
    cuda.hold_copies(False)
    while rigs:
        rigs.pop().end()
