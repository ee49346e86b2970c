"""Whole jobs whose tensors lie on devices: the callback for plain loops, DeepSpeed's engine, files that two ranks write."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_training import Training, cuda, fake_library, options, state, training
from support import DEADLINE_S, assert_same, clear_faults, wait_until
from test_ranks_apart import Threaded, Wire
from torch import nn

import ckpt
from ckpt import _native
from ckpt.devices import HOST
from ckpt.integrations.deepspeed.engine import LazyCheckpointEngine
from ckpt.integrations.torch import CheckpointCallback
from ckpt.saving import inspection

__all__ = ["cuda", "fake_library", "training"]

SPOILT = 0xEE
CACHES = [0, "8MiB"]
SMALL: dict[str, Any] = {"arena_bytes": "1MiB", "chunk_bytes": "64KiB"}  # a third of a state


class Filling(torch.optim.Optimizer):
    """Step number n fills parameters and state with bytes n: those on a device when its stream comes to it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.fill: Callable[[torch.Tensor, int], None] = lambda tensor, value: None
        self.steps = 0
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"momentum": torch.zeros_like(parameter), "steps": torch.zeros(1)}

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        for parameter, its in self.state.items():
            self.fill(parameter, self.steps)
            self.fill(its["momentum"], self.steps)
            its["steps"].view(torch.uint8).fill_(self.steps)  # the host's


class Rank:
    """A model and its optimizer on the device of this number."""

    def __init__(self, training: Training, places: dict[int, int], rank: int = 0) -> None:
        self.training, self.rank = training, rank
        self.model = nn.Sequential(nn.Linear(400, 400), nn.BatchNorm1d(400), nn.Linear(400, 400))
        self.optimizer = Filling(self.model.parameters())
        self.optimizer.fill = self.fill
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [its["momentum"] for its in self.optimizer.state.values()]
        places.update({tensor.data_ptr(): rank for tensor in tensors})

    def fill(self, tensor: torch.Tensor, value: int) -> None:
        self.training.fill(tensor, value, self.rank)

    def fill_buffers(self, value: int) -> None:
        """A forward does, whenever it likes."""
        for buffer in self.model.buffers():
            self.fill(buffer, value)

    def train(self) -> int:
        self.optimizer.step()
        self.fill_buffers(self.optimizer.steps)
        return self.optimizer.steps


class Engine:
    """As far as a DeepSpeedEngine is looked at."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.global_steps = module, 0


class Job:
    """Ranks of one job, in threads of this process: rank r trains on device r."""

    def __init__(self, training: Training, places: dict[int, int], ranks: int) -> None:
        self.training, self.ranks, self.places = training, ranks, places
        self.pool = concurrent.futures.ThreadPoolExecutor(ranks)
        self.members = [Rank(training, places, rank) for rank in range(ranks)]

    def coordinators(self) -> list[Any]:
        wire = Wire()
        return [Threaded(wire, rank) for rank in range(self.ranks)] if self.ranks > 1 else ["local"]

    def all(self, act: Callable[[int], Any]) -> list[Any]:
        return list(self.pool.map(act, range(self.ranks), timeout=2 * DEADLINE_S))


@pytest.fixture
def places(training: Training) -> dict[int, int]:
    """Which addresses are those of a device; all others are the host's."""
    found: dict[int, int] = {}
    training.on = lambda storage: found.get(storage.data_ptr(), HOST)
    return found


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def job(request: pytest.FixtureRequest, training: Training, places: dict[int, int]) -> Iterator[Job]:
    made = Job(training, places, request.param)
    yield made
    training.cuda.hold_copies(False)
    made.pool.shutdown()


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def bytes_of(*parts: Any) -> set[int]:
    """The values that the bytes of all tensors in there have."""
    found: set[int] = set()
    for part in parts:
        for tensor in tensors_in(part):
            counts = torch.bincount(tensor.detach().contiguous().flatten().view(torch.uint8), minlength=256)
            found.update(counts.nonzero().flatten().tolist())
    return found


def load_parts(path: Path, ranks: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    own = [f"rank-{rank:05d}.pt" for rank in range(ranks)] if ranks > 1 else ["state.pt"]
    return torch.load(path / "replicated.pt"), [torch.load(path / name) for name in own]


# ---- the callback for plain loops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("seed", range(2))
def test_the_callback_saves_what_each_step_has_left(
    seed: int, cache: int | str, job: Job, training: Training, tmp_path: Path
) -> None:
    """The next step, and a forward, overwrite everything as soon as they may."""
    training.cuda.configure(seed=seed, most_delay_s=0.002)
    callbacks = [
        CheckpointCallback(
            tmp_path, model=rank.model, optimizer=rank.optimizer, keep=None, coordinator=coordinator,
            options=options(**SMALL, device_cache=cache),
        )
        for rank, coordinator in zip(job.members, job.coordinators(), strict=True)
    ]  # fmt: skip

    def train(number: int) -> ckpt.PendingSave:
        rank = job.members[number]
        pending = callbacks[number].step(rank.train())
        rank.fill_buffers(SPOILT)
        assert pending is not None
        return pending

    def cached() -> int:
        return sum(pending.stats.device_cached_bytes for pair in saves for pending in pair)

    saves = [job.all(train) for _ in range(4)]
    if cache:  # the disk is slow and the arena full: else a fence that comes late finds nothing left to do
        _native.set_fault("pwritev", str(tmp_path), delay_s=0.05)
    saves.append(job.all(train))
    while cache and not cached() and len(saves) < 10:
        saves.append(job.all(train))
    job.all(lambda number: job.members[number].train())
    clear_faults()
    assert all(pending.captured for pair in saves for pending in pair)
    for step, pair in enumerate(saves, start=1):
        shared, own = load_parts(pair[0].result(DEADLINE_S), job.ranks)
        assert shared.keys() == {"model", "optimizer"}
        assert bytes_of(shared) == {step}
        assert [bytes_of(each["buffers/model"]) for each in own] == [{step}] * job.ranks if job.ranks > 1 else True
        assert sum(pending.stats.bytes_from_devices for pending in pair) > 2_000_000
    assert (cached() > 0) == bool(cache)
    training.synchronize()
    job.all(lambda number: callbacks[number].close())


def test_the_callback_resumes_what_was_on_devices(job: Job, training: Training, tmp_path: Path) -> None:
    def train(number: int) -> None:
        rank = job.members[number]
        with CheckpointCallback(
            tmp_path, model=rank.model, optimizer=rank.optimizer, coordinator=first[number], options=options(**SMALL)
        ) as callback:
            for _ in range(3):
                callback.step(rank.train())
            rank.train()

    def resume(number: int) -> int:
        rank = again.members[number]
        with CheckpointCallback(
            tmp_path, model=rank.model, optimizer=rank.optimizer, coordinator=second[number], options=options(**SMALL)
        ) as callback:
            return callback.resume()

    first, second, again = job.coordinators(), job.coordinators(), Job(training, job.places, job.ranks)
    job.all(train)
    training.synchronize()
    assert again.all(resume) == [3] * job.ranks
    again.pool.shutdown()
    for rank in again.members:
        assert bytes_of(rank.model.state_dict(), list(rank.optimizer.state.values())) == {3}


# ---- a file that all ranks write -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lazy", "writers", "cache"),
    [(True, "all", 0), (True, "all", "8MiB"), (True, "rank0", "8MiB"), (False, "all", 0), (False, "rank0", 0)],
)
def test_ranks_write_one_file_from_their_devices(
    lazy: bool, writers: str, cache: int | str, training: Training, places: dict[int, int], tmp_path: Path
) -> None:
    """Each its share, from a device of its own; what it saves for itself lies there, too."""
    training.cuda.configure(seed=5, most_delay_s=0.005)
    job = Job(training, places, 2)
    sized = options(**SMALL, device_cache=cache, replicated_writers=writers)
    checkpointers = [ckpt.Checkpointer(tmp_path, keep=None, options=sized, coordinator=each) for each in job.coordinators()]
    held: list[Any] = []

    def save(step: int, number: int) -> ckpt.PendingSave:
        own, shared = state(step * 10.0 + number, count=3), state(float(step), count=10)
        tensors = list(tensors_in([own, shared]))
        held.append(tensors)
        places.update({tensor.data_ptr(): number for tensor in tensors[::2]})
        places.update({tensor.data_ptr(): 1 - number for tensor in tensors[1::2]})
        pending = checkpointers[number].save(step, own, replicated=shared, lazy=lazy)
        if lazy:
            ckpt.fence()
            assert pending.captured
        for tensor in tensors:
            training.fill(tensor, SPOILT, places[tensor.data_ptr()])
        return pending

    saves = [job.all(functools.partial(save, step)) for step in range(1, 5)]
    for step, pair in enumerate(saves, start=1):
        shared, own = load_parts(pair[0].result(DEADLINE_S), 2)
        assert_same(state(float(step), count=10), shared)
        assert_same([state(step * 10.0 + number, count=3) for number in range(2)], own)
        from_devices = [pending.stats.bytes_from_devices for pending in pair]
        assert sum(from_devices) > 3_000_000
        assert (from_devices[1] > 1_000_000) == (writers == "all")
    found = job.all(lambda number: checkpointers[number].restore())
    assert [each.step for each in found] == [4, 4]
    for each in found:
        assert_same(state(4.0, count=10), each.replicated)
    training.synchronize()
    job.all(lambda number: checkpointers[number].close())
    job.pool.shutdown()


def test_shares_wait_in_the_caches_of_their_devices(training: Training, places: dict[int, int], tmp_path: Path) -> None:
    """Nothing reaches the host before both ranks are past their fences."""
    job = Job(training, places, 2)
    # An engine for each, as in processes of their own: save() may have to wait for room that the other's copies hold.
    sized = [options(**(SMALL | {"arena_bytes": size}), device_cache="8MiB") for size in ("1MiB", "1088KiB")]
    checkpointers = [
        ckpt.Checkpointer(tmp_path, keep=None, options=sized[number], coordinator=each)
        for number, each in enumerate(job.coordinators())
    ]
    shared = [state(1.0, count=20) for _ in range(2)]
    for number in range(2):
        places.update({tensor.data_ptr(): number for tensor in tensors_in(shared[number])})
    for step in range(2):
        job.all(
            lambda number, step=step: checkpointers[number].save(step, replicated=shared[number], lazy=True).result(DEADLINE_S)
        )
    engines = [inspection.engine_of(each) for each in checkpointers]
    wait_until(lambda: all(size for engine in engines for size, _, _ in engine.device_caches.values()), what="the caches")
    training.cuda.hold_copies(True)

    pair = job.all(lambda number: checkpointers[number].save(2, replicated=shared[number], lazy=True))

    def compute(number: int) -> None:
        ckpt.fence()
        for tensor in tensors_in(shared[number]):
            training.fill(tensor, SPOILT, number)

    job.all(compute)
    assert all(pending.captured and not pending.done() for pending in pair)
    training.cuda.hold_copies(False)
    assert_same(state(1.0, count=20), torch.load(pair[0].result(DEADLINE_S) / "replicated.pt"))
    assert sum(pending.stats.device_cached_bytes for pending in pair) > 1 << 20, "the rest is in the arenas"
    training.synchronize()
    assert bytes_of(shared) == {SPOILT}
    job.all(lambda number: checkpointers[number].close())
    job.pool.shutdown()


# ---- DeepSpeed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_deepspeed_saves_what_each_step_has_left(
    cache: int | str, training: Training, places: dict[int, int], tmp_path: Path
) -> None:
    """What DeepSpeed calls around a save and an update, and state dicts as its ZeRO 1 makes them."""
    training.cuda.configure(seed=1, most_delay_s=0.002)
    rank = Rank(training, places)
    section = {"device_lazy": True, "device_cache": cache, "eager_bytes": "4KiB", **SMALL}
    ours = LazyCheckpointEngine(SimpleNamespace(datastates_config=SimpleNamespace(config=section)))
    engine = Engine(rank.model)
    ours.bind(engine)
    ema = torch.zeros(50_000)
    places[ema.data_ptr()] = 0
    cached = 0
    for step in range(1, 6):
        ours.get_commit_info()  # before an update
        assert rank.train() == step
        rank.fill(ema, step)
        engine.global_steps = step
        info = SimpleNamespace(save_dir=str(tmp_path), tag=f"step{step}", save_latest=True)
        ours.begin_save(("ema",))
        ours.create(info)
        model = {"module": rank.model.state_dict(), "ds_version": "0.19.0", "global_steps": step, "ema": ema}
        ours.save(model, str(tmp_path / info.tag / "mp_rank_00_model_states.pt"))
        optimizer = {"optimizer_state_dict": {"base_optimizer_state": rank.optimizer.state_dict()}}
        ours.save(optimizer, str(tmp_path / info.tag / "zero_pp_rank_0_optim_states.pt"))
        pending = ours._bundle.pending
        rank.fill_buffers(SPOILT)  # a forward, and the user's own code
        rank.fill(ema, SPOILT)
        assert ours.is_decoupled()
        cached += pending.stats.device_cached_bytes
    ours.get_commit_info()
    rank.train()
    ours.wait(DEADLINE_S)
    for step in range(1, 6):
        files = [torch.load(path) for path in (tmp_path / f"step{step}").glob("*_states.pt")]
        assert len(files) == 2
        assert bytes_of(*files) == {step}
    assert (tmp_path / "latest").read_text() == "step5"
    assert pending.stats.bytes_from_devices > 2_000_000
    assert bool(pending.stats.device_cached_bytes) == bool(cache)
    training.synchronize()
    ours.cleanup()
