"""Jobs on the strict model of the CUDA driver, as they come: `make device-stress SECONDS=1800 SEED=1`.

Each round has several jobs side by side, each in a thread, with two optimizers on two streams of a device, options and a
directory of its own, and some of whose saves are sharded; meanwhile copies are held up, calls fail, and graphs are captured.
Every file that a save says it has written holds what was there at save(), the driver finds no rule broken, and nothing of it is
left at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import inspect
import logging
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_driver
import torch
import torch.distributed.checkpoint as stock
from device_training import Training
from fake_driver import FakeCuda
from support import close_engines, options

import ckpt
from ckpt import devices as torch_devices
from ckpt.devices import HOST
from ckpt.errors import CheckpointError

STALLS_S = 240.0  # a round that takes longer hangs
RELAXED = 2
FAILING = ("cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync", "cuMemcpyBatchAsync", "batched copies", "cuEventRecord", "cuEventCreate")
CODES = (2, 801, 999)
# A fence waits for no copies that a lane is about to enqueue for a save that has failed: what they read goes nowhere.
OF_A_FAILED_SAVE = re.compile(
    r"race: nothing orders the (write of .* a kernel by .* behind the read of .* cuMemcpy"
    r"|read of .* cuMemcpy.* behind the write of .* a kernel by)"
)


class Streams(Training):
    """Which stream is current, and of which device, each thread decides for itself."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.own = threading.local()
        self.places: dict[int, int] = {}
        super().__init__(cuda)
        self.on = lambda storage: self.places.get(storage.data_ptr(), HOST)

    def stream_of(self, device: int) -> int:
        return self.own.current if device == getattr(self.own, "device", HOST) else self.streams[device]

    def is_capturing(self) -> bool:
        return False

    @contextlib.contextmanager
    def on_stream(self, device: int, stream: int) -> Iterator[None]:
        before = getattr(self.own, "device", HOST), getattr(self.own, "current", 0)
        self.own.device, self.own.current = device, stream
        yield
        self.own.device, self.own.current = before

    def write(self, tensor: torch.Tensor, value: int) -> None:
        """A kernel on the current stream."""
        self.cuda.fill(self.own.device, self.own.current, tensor.data_ptr(), value, tensor.nbytes)

    def place(self, tensor: torch.Tensor, device: int) -> torch.Tensor:
        self.places[tensor.data_ptr()] = device
        self.cuda.own(device, tensor.untyped_storage())
        return tensor


class Filling(torch.optim.Optimizer):
    """A step fills parameters and state with the next value, when the stream that is current comes to it."""

    def __init__(self, world: Streams, device: int, sizes: list[int]) -> None:
        made = [torch.nn.Parameter(world.place(torch.zeros(size, dtype=torch.uint8).float(), device)) for size in sizes]
        super().__init__(made, {})
        self.world, self.value = world, 0
        for parameter in made:
            self.state[parameter] = {"momentum": world.place(torch.zeros_like(parameter), device)}

    def tensors(self) -> list[torch.Tensor]:
        return [each for parameter, its in self.state.items() for each in (parameter.detach(), its["momentum"])]

    def step(self, closure: Any = None) -> None:
        self.value = self.value % 250 + 1
        for tensor in self.tensors():
            self.world.write(tensor, self.value)


@dataclasses.dataclass
class Expected:
    pending: ckpt.PendingSave
    values: list[int]  # of the first optimizer, the second, the buffers
    text: str
    sharded: Any = None  # what has been saved so


@dataclasses.dataclass
class Job:
    """A thread that trains, saves and loads."""

    world: Streams
    number: int
    seed: str
    directory: Path
    tally: dict[str, int]

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.device = self.chance.randrange(2)
        self.lanes = [self.world.cuda.stream(self.device) for _ in range(2)]
        self.options = options(
            device_lazy=True, arena_bytes=self.chance.choice(["1MiB", "4MiB", "16MiB"]),
            chunk_bytes=self.chance.choice(["64KiB", "128KiB"]), writers=self.chance.choice([1, 2]),
            device_cache=self.chance.choice([0, 0, "1MiB", "8MiB"]), device_batches=self.chance.random() < 0.5,
            verify_capture=self.chance.random() < 0.2, max_failed_saves=10**6, eager_bytes=self.chance.choice([1, "4KiB"]),
        )  # fmt: skip
        self.waits: list[Expected] = []
        self.keeps: list[Any] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.world.cuda.make_current(0)
            self.world.cuda.exchange_capture_mode(RELAXED)
            with self.world.on_stream(self.device, self.lanes[0]):
                self.train()
        except BaseException as failure:
            self.failure = failure

    def train(self) -> None:
        self.optimizers = [
            Filling(self.world, self.device, [self.chance.randrange(1, 60_000) for _ in range(self.chance.randrange(2, 12))])
            for _ in range(2)
        ]
        self.buffers = [self.world.place(torch.zeros(self.chance.randrange(1, 20_000)), self.device) for _ in range(4)]
        self.buffers_value = 0
        saver = ckpt.Checkpointer(self.directory / "steps", keep=None, options=self.options, coordinator="local")
        for step in range(self.chance.randrange(4, 10)):
            self.iterate(saver, step)
        for each in self.waits:
            self.look_at(each)
        with contextlib.suppress(CheckpointError):  # it tells of the last one that failed
            saver.close()
        self.synchronize()
        self.load()
        self.synchronize()

    def iterate(self, saver: ckpt.Checkpointer, step: int) -> None:
        for optimizer, lane in zip(self.optimizers, self.lanes, strict=True):
            with self.world.on_stream(self.device, lane):
                self.step(optimizer)
        self.join_lanes()
        self.buffers_value = self.buffers_value % 250 + 1
        for buffer in self.buffers:
            self.world.write(buffer, self.buffers_value)
        if self.chance.random() < 0.8:
            self.save(saver, step)
        if self.chance.random() < 0.3:
            self.save_what_goes(step)
        self.join_lanes()

    def step(self, optimizer: Filling) -> None:
        """By the hook, or by a fence and kernels that no hook sees. What is refused is tried again."""
        while True:
            try:
                if self.chance.random() < 0.7:
                    optimizer.step()
                else:
                    ckpt.fence()
                    inspect.unwrap(Filling.step)(optimizer)
                return
            except CheckpointError:
                self.count("fences that failed")

    def save(self, saver: ckpt.Checkpointer, step: int) -> None:
        state = {"first": self.optimizers[0].tensors(), "second": self.optimizers[1].tensors(), "buffers": self.buffers,
                 "host": torch.full((5000,), float(step)), "step": step}  # fmt: skip
        values = [self.optimizers[0].value, self.optimizers[1].value, self.buffers_value]
        with contextlib.suppress(CheckpointError), self.counted("saves that were refused"):
            sharded = self.chance.random() < 0.4
            pending = saver.save(step, sharded=state) if sharded else saver.save(step, state)
            self.waits.append(Expected(pending, values, "" if sharded else "state.pt", state if sharded else None))
        for buffer in self.buffers:  # eager: they may change at once
            self.world.write(buffer, 251)

    def save_what_goes(self, step: int) -> None:
        """Tensors that nobody keeps: others take their memory when the library lets go of it."""
        tensors = [torch.full((self.chance.randrange(1, 50_000),), 7, dtype=torch.uint8) for _ in range(6)]
        for tensor in tensors:
            self.world.place(tensor, self.device)
        with contextlib.suppress(CheckpointError), self.counted("saves that were refused"):
            pending = ckpt.save(tensors, self.directory / f"{step}.pt", lazy=self.chance.random() < 0.7, options=self.options)
            self.waits.append(Expected(pending, [7], ""))
        while True:
            try:
                ckpt.fence()
                break
            except CheckpointError:
                self.count("fences that failed")
        for tensor in tensors:
            self.world.places.pop(tensor.data_ptr(), None)

    def join_lanes(self) -> None:
        """Each waits for what the other has been given, as torch's wait_stream() does it."""
        cu, event = self.world.cuda.cu, fake_driver.ctypes.c_void_p()
        self.world.cuda.make_current(self.device)
        retry(cu.cuEventCreate, fake_driver.ctypes.byref(event), 3)
        for here, there in (self.lanes, self.lanes[::-1]):
            retry(cu.cuEventRecord, event, fake_driver.ctypes.c_void_p(here))
            retry(cu.cuStreamWaitEvent, fake_driver.ctypes.c_void_p(there), event, 0)
        retry(cu.cuEventDestroy_v2, event)
        self.world.cuda.make_current(0)

    def look_at(self, expected: Expected) -> None:
        try:
            path = expected.pending.result(STALLS_S)
        except CheckpointError:
            return self.count("saves that failed")
        if expected.sharded is None:
            found = torch.load(path / expected.text if expected.text else path, weights_only=True)
        else:
            found = {
                name: [torch.zeros_like(each) for each in expected.sharded[name]] for name in ("first", "second", "buffers")
            }
            stock.load(found, checkpoint_id=str(path), no_dist=True)
        parts = [found["first"], found["second"], found["buffers"]] if isinstance(found, dict) else [found]
        for part, value in zip(parts, expected.values, strict=True):
            for tensor in part:
                seen = set(tensor.contiguous().view(torch.uint8).unique().tolist())
                assert seen == {value}, f"{path} holds {sorted(seen)} instead of {value}"
        self.count("files that were right")
        return None

    def load(self) -> None:
        state = {str(number): torch.full((self.chance.randrange(1, 80_000),), float(number)) for number in range(20)}
        target = {name: self.world.place(torch.zeros_like(tensor), self.device) for name, tensor in state.items()}
        torch.save(state, self.directory / "load.pt")
        with contextlib.suppress(CheckpointError), self.counted("loads that were refused"):
            ckpt.load_into(self.directory / "load.pt", target)
            self.synchronize()
            assert all(torch.equal(tensor, target[name]) for name, tensor in state.items()), "a load brought something else"
            self.count("loads that were right")
        self.keeps.append(target)

    def synchronize(self) -> None:
        for lane in self.lanes:
            self.world.cuda.synchronize(self.device, lane)

    def count(self, what: str) -> None:
        self.tally[what] = self.tally.get(what, 0) + 1

    @contextlib.contextmanager
    def counted(self, what: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            self.count(what)
            raise


def retry(call: Any, *arguments: Any) -> None:
    """Calls of the training: what fails was meant for the library."""
    while call(*arguments) != 0:
        pass


def disturb(cuda: FakeCuda, chance: random.Random, end: threading.Event, failures: bool) -> None:
    """Until the end: holds copies up, lets calls fail, captures graphs."""
    while not end.wait(chance.random() * 0.02):
        act = chance.randrange(4 if failures else 3)
        if act == 0:
            cuda.hold_copies(True, only_from_allocated=chance.random() < 0.3)
            end.wait(chance.random() * 0.05)
            cuda.hold_copies(False)
        elif act == 1:
            cuda.capture_globally(True)
            end.wait(chance.random() * 0.02)
            cuda.capture_globally(False)
        elif act == 3:
            cuda.fail(chance.choice(FAILING), skip=chance.randrange(20), code=chance.choice(CODES))
    cuda.hold_copies(False)


def play(cuda: FakeCuda, seed: str, tally: dict[str, int]) -> None:
    """One round."""
    chance = random.Random(seed)
    failed_before = tally.get("saves that failed", 0)
    cuda.forget()
    cuda.make_current(0)
    cuda.make_current(1)
    cuda.make_current(0)
    before = cuda.alive()
    cuda.configure(seed=chance.randrange(1 << 30), most_delay_s=chance.choice([0, 0.0002, 0.002]))
    torch_devices.in_use = world = Streams(cuda)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        jobs = [
            Job(world, number, f"{seed}/{number}", Path(directory) / str(number), tally)
            for number in range(chance.randrange(1, 4))
        ]
        for job in jobs:
            job.directory.mkdir()
        end = threading.Event()
        gremlin = threading.Thread(target=disturb, args=(cuda, chance, end, chance.random() < 0.5))
        threads = [threading.Thread(target=job.run, daemon=True) for job in jobs]
        for thread in [gremlin, *threads]:
            thread.start()
        for thread in threads:
            thread.join(STALLS_S)
            assert not thread.is_alive(), "it hangs"
        end.set()
        gremlin.join()
        cuda.configure()
        failed = [job.failure for job in jobs if job.failure is not None]
        if failed:
            raise failed[0]
        world.synchronize()
        close_engines()
        jobs.clear()
        gc.collect()
    cuda.end_streams()
    found = cuda.violations()
    if tally.get("saves that failed", 0) > failed_before:
        found = [each for each in found if not OF_A_FAILED_SAVE.match(each)]
    assert not found, "\n".join(found)
    assert cuda.alive() == before, (cuda.alive(), before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the round to begin with")
    parser.add_argument("--driver", choices=list(fake_driver.SOURCES), default="strict")
    parser.add_argument("--without-fences", action="store_true", help="to see that it is seen")
    chosen = parser.parse_args()
    if chosen.without_fences:
        ckpt.fence = lambda: None
    logging.getLogger("ckpt").setLevel(logging.CRITICAL)  # of failures that are meant to be
    with tempfile.TemporaryDirectory() as directory:
        cuda = FakeCuda(fake_driver.build(Path(directory), kind=chosen.driver))
        ends, number, tally = time.monotonic() + chosen.seconds, chosen.first, dict[str, int]()
        while number == chosen.first or time.monotonic() < ends:
            try:
                play(cuda, f"{chosen.seed}/{number}", tally)
            except BaseException as failure:
                sys.stdout.write(f"round {number} of seed {chosen.seed}: {failure!r}\n")
                raise
            number += 1
            if number % 20 == 0:
                sys.stdout.write(f"{number} rounds: {tally}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{number - chosen.first} rounds, all clean: {tally}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
